"""``python -m pml_compat``: the ``pml-compat`` command."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
