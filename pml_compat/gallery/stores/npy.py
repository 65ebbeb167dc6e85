"""An ``.npy`` file of vectors, and ``name.ids.npy`` beside it where items have ids."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..._files import whole_file
from .base import Batch, Manifest, Store, Writer
from .files import partial_path, remove, write_manifest


class NpyStore(Store):
    """See the module."""

    def __init__(self, address: str) -> None:
        self.address, self.path = address, Path(address)
        self.vectors = open_array(self.path)
        if self.vectors.ndim != 2 or self.vectors.dtype.kind != "f" or 0 in self.vectors.shape:
            raise ValueError(
                f"{address} must hold vectors, (N, D) of floating point, got {self.vectors.shape} of "
                f"{self.vectors.dtype}"
            )
        self.ids = None
        if ids_path(self.path).exists():
            self.ids = open_array(ids_path(self.path))
            if self.ids.shape != (len(self.vectors),):
                raise ValueError(
                    f"{ids_path(self.path)} must have one id a vector: expected ({len(self.vectors)},), got "
                    f"{self.ids.shape}"
                )
        self.width, self.dtype = self.vectors.shape[1], self.vectors.dtype.newbyteorder("=")

    def __len__(self) -> int:
        return len(self.vectors)

    def batches(self, size: int, cursor: Any = None) -> Iterator[Batch]:
        """Yield rows after rows; a cursor is a row."""
        for start in range(cursor or 0, len(self), size):
            stop = min(start + size, len(self))
            ids = np.arange(start, stop) if self.ids is None else np.asarray(self.ids[start:stop])
            yield Batch(ids, np.asarray(self.vectors[start:stop], self.dtype), None, stop if stop < len(self) else None)

    def fetch(self, ids: np.ndarray) -> np.ndarray:
        """Return vectors; without ids their rows' numbers are meant."""
        rows = ids if self.ids is None else rows_of(ids, np.asarray(self.ids), self.address)
        return np.asarray(self.vectors[rows], self.dtype)


class NpyWriter(Writer):
    """Fills a map of the whole file, which then takes its name."""

    def __init__(self, address: str, source: Store, width: int) -> None:
        self.path = Path(address)
        self.work = partial_path(self.path)
        self.id_parts = self.work.with_name(f"{self.work.name}.ids")
        self.shape, self.dtype = (len(source), width), source.dtype
        self.known: tuple[np.ndarray, np.ndarray] | None = None  # ids of the finished file, and their order

    def keep(self, manifest: Manifest) -> None:
        """Write the manifest beside the file."""
        write_manifest(self.path, manifest)

    def commit(self, batch: Batch, manifest: Manifest) -> None:
        """Write the rows before ``manifest["done"]``."""
        if not self.work.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.work) as empty:
                np.lib.format.open_memmap(empty, "w+", self.dtype, self.shape).flush()
        rows = np.lib.format.open_memmap(self.work, "r+")
        done = manifest["done"]
        rows[done - len(batch.vectors) : done] = batch.vectors
        rows.flush()
        self.id_parts.mkdir(exist_ok=True)
        with whole_file(self.id_parts / f"{manifest['batches'] - 1:06d}.npy") as part:
            np.save(part, batch.ids)
        self.keep(manifest)

    def replace(self, ids: np.ndarray, vectors: np.ndarray, manifest: Manifest) -> None:
        """Write other vectors for some items of the finished file, then the manifest."""
        rows = np.lib.format.open_memmap(self.path, "r+")
        if self.known is None:
            own = open_array(ids_path(self.path)) if ids_path(self.path).exists() else np.arange(len(rows))
            self.known = np.asarray(own), np.argsort(own, kind="stable")
        rows[rows_of(ids, self.known[0], str(self.path), self.known[1])] = vectors
        rows.flush()
        self.keep(manifest)

    def finish(self) -> None:
        """Join the ids, unless they are the rows' numbers, and give the file its name."""
        if self.work.exists():
            ids = np.concatenate([np.load(part) for part in sorted(self.id_parts.glob("[0-9]*.npy"))])
            if not np.array_equal(ids, np.arange(len(ids))):
                with whole_file(ids_path(self.path)) as temporary:
                    np.save(temporary, ids)
            os.replace(self.work, self.path)
        shutil.rmtree(self.id_parts, ignore_errors=True)

    def discard(self) -> None:
        """Remove the file, its ids and what is unfinished."""
        ids_path(self.path).unlink(missing_ok=True)
        shutil.rmtree(self.id_parts, ignore_errors=True)
        remove(self.path)


def ids_path(path: Path) -> Path:
    """Return where the ids of an ``.npy`` file are."""
    return path.with_name(f"{path.stem}.ids.npy")


def open_array(path: Path) -> np.ndarray:
    """Map an array, read-only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut short, or no array.
    """
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {str(path)!r}") from None
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} must be a whole .npy file of numbers, it is not: {error}") from error
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{path} must be an .npy file, it is an archive of several arrays")
    return found


def rows_of(ids: np.ndarray, known: np.ndarray, address: str, order: np.ndarray | None = None) -> np.ndarray:
    """Return the place of each id among those that are known; ``order`` sorts these, where many calls ask."""
    order = np.argsort(known, kind="stable") if order is None else order
    places = np.searchsorted(known, ids, sorter=order).clip(max=len(known) - 1)
    rows = order[places]
    missing = known[rows] != ids
    if missing.any():
        raise ValueError(
            f"{address} must hold the ids that are asked for, it lacks {ids[int(missing.argmax())].item()!r}"
        )
    return rows
