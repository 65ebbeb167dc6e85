"""A FAISS index file: flat, IVF, HNSW, with scalar (SQ) or product (PQ) quantisers or without, and behind an IDMap.

``name.faiss#IVF1024,PQ32`` has a new index of the kind that ``faiss.index_factory`` knows by this name; without it the
new index is of the old one's kind. Its lists and codes are trained on the mapped vectors.
"""

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
from .overlay import Overlay

_TRAINED_ON = 256  # vectors a list or a code, at most, that new ones are trained on
_AT_ONCE = 2**16  # vectors added at once
_QUANTISERS = {"QT_8bit": "SQ8", "QT_6bit": "SQ6", "QT_4bit": "SQ4", "QT_fp16": "SQfp16", "QT_bf16": "SQbf16"}


class FaissStore(Store):
    """See the module. The order is that of the index: list after list of an IVF index."""

    def __init__(self, address: str) -> None:
        self.faiss = import_extra("faiss", "faiss-cpu")
        self.address, self.path = address, Path(address.partition("#")[0])
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no {str(self.path)!r}")
        try:
            self.index = self.faiss.read_index(str(self.path), self.faiss.IO_FLAG_MMAP_IFC)
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"{address} must be a whole FAISS index, it is not: {str(error).strip()[-200:]}"
            ) from error
        has_map = isinstance(self.index, self.faiss.IndexIDMap)
        self.inner = self.faiss.downcast_index(self.index.index if has_map else self.index)
        self.factory = _factory(self.faiss, self.inner)
        if self.factory is None:
            raise ValueError(
                f"{address} must be a flat, IVF or HNSW index, with scalar or product quantisers or without, got "
                f"{type(self.inner).__name__}; map the vectors that it was built from"
            )
        if not self.index.ntotal:
            raise ValueError(f"{address} must hold vectors, it is empty")
        self.width, self.dtype = self.index.d, np.dtype(np.float32)
        self.is_ivf = isinstance(self.inner, self.faiss.IndexIVF)
        self.ids = self._ids()
        codes = self.factory.rpartition(",")[2]
        if self.is_ivf:
            self.notes += (f"The {self.inner.nlist} lists of the IVF index are trained anew on mapped vectors.",)
        if codes.startswith(("SQ", "PQ")):
            self.notes += (
                f"The index keeps {codes} codes: what is mapped is what they give back, where the vectors that it was "
                "built from map better. New codes are trained on mapped vectors.",
            )

    def _ids(self) -> np.ndarray:
        if hasattr(self.index, "id_map"):
            if self.is_ivf:
                self.inner.make_direct_map()
            return self.faiss.vector_to_array(self.index.id_map)
        if not self.is_ivf:
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
        # Inside an IDMap an IVF index numbers its vectors itself.
        own = self.ids[places] if self.is_ivf and not hasattr(self.index, "id_map") else places
        return self.inner.reconstruct_batch(own)

    def fetch(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors of some ids."""
        return self._at(rows_of(ids, self.ids, self.address))

    def as_stored(self, vectors: np.ndarray) -> np.ndarray:
        """Return vectors as the codes give them back."""
        codec = self.faiss.downcast_index(getattr(self.inner, "storage", self.inner))
        return codec.sa_decode(codec.sa_encode(np.ascontiguousarray(vectors, np.float32)))


class FaissWriter(Writer):
    """Keeps mapped vectors in a file, and builds an index from it at the end."""

    written_whole = True

    def __init__(self, address: str, source: Store, width: int) -> None:
        self.faiss = import_extra("faiss", "faiss-cpu")
        place, _, factory = address.partition("#")
        self.path, self.source, self.shape = Path(place), source, (len(source), width)
        self.work = partial_path(self.path)
        inner = source.inner if isinstance(source, FaissStore) else None
        self.metric = self.faiss.METRIC_INNER_PRODUCT if inner is None else inner.metric_type
        self.factory = factory or (source.factory if isinstance(source, FaissStore) else None) or "Flat"
        self.has_map = inner is None or hasattr(source.index, "id_map")  # type: ignore[attr-defined]
        self.has_map &= inner is not None or not self.factory.startswith("IVF")  # which keeps ids itself
        try:
            made = self.faiss.index_factory(width, self.factory, self.metric)
            why = "" if _factory(self.faiss, made) else "it is of a kind that cannot be read"
        except (RuntimeError, AssertionError) as error:
            why = str(error).strip()[-200:]
        if why:
            raise ValueError(
                f"{address} must be a flat, IVF or HNSW index, with SQ or PQ codes or without, that FAISS can make of "
                f"vectors {width} wide; {self.factory!r} is not: {why}"
            )

    def keep(self, manifest: Manifest) -> None:
        """Write the manifest beside the file."""
        write_manifest(self.path, manifest)

    def commit(self, batch: Batch, manifest: Manifest) -> None:
        """Write the rows before ``manifest["done"]``, the id of each beside it."""
        if batch.ids.dtype.kind not in "iu":
            raise ValueError(f"ids of a FAISS index must be whole numbers, got {batch.ids[0].item()!r}")
        self._put(manifest["done"] - len(batch.ids), batch.ids, batch.vectors)
        self.keep(manifest)

    def _put(self, start: int, ids: np.ndarray, vectors: np.ndarray) -> None:
        if not self.work.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            row = np.dtype([("id", np.int64), ("vector", np.float32, self.shape[1])])
            with whole_file(self.work) as empty:
                np.lib.format.open_memmap(empty, "w+", row, self.shape[:1]).flush()
        rows = np.lib.format.open_memmap(self.work, "r+")
        part = rows[start : start + len(ids)]
        part["id"], part["vector"] = ids, vectors
        rows.flush()

    def replace(self, ids: np.ndarray, vectors: np.ndarray, manifest: Manifest) -> None:
        """Build the index anew, its lists and codes trained on what it then holds, and keep the manifest."""
        store, overlay, start = FaissStore(str(self.path)), Overlay(ids, vectors), 0
        for batch in store.batches(_AT_ONCE):
            self._put(start, batch.ids, overlay.on(batch))
            start += len(batch.ids)
        overlay.check_all_found(str(self.path))
        self.finish()
        self.keep(manifest)

    def finish(self) -> None:
        """Build the index, and give it its name."""
        if not self.work.exists():
            return
        rows = np.load(self.work, mmap_mode="r")
        index = self._trained(rows["vector"])
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            vectors, ids = np.ascontiguousarray(part["vector"]), np.ascontiguousarray(part["id"])
            if isinstance(index, self.faiss.IndexIDMap | self.faiss.IndexIVF):
                index.add_with_ids(vectors, ids)
            else:
                index.add(vectors)
        with whole_file(self.path) as temporary:
            self.faiss.write_index(index, str(temporary))
        os.unlink(self.work)

    def _trained(self, vectors: np.ndarray) -> Any:
        """Return an empty index, with the old one's settings where it is of its kind."""
        new = self.faiss.index_factory(self.shape[1], self.factory, self.metric)
        codes = 2 ** getattr(getattr(new, "pq", None), "nbits", 8)
        few = np.random.default_rng(0).permutation(len(vectors))[: max(getattr(new, "nlist", 1), codes) * _TRAINED_ON]
        if not new.is_trained:
            new.train(np.ascontiguousarray(vectors[np.sort(few)]))
        inner = getattr(self.source, "inner", None)
        for name in ("nprobe", "hnsw.efConstruction", "hnsw.efSearch"):
            owner, _, setting = name.rpartition(".")
            old, own = (getattr(one, owner, None) if owner else one for one in (inner, new))
            if hasattr(old, setting) and hasattr(own, setting):
                setattr(own, setting, getattr(old, setting))
        return self.faiss.IndexIDMap2(new) if self.has_map else new

    def discard(self) -> None:
        """Remove the index, and what is unfinished."""
        remove(self.path)


def _factory(faiss: Any, index: Any) -> str | None:
    """Return the name by which ``faiss.index_factory`` makes such an index; None for one that is not carried over."""
    name = type(index).__name__
    if hasattr(index, "sq"):
        kinds = {getattr(faiss.ScalarQuantizer, kind): known for kind, known in _QUANTISERS.items()}
        codes = kinds.get(index.sq.qtype)
    elif name in ("IndexPQ", "IndexIVFPQ"):
        codes = f"PQ{index.pq.M}x{index.pq.nbits}"
    else:
        codes = "Flat" if name in ("IndexFlat", "IndexFlatL2", "IndexFlatIP", "IndexIVFFlat", "IndexHNSWFlat") else None
    if codes is None:
        return None
    if isinstance(index, faiss.IndexHNSW):
        return f"HNSW{index.hnsw.nb_neighbors(1)},{codes}"
    return f"IVF{index.nlist},{codes}" if isinstance(index, faiss.IndexIVF) else codes
