"""A FAISS index file: flat, IVF with flat lists, HNSW, and any of these behind an IDMap; ids are kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..._extras import import_extra
from ..._files import whole_file
from .base import Batch, Manifest, Store, Writer
from .files import partial_path, remove, write_manifest
from .npy import rows_of

_TRAINED_ON = 256  # vectors a list, at most, that new lists are trained on


class FaissStore(Store):
    """See the module. The order is that of the index: list after list of an IVF index."""

    def __init__(self, address: str) -> None:
        self.faiss = import_extra("faiss", "faiss-cpu")
        self.address, self.path = address, Path(address)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no {address!r}")
        try:
            self.index = self.faiss.read_index(str(self.path), self.faiss.IO_FLAG_MMAP_IFC)
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"{address} must be a whole FAISS index, it is not: {str(error).strip()[-200:]}"
            ) from error
        self.inner = self.faiss.downcast_index(getattr(self.index, "index", self.index))
        if type(self.inner).__name__ not in (
            "IndexFlat",
            "IndexFlatL2",
            "IndexFlatIP",
            "IndexIVFFlat",
            "IndexHNSWFlat",
        ):
            raise ValueError(
                f"{address} must be a flat, IVF flat or HNSW flat index, which keep vectors as they are, got "
                f"{type(self.inner).__name__}; map the vectors that it was built from"
            )
        if not self.index.ntotal:
            raise ValueError(f"{address} must hold vectors, it is empty")
        self.width, self.dtype = self.index.d, np.dtype(np.float32)
        self.ids = self._ids()
        if isinstance(self.inner, self.faiss.IndexIVFFlat):
            self.notes = (f"The {self.inner.nlist} lists of the IVF index are trained anew on mapped vectors.",)

    def _ids(self) -> np.ndarray:
        if hasattr(self.index, "id_map"):
            return self.faiss.vector_to_array(self.index.id_map)
        if not isinstance(self.inner, self.faiss.IndexIVFFlat):
            return np.arange(self.index.ntotal)
        lists = self.inner.invlists
        sizes = [lists.list_size(number) for number in range(self.inner.nlist)]
        parts = [
            self.faiss.rev_swig_ptr(lists.get_ids(number), size).copy() for number, size in enumerate(sizes) if size
        ]
        self.inner.set_direct_map_type(self.faiss.DirectMap.Hashtable)
        return np.concatenate(parts)

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, size: int, cursor: Any = None) -> Iterator[Batch]:
        """Yield vectors in the order of the index; a cursor is a place."""
        for start in range(cursor or 0, len(self), size):
            stop = min(start + size, len(self))
            vectors = self._at(np.arange(start, stop))
            yield Batch(self.ids[start:stop], vectors, None, stop if stop < len(self) else None)

    def _at(self, places: np.ndarray) -> np.ndarray:
        own = self.ids[places] if isinstance(self.inner, self.faiss.IndexIVFFlat) else places
        if hasattr(self.index, "id_map") and isinstance(self.inner, self.faiss.IndexIVFFlat):
            own = places  # inside an IDMap, an IVF index numbers its vectors itself
        return self.inner.reconstruct_batch(own)

    def fetch(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors of some ids."""
        return self._at(rows_of(ids, self.ids, self.address))


class FaissWriter(Writer):
    """Keeps mapped vectors in a file, and builds an index of the old one's kind from it at the end."""

    def __init__(self, address: str, source: Store, width: int) -> None:
        self.faiss = import_extra("faiss", "faiss-cpu")
        self.path, self.source = Path(address), source
        self.work = partial_path(self.path)
        self.shape = len(source), width

    def keep(self, manifest: Manifest) -> None:
        """Write the manifest beside the file."""
        write_manifest(self.path, manifest)

    def commit(self, batch: Batch, manifest: Manifest) -> None:
        """Write the rows before ``manifest["done"]``, the id of each beside it."""
        if batch.ids.dtype.kind not in "iu":
            raise ValueError(f"ids of a FAISS index must be whole numbers, got {batch.ids[0].item()!r}")
        if not self.work.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.work) as empty:
                np.lib.format.open_memmap(empty, "w+", self._row(), self.shape[:1]).flush()
        rows = np.lib.format.open_memmap(self.work, "r+")
        part = rows[manifest["done"] - len(batch.ids) : manifest["done"]]
        part["id"], part["vector"] = batch.ids, batch.vectors
        rows.flush()
        self.keep(manifest)

    def _row(self) -> np.dtype:
        return np.dtype([("id", np.int64), ("vector", np.float32, self.shape[1])])

    def finish(self) -> None:
        """Build the index, and give it its name."""
        if self.work.exists():
            rows = np.load(self.work, mmap_mode="r")
            index = self._like(rows["vector"])
            for start in range(0, len(rows), 2**16):
                part = rows[start : start + 2**16]
                vectors, ids = np.ascontiguousarray(part["vector"]), np.ascontiguousarray(part["id"])
                if self._has_ids(index):
                    index.add_with_ids(vectors, ids)
                else:
                    index.add(vectors)
            with whole_file(self.path) as temporary:
                self.faiss.write_index(index, str(temporary))
            os.unlink(self.work)

    def _has_ids(self, index: Any) -> bool:
        return isinstance(index, self.faiss.IndexIDMap | self.faiss.IndexIVF)

    def _like(self, vectors: np.ndarray) -> Any:
        """Return an empty, trained index of the old one's kind, metric and settings."""
        width, source = self.shape[1], self.source
        inner = source.inner if isinstance(source, FaissStore) else None
        metric = self.faiss.METRIC_INNER_PRODUCT if inner is None else inner.metric_type
        if isinstance(inner, self.faiss.IndexIVFFlat):
            new = self.faiss.IndexIVFFlat(self.faiss.IndexFlat(width, metric), width, inner.nlist, metric)
            few = np.random.default_rng(0).permutation(len(vectors))[: inner.nlist * _TRAINED_ON]
            new.train(np.ascontiguousarray(vectors[np.sort(few)]))
            new.nprobe = inner.nprobe
        elif isinstance(inner, self.faiss.IndexHNSWFlat):
            new = self.faiss.IndexHNSWFlat(width, inner.hnsw.nb_neighbors(1), metric)
            new.hnsw.efConstruction, new.hnsw.efSearch = inner.hnsw.efConstruction, inner.hnsw.efSearch
        else:
            new = self.faiss.IndexFlat(width, metric)
        plain = inner is not None and not hasattr(source.index, "id_map")  # type: ignore[attr-defined]
        return new if plain else self.faiss.IndexIDMap2(new)

    def discard(self) -> None:
        """Remove the index, and what is unfinished."""
        remove(self.path)
