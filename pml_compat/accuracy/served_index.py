"""The index that is really served, in place of the exact search: what compression does to an upgrade."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .._checks import check_integer
from .._extras import import_extra


class ServedIndex:
    """Find neighbours by a faiss index: the ``knn_func`` of :class:`CrossModelAccuracyCalculator`.

    Where the service answers from an inverted file, product quantisation or int8 codes, its accuracy is not that of the
    exact search, and a new model's queries may suffer more from the compression than the old one's did. Metrics count
    what the index does not find as missed.

    Args:
        index: a faiss factory string, such as ``"IVF100,PQ16"``, ``"SQ8"`` or ``"HNSW32"``; the index is trained and
            filled with the gallery once. Or a faiss index that holds the gallery already, in the order of its rows.
        nprobe: cells of an inverted file that a query looks into.
        cosine: search by inner product, for rows of unit length; squared Euclidean distance otherwise. For a factory
            string; an index of your own has its own.
        ids: ``(N,)`` integers, the id that an index of your own has for each gallery row; by default the row itself.
    Raises:
        ImportError: faiss is not installed.
        ValueError: another type of ``index``, or a string that faiss does not know; ``nprobe`` below 1, or for an index
            without cells; an index with ids of its own without ``ids``; in a search, an index that does not hold as
            many rows as the gallery, or of another width, or ids that are not among ``ids``.
    Example:
        >>> from pml_compat.accuracy import CrossModelAccuracyCalculator
        >>> calculator = CrossModelAccuracyCalculator(("precision_at_1",), k=10, knn_func=ServedIndex("SQ8"))
    """

    def __init__(self, index: Any, *, nprobe: int | None = None, cosine: bool = False, ids: Any = None) -> None:
        self.faiss = import_extra("faiss", "faiss-cpu")
        if not isinstance(index, str | self.faiss.Index):
            raise ValueError(f"index must be a faiss factory string or a faiss index, got {type(index).__name__}")
        self.index, self.cosine = index, cosine
        self.nprobe = None if nprobe is None else check_integer(nprobe, "nprobe", minimum=1)
        self.ids = None if ids is None else np.asarray(ids)
        self._filled: tuple[Any, torch.Tensor, int] | None = None
        if isinstance(index, str):
            return
        self._set_nprobe(index)
        id_map = self._id_map(index)
        if self.ids is None and id_map is not None and not np.array_equal(id_map, np.arange(len(id_map))):
            raise ValueError(
                f"ids must be given for an index with ids of its own, as this {type(index).__name__}: ids[i] is the id "
                "of gallery row i"
            )

    def __call__(
        self, query: torch.Tensor, k: int, reference: torch.Tensor, ref_includes_query: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(q, k)`` distances and gallery rows, nearest first; -1 where the index found no more.

        Args:
            query: ``(q, D)``.
            k: neighbours a query.
            reference: ``(N, D)`` gallery.
            ref_includes_query: not used: what to leave out is the calculator's part.
        """
        index = self._index(reference)
        if index.ntotal != len(reference) or index.d != reference.shape[1]:
            raise ValueError(
                f"index must hold the gallery, {tuple(reference.shape)}, got one of {index.ntotal} rows, {index.d} wide"
            )
        distances, found = index.search(query.float().cpu().contiguous().numpy(), k)
        return torch.from_numpy(distances), torch.from_numpy(self._rows(found, len(reference)))

    def _index(self, reference: torch.Tensor) -> Any:
        if not isinstance(self.index, str):
            return self.index
        if self._filled is None or not _same_rows(self._filled[1], self._filled[2], reference):
            index = self._made(reference.shape[1])
            rows = reference.float().cpu().contiguous().numpy()
            index.train(rows)
            if self._id_map(index) is None:
                index.add(rows)
            else:
                index.add_with_ids(rows, np.arange(len(rows)))
            self._filled = index, reference, reference._version
        return self._filled[0]

    def _made(self, width: int) -> Any:
        metric = self.faiss.METRIC_INNER_PRODUCT if self.cosine else self.faiss.METRIC_L2
        try:
            index = self.faiss.index_factory(width, self.index, metric)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise ValueError(f"index must be a faiss factory string, got {self.index!r}: {reason}") from error
        self._set_nprobe(index)
        return index

    def _set_nprobe(self, index: Any) -> None:
        if self.nprobe is None:
            return
        try:
            self.faiss.ParameterSpace().set_index_parameter(index, "nprobe", self.nprobe)
        except RuntimeError as error:
            kind = self.index if isinstance(self.index, str) else type(index).__name__
            raise ValueError(f"nprobe must be None for an index without cells, got {self.nprobe} for {kind}") from error

    def _id_map(self, index: Any) -> np.ndarray | None:
        """Return the ids of an index that maps its places to ids."""
        inner = self.faiss.downcast_index(index)
        return self.faiss.vector_to_array(inner.id_map) if hasattr(inner, "id_map") else None

    def _rows(self, found: np.ndarray, n_rows: int) -> np.ndarray:
        """Return gallery rows in the place of the index's ids; -1 where it found nothing."""
        if self.ids is None:
            if found.max(initial=-1) >= n_rows:
                raise ValueError(
                    f"ids must be given for an index whose ids are not the gallery's rows 0 to {n_rows - 1}, it found "
                    f"{int(found.max())}; ids[i] is the id of row i"
                )
            return found
        if len(self.ids) != n_rows:
            raise ValueError(f"ids must have one entry a gallery row: expected {n_rows}, got {len(self.ids)}")
        order = np.argsort(self.ids, kind="stable")
        place = np.searchsorted(self.ids[order], found).clip(max=n_rows - 1)
        unknown = (self.ids[order][place] != found) & (found >= 0)
        if unknown.any():
            raise ValueError(f"ids must hold every id of the index, {int(found[unknown][0])} is missing")
        return np.where(found < 0, -1, order[place])


def _same_rows(known: torch.Tensor, version: int, rows: torch.Tensor) -> bool:
    """Tell whether these rows are those that the index holds; a view of the same memory is told without a look."""
    if known._version != version:  # changed in place since
        return False
    same_memory = (known.data_ptr(), known.stride()) == (rows.data_ptr(), rows.stride())
    if known.shape != rows.shape or known.dtype != rows.dtype or known.device != rows.device:
        return False
    return same_memory or torch.equal(known, rows)
