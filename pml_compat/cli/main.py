"""The ``pml-compat`` command line."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from .. import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 where it failed, 2 for unusable arguments, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="pml-compat", description="Upgrade an embedding model without re-embedding what is stored."
    )
    parser.add_argument("--version", action="version", version=f"pml-compat {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="upgrade a small model on real images, in a minute on a CPU")
    demo.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the results (%(default)s)")
    demo.add_argument("--seeds", type=_seed, nargs="+", default=[0, 1, 2, 3, 4], help="one upgrade a seed (0 1 2 3 4)")
    demo.set_defaults(run=_demo)
    options = parser.parse_args(arguments)
    # A plain 'kill' then ends the program as Ctrl-C does, and temporary files go.
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return options.run(options)
    except (ImportError, OSError, ValueError) as error:
        print(f"pml-compat: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pml-compat: interrupted, nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def _demo(options: argparse.Namespace) -> int:
    from .demo import run_demo  # imports torch and PML: not for --help

    run_demo(options.out, options.seeds)
    return 0


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"a seed must be in [0, 2**32 - 1], got {value}")
    return value


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
