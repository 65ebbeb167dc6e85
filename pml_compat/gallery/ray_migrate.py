"""The same migration over the machines of a Ray cluster: Parquet or Lance, on storage that all of them see."""

from __future__ import annotations

import os
from typing import Any, cast

import numpy as np
import torch

from .._extras import import_extra
from ..transformations import Transformation
from .migrate import Migration, prepare, side_info_of
from .sample import Sample
from .stores import Manifest, open_store, open_writer
from .stores.lance import LanceStore, LanceWriter
from .stores.parquet import ParquetStore, ParquetWriter


def migrate_with_ray(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    transformation: Transformation | str | os.PathLike[str],
    *,
    address: str | None = None,
    workers: int | None = None,
    side_info: Any = None,
    side_ids: Any = None,
    normalize: bool = False,
    batch_size: int | None = None,
    old_model: str | None = None,
    new_model: str | None = None,
) -> Manifest:
    """Map a gallery in Parquet or Lance as :func:`migrate` does, batch by batch in the actors of Ray Data.

    Every batch becomes the part that a run on one machine would have written; Parquet byte for byte on like machines.
    A worker that died is started again by Ray, and its batch done again. A run that was killed as a whole goes on when
    it is called again.

    Args:
        old: a Parquet file or folder or a Lance dataset, ``...#column``, that every machine sees at this path.
        new: the new one, likewise.
        transformation: as in :func:`migrate`, as are the arguments that are not named here.
        address: of the cluster; by default the one that Ray is connected to, else one on this machine.
        workers: actors, each with a map of its own; one less than the cluster's CPUs by default, as reading needs one.
    Raises:
        ImportError: Ray is not installed.
        ValueError: a store that is neither; see :func:`migrate`.
    """
    ray, data = import_extra("ray", "ray"), import_extra("ray.data", "ray")
    old, new = (os.path.abspath(path) for path in (old, new))
    run = prepare(old, new, transformation, side_info, side_ids, normalize, batch_size, old_model, new_model)
    writer = open_writer(new, run.source, run.manifest["width"])
    if not all(hasattr(*pair) for pair in ((run.source, "cursors"), (writer, "write_part"))):
        raise ValueError(f"old and new must be Parquet or Lance, got {old!r} and {new!r}")
    source, size = cast(ParquetStore | LanceStore, run.source), run.manifest["batch_size"]
    parts = cast(ParquetWriter | LanceWriter, writer)
    if run.manifest.get("status") == "finished":
        return run.manifest
    run.begin()
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    cursors, counts = source.cursors(size), source.counts(size)
    if not parts.part(0).exists():  # what it makes is there when the workers come
        parts.write_part(0, run.mapped(next(iter(source.batches(size))), 0))
    todo = [number for number in range(len(cursors)) if not parts.part(number).exists()]
    if todo:
        workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)) - 1)
        items = [{"number": number} for number in todo]
        batches = data.from_items(items, override_num_blocks=min(len(todo), 4 * workers))
        side = [_seen_by_all(one, ray) for one in (side_info, side_ids)]
        done = batches.map_batches(
            _Worker,
            fn_constructor_args=(old, new, run.transformation, run.manifest, side),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=min(workers, len(todo))),
        )
        rows = sum(row["rows"] for row in done.take_all())
        if rows != sum(counts[number] for number in todo):
            raise RuntimeError(f"{old} must not be written to while it is carried over; roll back and begin again")
    run.manifest |= {"done": sum(counts), "batches": len(cursors), "cursor": None}
    return run.end(writer, _some_of(run, cursors, counts))


def _seen_by_all(array: Any, ray: Any) -> Any:
    """Return a file's name, which each worker maps, or what Ray keeps once a machine."""
    if array is None or isinstance(array, str | os.PathLike):
        return None if array is None else os.path.abspath(array)
    return ray.put(np.asarray(array))


class _Worker:
    """An actor: the gallery, the map, and where parts go."""

    def __init__(self, old: str, new: str, transformation: Transformation, manifest: Manifest, side: Any) -> None:
        ray = import_extra("ray", "ray")
        torch.set_num_threads(1)
        store = open_store(old)
        rows, ids = (ray.get(one) if isinstance(one, ray.ObjectRef) else one for one in side)
        side_of = side_info_of(transformation, rows, ids, len(store))
        self.run = Migration(store, transformation, side_of, new, manifest, live=False)
        self.writer: Any = open_writer(new, store, manifest["width"])
        self.cursors, counts = (getattr(store, name)(manifest["batch_size"]) for name in ("cursors", "counts"))
        self.starts = np.cumsum([0, *counts])

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[int]]:
        counts = []
        for number in rows["number"].tolist():
            batch = next(iter(self.run.source.batches(self.run.manifest["batch_size"], self.cursors[number])))
            self.writer.write_part(number, self.run.mapped(batch, int(self.starts[number])))
            counts.append(len(batch.ids))
        return {"rows": counts}


def _some_of(run: Migration, cursors: list[Any], counts: list[int]) -> Sample:
    """Map a few batches here, to compare with what the workers wrote."""
    sample, size, starts = Sample(), run.manifest["batch_size"], np.cumsum([0, *counts])
    for number in np.random.default_rng(0).permutation(len(cursors))[:4].tolist():
        batch = next(iter(run.source.batches(size, cursors[number])))
        sample.add(run.mapped(batch, int(starts[number])))
    return sample
