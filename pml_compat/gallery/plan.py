"""What a migration will do, before it does anything."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .migrate import Migration

_TRIED = 8192  # items that are read and mapped to see how long it takes


@dataclass(frozen=True)
class Plan:
    """What a migration will do, before it does anything.

    Args:
        old: address of the gallery as it is stored.
        new: where the mapped one will be.
        rows: items.
        done: of them, that an earlier run has written.
        width: of the old vectors.
        new_width: of the new ones.
        bytes: that the new vectors take.
        free: bytes that are free where the new store is a file; None elsewhere.
        seconds: to read and map what is left, without the writing.
        notes: what a reader should know, one sentence each.
    """

    old: str
    new: str
    rows: int
    done: int
    width: int
    new_width: int
    bytes: int
    free: int | None
    seconds: float
    notes: tuple[str, ...] = field(default_factory=tuple)


def make_plan(run: Migration) -> Plan:
    """Read and map a few items, and look at the space that is free."""
    source, manifest = run.source, run.manifest
    done = manifest.get("done", 0)
    start = time.perf_counter()
    batch = next(iter(source.batches(min(manifest["batch_size"], _TRIED))), None)
    seconds = 0.0
    if batch is not None:
        run.mapped(batch, 0)
        seconds = (time.perf_counter() - start) / len(batch.ids) * (len(source) - done)
    new, new_width = manifest["new"], manifest["width"]
    free = None if "://" in new else shutil.disk_usage(_existing(Path(new))).free
    size = source.dtype.itemsize * len(source) * new_width
    notes = list(source.notes)
    if free is not None and size > free:
        notes.append("That is more than is free there.")
    if done:
        notes.append("An earlier run has begun; this one would go on.")
    return Plan(
        manifest["old"],
        new,
        len(source),
        done,
        source.width,
        new_width,
        size,
        free,
        seconds,
        tuple(notes),
    )


def _existing(path: Path) -> Path:
    return next(folder for folder in path.absolute().parents if folder.exists())
