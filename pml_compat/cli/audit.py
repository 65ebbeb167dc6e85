"""``pml-compat audit``: what stored old embeddings are like, before a training is spent on them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_audit(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    audit = commands.add_parser(
        "audit",
        help="look through stored old embeddings: noise, classes, and which method they call for",
        description="Look through the old model's embeddings of the new training set: rows that are no numbers, zero, "
        "copies, wrongly labelled or far from all others, classes that the old model mixes up, and what follows.",
        epilog="Exit status: 0 done, 3 could not run.",
    )
    add = audit.add_argument
    add("old", metavar="OLD", type=Path, help=".npz, .npy, Parquet or a FrozenEmbeddings folder, as for evaluate")
    add("--labels", type=Path, metavar="NPY", help="labels, in place of those in the file")
    add("--new", type=Path, metavar="FILE", help="the same items by a finished new model")
    add("--max-rows", type=int, default=50_000, metavar="N", help="look at that many at most (%(default)s)")
    add("--out", type=Path, metavar="FOLDER", help="write audit.md, audit.json and keep.npy, one bool a row, there")
    audit.set_defaults(run=_audit, failed=3)


def _audit(options: argparse.Namespace) -> int:
    import numpy as np  # imports torch: not for --help

    from .._files import whole_folder
    from ..upgrade import audit
    from .stored import read_stored

    old = read_stored(options.old, "OLD", options.labels)
    new = None if options.new is None else read_stored(options.new, "--new").in_order_of(old)
    found = audit(old.embeddings, old.labels, None if new is None else new.embeddings, max_rows=options.max_rows)
    print(found.table())
    if options.out is not None:
        with whole_folder(options.out) as folder:
            (folder / "audit.md").write_text(f"# Audit of {options.old}\n\n{found.table()}\n", encoding="utf-8")
            found.to_json(folder / "audit.json")
            np.save(folder / "keep.npy", found.keep.numpy())
    return 0
