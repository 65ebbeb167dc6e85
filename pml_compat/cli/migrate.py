"""``pml-compat migrate``: a stored gallery through a map, into a new store beside it."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..gallery.plan import Plan

_STORES = (
    "OLD and NEW are addresses: NAME.npy (with NAME.ids.npy), NAME.parquet or a folder of such (#COLUMN), NAME.lance "
    "(#COLUMN), NAME.faiss or NAME.index, qdrant://HOST:6333/COLLECTION (#NAME; qdrant:///FOLDER/COLLECTION in local "
    "mode), milvus://HOST:19530/COLLECTION (#FIELD; milvus:///FOLDER/FILE.db/COLLECTION of Milvus Lite), "
    "postgresql://USER@HOST/DATABASE/TABLE#COLUMN, lancedb:///FOLDER/TABLE (#COLUMN)."
)


def add_migrate(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    migrate = commands.add_parser(
        "migrate",
        help="carry a stored gallery over through a map, beside the old one",
        description="Map every vector of OLD by a transformation, into NEW; OLD is only read. A run that was killed "
        "goes on where it stopped when it is started again with the same arguments.",
        epilog=f"{_STORES} Exit status: 0 done, 3 could not run.",
    )
    add = migrate.add_argument
    add("old", metavar="OLD", help="the gallery as it is stored; with --rollback, what a migration has written")
    add("new", metavar="NEW", nargs="?", help="where the mapped one will be, and nothing stands yet")
    add("--with", type=Path, metavar="FILE", dest="transformation", help="the map, a .safetensors file")
    add("--side-info", type=Path, metavar="NPY", help="side-information, for a map that takes it, in the store's order")
    add("--side-ids", type=Path, metavar="NPY", help="ids of the rows of --side-info, where they are in another order")
    add("--normalize", action="store_true", help="scale mapped vectors to length 1")
    add("--batch-size", type=int, metavar="N", help="items at once (32 MiB of vectors)")
    add("--old-model", metavar="FINGERPRINT", help="of the model behind the old vectors")
    add("--new-model", metavar="FINGERPRINT", help="of the model whose queries will be answered")
    add("--embed", metavar="MODULE:FUNCTION", help="then embed items anew: called with a list of ids, returns their "
        "embeddings by the new model")  # fmt: skip
    add("--budget", metavar="AMOUNT", help="as far as this goes: 20%%, a number of items, or 90s, 30min, 8h")
    add("--order", type=Path, metavar="NPY", help="ids, the most urgent first (random)")
    add(
        "--ray",
        metavar="ADDRESS",
        help="over a Ray cluster, Parquet or Lance: its address, auto, or local for one here",
    )
    add("--sample", type=Path, nargs=2, metavar="FILE", help="the same labelled items by the old model and by the new "
        "one (as evaluate reads them): with --dry-run it tells what each share embedded anew is worth")  # fmt: skip
    add("--sample-side-info", type=Path, metavar="NPY", help="side-information of the sample, for a map that takes it")
    add("--far", type=float, nargs="*", default=(), metavar="RATE", help="with --sample, the thresholds of these false "
        "accept rates in each phase")  # fmt: skip
    add("--dry-run", action="store_true", help="say what it would do: items, widths, space, time; write nothing")
    add("--rollback", action="store_true", help="remove what a migration has written at this one address")
    migrate.set_defaults(run=_migrate, failed=3, interrupted="what is written stays; run it again to go on")


def _migrate(options: argparse.Namespace) -> int:
    import numpy as np

    from ..gallery import backfill, migrate, migrate_with_ray, rollback  # imports torch: not for --help
    from ..gallery.plan import Plan  # imports torch: not for --help

    if options.rollback:
        if options.new is not None or options.transformation is not None:
            raise ValueError("--rollback must be given with one address alone, of what a migration has written")
        manifest = rollback(options.old)
        print(f"Removed {manifest['new']}: {manifest['done']:,} items, {manifest['status']}. {manifest['old']} stays.")
        return 0
    if options.new is None or options.transformation is None:
        raise ValueError("migrate must be given OLD, NEW and --with FILE, the map")
    if options.sample is None and (options.sample_side_info is not None or options.far):
        raise ValueError("--sample must be given with --sample-side-info and --far, which are about it")
    if options.sample is not None and not options.dry_run:
        raise ValueError("--sample must be given with --dry-run, which tells what it shows")
    if (options.embed is None) != (options.budget is None):
        raise ValueError("--embed must be given with --budget: what to embed by, and how far to go")
    embed = None if options.embed is None else _function(options.embed)
    names = ("side_info", "side_ids", "normalize", "batch_size", "old_model", "new_model", "dry_run")
    arguments = {name: getattr(options, name) for name in names}
    try:
        if options.ray is not None and not arguments.pop("dry_run"):
            address = None if options.ray == "local" else options.ray
            found: Any = migrate_with_ray(
                options.old, options.new, options.transformation, address=address, **arguments
            )
        else:
            found = migrate(options.old, options.new, options.transformation, **arguments)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if isinstance(found, Plan):
        _print_plan(found)
        if options.sample is not None:
            _print_expected(options)
    else:
        print(f"{found['done']:,} items in {found['new']}, {found['read_back']} of them read back and compared.")
        if embed is not None:
            order = None if options.order is None else np.load(options.order, allow_pickle=False)
            found = backfill(options.new, embed, budget=options.budget, order=order, model=options.new_model)
            print(f"{found['backfill']['done']:,} of them embedded anew.")
    return 0


def _print_plan(plan: Plan) -> None:
    from .estimate import duration, size_in_words

    done = f", {plan.done:,} of them done" if plan.done else ""
    free = "" if plan.free is None else f", {size_in_words(plan.free)} are free"
    print(f"{plan.old} -> {plan.new}")
    print(f"{plan.rows:,} items{done}, {plan.width} wide, {plan.new_width} wide after")
    print(f"{size_in_words(plan.bytes)} of new vectors{free}")
    print(f"about {duration(plan.seconds)} to read and map, and the time to write", *plan.notes, sep="\n")


def _print_expected(options: argparse.Namespace) -> None:
    """Measure the map, and a backfill in random order, on a labelled sample that both models have embedded."""
    from ..upgrade import evaluate
    from .inputs import Inputs, load

    old, new = options.sample
    inputs = Inputs(
        queries=new,
        gallery=old,
        old_queries=old,
        new_gallery=new,
        transformation=options.transformation,
        side_info=options.sample_side_info,
        same_items=True,
        fars=options.far,
        retire_old_model=True,  # nothing that asks it is measured
    )
    try:
        arrays = load(inputs)
    except ValueError as error:
        raise ValueError(f"--sample: {error}") from error
    found = evaluate(**arrays, progress=True)
    curve, steps = found.backfill["transformed_old"], found.backfill_differences["transformed_old"]
    print(
        f"\nOn the sample, {len(arrays['queries']):,} items, each left out of its own ranking: new queries in the\n"
        "mapped gallery, the more of it is embedded anew (in random order); against old queries today, 95 % intervals\n"
    )
    print(f"{'anew':>6}  {'P@1':>5}  {'against today':>22}  {'mAP':>5}  {'against today':>22}")
    for share, values, against in zip(curve.fractions, curve.steps, steps, strict=True):
        cells = []
        for metric, difference in against.items():
            value = 100 * float(values[metric].nanmean())
            low, high = 100 * difference.low, 100 * difference.high
            cells.append(f"{value:5.1f}  {100 * difference.estimate:+6.1f} [{low:+6.1f}, {high:+6.1f}]")
        print(f"{share:6.0%}  " + "  ".join(cells))
    phases = {"old_to_old": "today", "new_to_transformed_old": "mapped rows", "new_to_new": "rows embedded anew"}
    if found.verification is not None:
        print(
            "\nThresholds on the cosine, by the kind of row that a query is compared with, and the share of right pairs"
        )
        for far in options.far:
            points = ((name, found.verification[pair].at_far[far]) for pair, name in phases.items())
            print(f"FAR {far:g}: " + ", ".join(f"{name} {one.threshold:.4f} ({one.tar:.1%})" for name, one in points))


def _function(name: str) -> Callable[[list[Any]], Any]:
    """Return a function of the user's own, by ``module:function``; the current folder is looked in, too."""
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"--embed must be MODULE:FUNCTION, got {name!r}")
    sys.path.insert(0, os.getcwd())
    try:
        found: Callable[[list[Any]], Any] = getattr(importlib.import_module(module), function)
    except AttributeError:
        raise ValueError(f"--embed must name a function of {module}, it has no {function!r}") from None
    finally:
        sys.path.pop(0)
    return found
