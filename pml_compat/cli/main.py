"""The ``pml-compat`` command line."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from .. import __version__
from .audit import add_audit
from .migrate import add_migrate

_OUTCOMES = (
    "swap_now",
    "swap_with_a_new_threshold",
    "swap_with_transformed_gallery",
    "blend_queries",
    "search_in_two_stages",
    "backfill_first",
    "not_enough_queries",
    "warning",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status.

    ``demo``: 0, or 1 where it failed. ``evaluate``: 0 go, 1 no, 2 not enough to say, 3 could not run. ``migrate``:
    0, or 3. 130: interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="pml-compat", description="Upgrade an embedding model without re-embedding what is stored."
    )
    parser.add_argument("--version", action="version", version=f"pml-compat {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="upgrade a small model on real images, in a few minutes on a CPU")
    demo.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the results (%(default)s)")
    demo.add_argument("--seeds", type=_seed, nargs="+", default=[0, 1, 2, 3, 4], help="one upgrade a seed (0 1 2 3 4)")
    demo.add_argument("--methods", nargs="+", metavar="METHOD", help="what to compare, or 'all', with what each costs "
        "(independent bct lce lce_backward fct fct_side)")  # fmt: skip
    demo.set_defaults(run=_demo, failed=1)
    _add_evaluate(commands)
    add_migrate(commands)
    add_audit(commands)
    options = parser.parse_args(arguments)
    # A plain 'kill' then ends the program as Ctrl-C does, and temporary files go.
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return options.run(options)
    except (ImportError, OSError, ValueError) as error:
        print(f"pml-compat: {error}", file=sys.stderr)
        return options.failed
    except KeyboardInterrupt:
        left = getattr(options, "interrupted", "nothing was written")
        print(f"pml-compat: interrupted, {left}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def _demo(options: argparse.Namespace) -> int:
    from .demo import run_demo  # imports torch and PML: not for --help
    from .demo_models import ALL_METHODS, METHODS

    methods = options.methods or METHODS
    if methods == ["all"]:
        methods = ALL_METHODS
    unknown = sorted(set(methods) - set(ALL_METHODS))
    if unknown:
        raise ValueError(f"--methods must be all, or some of {' '.join(ALL_METHODS)}, got {' '.join(unknown)}")
    run_demo(options.out, options.seeds, methods)
    return 0


def _add_evaluate(commands: argparse._SubParsersAction[Any]) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure an upgrade on stored embeddings, and say what to do",
        description="Measure new queries on an old gallery, and say what to do: swap now, swap with a transformed "
        "gallery, blend old and new queries, search in two stages, backfill a share first, or do not upgrade.",
        epilog="Exit status: 0 go, 1 no, 2 not enough to say, 3 could not run. "
        "FILE is an .npz file with the keys embeddings and labels (optional: ids, cameras), an .npy file of "
        "embeddings, a .parquet file with the columns embedding and label (optional: id, camera), or a folder written "
        "by FrozenEmbeddings.",
    )
    add = evaluate.add_argument
    add("--queries", type=Path, required=True, metavar="FILE", help="the queries, embedded by the new model")
    add("--gallery", type=Path, required=True, metavar="FILE", help="the gallery as it is stored, by the old model")
    add("--old-queries", type=Path, metavar="FILE", help="the same queries by the old model: needed for a verdict")
    add("--new-gallery", type=Path, metavar="FILE", help="the same gallery items by the new model: gain and backfill")
    mapped = evaluate.add_mutually_exclusive_group()
    mapped.add_argument("--transformed-gallery", type=Path, metavar="FILE", help="the gallery mapped to the new space")
    mapped.add_argument("--transformation", type=Path, metavar="FILE", help="the map itself, a .safetensors file")
    add("--side-info", type=Path, metavar="NPY", help="side-information of the gallery, for a map that takes it")
    add("--query-labels", type=Path, metavar="NPY", help="labels of the queries, in place of those in the file")
    add("--gallery-labels", type=Path, metavar="NPY", help="labels of the gallery, in place of those in the file")
    add("--labels", type=Path, metavar="NPY", help="both, for queries and gallery of the same items")
    add("--same-items", action="store_true", help="row i of queries and gallery is one item: leave it out of its own "
        "ranking; ids in both files say the same")  # fmt: skip
    add("--normalize", action=argparse.BooleanOptionalAction, default=True, help="scale embeddings to length 1 (on)")
    add(
        "--fars",
        type=float,
        nargs="+",
        default=(),
        metavar="FAR",
        help="verification, too, at these false accept rates",
    )
    add("--margin", type=float, default=0.01, help="a difference in accuracy that does not matter (%(default)s)")
    add("--fit-width", action="store_true", help="compare models of different widths by the first coordinates, as BCT "
        "trains them")  # fmt: skip
    add("--blend", type=Path, metavar="FILE", help="a fitted QueryBlend, in place of one fitted to the two galleries")
    add("--depths", type=_positive, nargs="*", default=(10, 50), metavar="N", help="items a query of a search in two "
        "stages (10 50)")  # fmt: skip
    add("--retire-old-model", action="store_true", help="the old model will not run any more: no blended queries, no "
        "search in two stages")  # fmt: skip
    add("--groups", type=Path, metavar="NPY", help="a group of each query, such as a country: what happens to each")
    add("--index", metavar="FACTORY", help="rank by this faiss index, such as IVF1024,PQ32, in place of exactly")
    add("--nprobe", type=_positive, help="cells of the index that a query looks into")
    add("--fail-on", nargs="+", default=(), metavar="OUTCOME", choices=_OUTCOMES, help="end with 1 at these verdicts, "
        f"too: {', '.join(_OUTCOMES)}")  # fmt: skip
    for column in ("embedding", "label", "id"):
        add(f"--{column}-column", metavar="NAME", help=f"the {column} column of Parquet files, in place of known names")
    add("--json", action="store_true", help="print metrics.json on standard output, in place of the table")
    add("--k", type=_positive, help="cut rankings off after k items (full rankings)")
    add("--seed", type=_seed, default=0, help="of the backfill's order and of the resamples (%(default)s)")
    add("--device", help="where to compute, such as cpu or cuda (a GPU where there is one)")
    add("--out", type=Path, default=Path("evaluation_output"), help="folder for the results (%(default)s)")
    evaluate.set_defaults(run=_evaluate, failed=3)
    evaluate.error = _unusable(evaluate)  # type: ignore[method-assign]


def _evaluate(options: argparse.Namespace) -> int:
    from .evaluate import run_evaluate  # imports torch and PML: not for --help
    from .inputs import Inputs
    from .stored import Columns

    own = ("run", "out", "labels", "json", "failed", "fail_on", "embedding_column", "label_column", "id_column")
    settings = {key: value for key, value in vars(options).items() if key not in own}
    named = {"embeddings": options.embedding_column, "labels": options.label_column, "ids": options.id_column}
    settings["columns"] = Columns(**{key: (name,) for key, name in named.items() if name is not None})
    settings["query_labels"] = options.query_labels or options.labels
    settings["gallery_labels"] = options.gallery_labels or options.labels
    verdict = run_evaluate(Inputs(**settings), options.out, as_json=options.json).verdict
    stops = verdict.outcome in options.fail_on or ("warning" in options.fail_on and bool(verdict.warnings))
    return 1 if stops else verdict.exit_code


def _unusable(parser: argparse.ArgumentParser) -> Callable[[str], NoReturn]:
    """Return a parser's ``error`` that ends with 3: 2 means that there are not enough queries."""

    def error(message: str) -> NoReturn:
        parser.print_usage(sys.stderr)
        parser.exit(3, f"{parser.prog}: error: {message}\n")

    return error


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"a seed must be in [0, 2**32 - 1], got {value}")
    return value


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
