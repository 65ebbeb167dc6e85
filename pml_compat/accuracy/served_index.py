"""The index that is really served, in place of the exact search: what compression does to an upgrade."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_integer
from ..extras import import_extra


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
    Raises:
        ImportError: faiss is not installed.
        ValueError: another type of ``index``, ``nprobe`` below 1; in a search, an index that does not hold as many rows
            as the gallery, or of another width.
    Example:
        >>> from pml_compat.accuracy import CrossModelAccuracyCalculator
        >>> calculator = CrossModelAccuracyCalculator(("precision_at_1",), k=10, knn_func=ServedIndex("SQ8"))
    """

    def __init__(self, index: Any, *, nprobe: int | None = None, cosine: bool = False) -> None:
        self.faiss = import_extra("faiss", "faiss-cpu")
        if not isinstance(index, str | self.faiss.Index):
            raise ValueError(f"index must be a faiss factory string or a faiss index, got {type(index).__name__}")
        self.index, self.cosine = index, cosine
        self.nprobe = None if nprobe is None else check_integer(nprobe, "nprobe", minimum=1)
        self._filled: tuple[Any, torch.Tensor] | None = None

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
        distances, rows = index.search(query.float().cpu().contiguous().numpy(), k)
        return torch.from_numpy(distances), torch.from_numpy(rows)

    def _index(self, reference: torch.Tensor) -> Any:
        if not isinstance(self.index, str):
            self._set_nprobe(self.index)
            return self.index
        if self._filled is None or self._filled[1] is not reference:
            metric = self.faiss.METRIC_INNER_PRODUCT if self.cosine else self.faiss.METRIC_L2
            index = self.faiss.index_factory(reference.shape[1], self.index, metric)
            rows = reference.float().cpu().contiguous().numpy()
            index.train(rows)
            index.add(rows)
            self._set_nprobe(index)
            self._filled = index, reference  # holding it keeps its identity
        return self._filled[0]

    def _set_nprobe(self, index: Any) -> None:
        if self.nprobe is not None:
            self.faiss.ParameterSpace().set_index_parameter(index, "nprobe", self.nprobe)
