"""A stored gallery carried over into a new store, through a map, beside the old one: resumable and reversible."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import __version__
from .._checks import check_integer
from ..frozen import model_fingerprint
from ..transformations import Transformation, load_transformation
from .manifest import FORMAT, check_model, find_begun, without_password
from .plan import Plan, make_plan
from .sample import Sample
from .stores import Manifest, Store, Writer, is_live, open_store, open_writer, read_manifest
from .stores.base import Batch, check_finite_vectors
from .stores.npy import open_array, rows_of

_BATCH_BYTES = 2**25  # of the wider vectors of a batch


def migrate(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    transformation: Transformation | str | os.PathLike[str],
    *,
    side_info: Any = None,
    side_ids: Any = None,
    normalize: bool = False,
    batch_size: int | None = None,
    old_model: str | None = None,
    new_model: str | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> Manifest | Plan:
    """Map a stored gallery into the new model's space, into a new store beside the old one.

    The old store is only read. The new one has its ids, its order and its payload. A run that was killed at any moment
    goes on where it stopped when it is called again with the same arguments; the result is that of a run that was not.
    Memory is set by ``batch_size``.

    A database (Qdrant, PostgreSQL, Milvus) may stay in service: who writes an item meanwhile writes it to both, and
    what stands in the new store is left as it is. A call after the end, where the old one has more items than the new
    one, carries over what only the old one has.

    Args:
        old: address of the gallery; see :func:`pml_compat.gallery.open_store`.
        new: address of the new one, where nothing stands yet. For PostgreSQL it may be another column of the table.
        transformation: the map, or a ``.safetensors`` file of it.
        side_info: ``(N, S)`` array, memory map or ``.npy`` file, where the map takes it: row i for item i of the
            store's order, or for ``side_ids[i]``.
        side_ids: ``(N,)`` ids of the rows of ``side_info``, or an ``.npy`` file of them.
        normalize: scale mapped vectors to length 1.
        batch_size: items that are read, mapped and written at once; 32 MiB of vectors by default.
        old_model: fingerprint of the model behind the old vectors; a gallery that says another is refused.
        new_model: fingerprint of the model whose queries will be answered; it is kept in the manifest.
        dry_run: write nothing, and return the :class:`Plan`.
        progress: show a progress bar with the time left.
    Returns:
        The manifest that the new store keeps: which map, which models, how many items. With ``dry_run`` the plan.
    Raises:
        FileNotFoundError: there is no such gallery.
        ImportError: an extra is missing; which.
        ValueError: something else stands at ``new``; it was begun with another map, model, batch size or gallery;
            widths that differ; NaN or infinity, with the item; side-information that is missing.
        RuntimeError: what was read back is not what was mapped.
    """
    run = prepare(old, new, transformation, side_info, side_ids, normalize, batch_size, old_model, new_model)
    if dry_run:
        return make_plan(run)
    if run.manifest.get("status") != "finished":
        return _run(run, progress)
    return _catch_up(run, progress) if run.live else run.manifest


@dataclass
class Migration:
    """A migration that is checked: what it reads, its map, where it writes, and how far it is.

    ``live``: others may write to both stores meanwhile.
    """

    source: Store
    transformation: Transformation
    side: Callable[[Batch, int], Any] | None
    new: str
    manifest: Manifest
    live: bool

    @property
    def is_begun(self) -> bool:
        """Whether an earlier run has written something."""
        return "status" in self.manifest

    def begin(self) -> Writer:
        """Return the writer; it has kept a manifest, so that what stands at the address is known to be ours."""
        writer = open_writer(self.new, self.source, self.manifest["width"])
        if not self.is_begun:
            self.manifest |= {"status": "running", "done": 0, "batches": 0, "cursor": None, "started": _now()}
            writer.keep(self.manifest)
        return writer

    def mapped(self, batch: Batch, start: int) -> Batch:
        """Return a batch with the vectors that the new store will have; ``start`` is its first item's place."""
        check_finite_vectors(batch, self.manifest["old"])
        vectors = self.transformation.apply_to(
            batch.vectors,
            None if self.side is None else self.side(batch, start),
            normalize=self.manifest["normalize"],
            progress=False,
        )
        return replace(batch, vectors=vectors.astype(self.source.dtype, copy=False))

    def end(self, writer: Writer, sample: Sample) -> Manifest:
        """Make a whole store of what was written, compare some of it, and say so in the manifest."""
        if self.live:
            self.manifest["rows"] = self.manifest["done"]
        if self.manifest["done"] != self.manifest["rows"]:
            raise RuntimeError(
                f"{self.manifest['old']} had {self.manifest['rows']:,} items when this began, "
                f"{self.manifest['done']:,} were read; stop writing to it, roll back and begin again"
            )
        writer.finish()
        compared = sample.compare(self.new, self.manifest["rows"], self.source if self.live else None)
        self.manifest |= {"read_back": compared, "status": "finished", "finished": _now()}
        writer.keep(self.manifest)
        return self.manifest


def prepare(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    transformation: Transformation | str | os.PathLike[str],
    side_info: Any,
    side_ids: Any,
    normalize: bool,
    batch_size: int | None,
    old_model: str | None,
    new_model: str | None,
) -> Migration:
    """Check the arguments of :func:`migrate`, and find what an earlier run has done."""
    old, new = os.fspath(old), os.fspath(new)
    if without_password(old) == without_password(new):
        raise ValueError(f"new must be another place than old, got {without_password(new)!r} for both")
    chosen = transformation if isinstance(transformation, Transformation) else load_transformation(transformation)
    source = open_store(old)
    if source.width != chosen.in_features:
        raise ValueError(
            f"transformation must take the vectors of old, {source.width} wide, got one for {chosen.in_features}"
        )
    check_model(old, old_model)
    side = side_info_of(chosen, side_info, side_ids, len(source))
    if batch_size is None:
        batch_size = max(256, _BATCH_BYTES // (4 * max(chosen.in_features, chosen.out_features)))
    wanted = {
        "format": FORMAT,
        "pml_compat": __version__,
        "old": without_password(old),
        "new": without_password(new),
        "width": chosen.out_features,
        "rows": len(source),
        "batch_size": check_integer(batch_size, "batch_size", minimum=1),
        "transformation": {"class": type(chosen).__name__, "fingerprint": model_fingerprint(chosen)},
        "normalize": normalize,
        "side_info": side is not None,
        "old_model": old_model,
        "new_model": new_model,
    }
    # Side-information by the row cannot stand rows that come between.
    live = source.live and is_live(new) and (side is None or side_ids is not None)
    return Migration(source, chosen, side, new, find_begun(new, wanted, live) or wanted, live)


def rollback(new: str | os.PathLike[str]) -> Manifest:
    """Remove what a migration has written at ``new``, finished or not; the old store is not touched.

    Returns:
        The manifest of what was removed.
    Raises:
        ValueError: no migration wrote it.
    """
    address = os.fspath(new)
    manifest = read_manifest(address)
    if manifest is None or manifest.get("format") != FORMAT:
        raise ValueError(f"new must be what a migration wrote, {without_password(address)!r} has no manifest")
    open_writer(address, _Removed(manifest), manifest["width"]).discard()
    return manifest


class _Removed(Store):
    """Stands for the gallery that a store was written from, which need not be there to remove it."""

    def __init__(self, manifest: Manifest) -> None:
        self.address, self.width, self.dtype = manifest["old"], manifest["width"], np.dtype(np.float32)

    def __len__(self) -> int:
        return 0

    def batches(self, size: int, cursor: Any = None) -> Any:
        raise NotImplementedError

    def fetch(self, ids: np.ndarray) -> np.ndarray:
        raise NotImplementedError


def _run(run: Migration, progress: bool) -> Manifest:
    writer, manifest, sample = run.begin(), run.manifest, Sample()
    if manifest["cursor"] is not None or not manifest["batches"]:
        batches = run.source.batches(manifest["batch_size"], manifest["cursor"])
        with tqdm(
            total=manifest["rows"], initial=manifest["done"], desc="migrate", unit="item", disable=not progress
        ) as bar:
            for batch in batches:
                mapped = run.mapped(batch, manifest["done"])
                done = manifest["done"] + len(batch.ids)
                manifest |= {"done": done, "batches": manifest["batches"] + 1, "cursor": batch.cursor}
                writer.commit(mapped, manifest)
                sample.add(mapped)
                bar.update(len(batch.ids))
    return run.end(writer, sample)


def _catch_up(run: Migration, progress: bool) -> Manifest:
    """Carry over what only the old store has."""
    new, manifest = open_store(run.new), run.manifest
    if len(new) >= len(run.source):
        return manifest
    writer = run.begin()
    for batch in tqdm(run.source.batches(manifest["batch_size"]), desc="catch up", unit="batch", disable=not progress):
        rows = np.flatnonzero(~new.known(batch.ids))
        if len(rows):
            manifest |= {"done": manifest["done"] + len(rows), "batches": manifest["batches"] + 1}
            manifest["rows"] = manifest["done"]
            writer.commit(run.mapped(batch.take(rows), 0), manifest)
    return manifest


def side_info_of(transformation: Transformation, rows: Any, ids: Any, count: int) -> Callable[[Batch, int], Any] | None:
    """Return what gives a batch its side-information, or None where the map takes none."""
    if (rows is None) != (transformation.side_features is None):
        wanted = "None" if transformation.side_features is None else f"given, (N, {transformation.side_features})"
        raise ValueError(f"side_info must be {wanted} for this {type(transformation).__name__}")
    if rows is None:
        return None
    given = open_array(Path(rows)) if isinstance(rows, str | os.PathLike) else rows
    if ids is None:
        if len(given) != count:
            raise ValueError(f"side_info must have one row an item: expected {count}, got {len(given)}")
        return lambda batch, start: given[start : start + len(batch.ids)]
    known = np.asarray(open_array(Path(ids)) if isinstance(ids, str | os.PathLike) else ids)
    if len(known) != len(given):
        raise ValueError(f"side_ids must have one id a row of side_info: expected {len(given)}, got {len(known)}")
    order = np.argsort(known, kind="stable")
    return lambda batch, start: given[rows_of(batch.ids, known, "side_ids", order)]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
