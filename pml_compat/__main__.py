"""``python -m pml_compat`` is ``pml-compat``."""

from .cli.main import main

raise SystemExit(main())
