"""A search of a gallery: what is right for each query, what is left out of its ranking, and where its positives end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.utils import common_functions as c_f

from ..checks import as_tensor, check_embeddings
from ..width import fit_width
from .gallery import Gallery, agreeing, joined
from .matches import Compared, EqualCodes, Matches, SamePosition, mask
from .ranking import PositiveRanks, exact_ranks, listed_ranks, nearest, query_chunks


@dataclass(frozen=True)
class Search:
    """Queries and a gallery, checked and on one device; what is right for each query, and what is left out.

    With ``gallery_group`` the reference is this process's part of the gallery, and the labels are all of them.
    Where there is a ``knn_func``, neighbours are what it finds, in place of the exact ones.
    """

    query: torch.Tensor
    reference: torch.Tensor
    query_labels: torch.Tensor
    reference_labels: torch.Tensor
    ref_includes_query: bool
    positives: Matches
    excluded: list[Matches]
    knn_func: Callable | None
    gallery_group: Any

    @property
    def narrow(self) -> torch.Tensor:
        """The queries, as wide as the gallery."""
        return fit_width(self.query, self.reference.shape[1])

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield the numbers of some queries after the other."""
        for rows in query_chunks(len(self.query), len(self.reference_labels)):
            yield torch.arange(rows.start, rows.stop, device=self.query.device)

    def count_positives(self) -> torch.Tensor:
        """Count each query's positives that are in its ranking."""
        size = len(self.reference_labels)
        chunks = ((mask([self.positives], part, size), mask(self.excluded, part, size)) for part in self.chunks())
        return torch.cat([(positive & ~out).sum(1) for positive, out in chunks])

    def ranks(self, k: int | None) -> Iterator[tuple[torch.Tensor, PositiveRanks]]:
        """Yield some queries after the other, and the places of their positives among the first k, or in all."""
        if self.knn_func is None:
            gallery = Gallery(self.reference, self.gallery_group)
            yield from exact_ranks(self.narrow, gallery, self.positives, self.excluded, k)
            return
        at_least = None if k is None else max(k, 10)  # cmc_top_10 looks at ten, whatever k is
        for numbers, indices, kept, out in self._found(at_least):
            relevant = mask([self.positives], numbers, len(self.reference))
            yield numbers, listed_ranks(indices, kept, relevant, out)

    def neighbors(self, k: int | None) -> torch.Tensor:
        """Return the nearest gallery rows of each query, as many as every query has, at most k."""
        size = len(self.reference)
        left = min(size - int(mask(self.excluded, part, size).sum(1).max()) for part in self.chunks())
        k = left if k is None else min(k, left)
        if self.knn_func is None:
            return torch.cat(list(nearest(self.narrow, self.reference, self.excluded, k)))
        chosen = []
        for _, indices, kept, _ in self._found(k):
            if int(kept.sum(1).min()) < k:
                raise ValueError(f"knn_func must find at least {k} gallery items a query, got {int(kept.sum(1).min())}")
            chosen.append(indices.gather(1, torch.argsort(~kept, dim=1, stable=True)[:, :k]))
        return torch.cat(chosen)

    def _found(self, k: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Ask ``knn_func`` for k items, and as many more as are left out of any of these queries' rankings.

        Yields the queries, the ``(q, k')`` gallery rows found, which of them count, and the ``(q, N)`` exclusions.
        """
        assert self.knn_func is not None
        query, reference = self.narrow.float(), self.reference.float()
        for numbers in self.chunks():
            out = mask(self.excluded, numbers, len(reference))
            size = len(reference) if k is None else min(k + int(out.sum(1).max()), len(reference))
            _, indices = self.knn_func(query[numbers], size, reference, False)
            indices = indices.to(query.device)
            found = indices >= 0  # faiss fills up with -1
            indices = indices.clamp_min(0)
            yield numbers, indices, found & ~out.gather(1, indices), out


def prepare_search(
    query: Any,
    query_labels: Any,
    reference: Any,
    reference_labels: Any,
    ref_includes_query: bool,
    query_ids: Any,
    reference_ids: Any,
    query_cameras: Any,
    reference_cameras: Any,
    *,
    device: torch.device,
    label_comparison_fn: Callable,
    knn_func: Callable | None,
    gallery_group: Any,
) -> Search:
    """Check what comes in, and say which gallery items are right and which are left out."""
    if reference is None:
        if gallery_group is not None:
            raise ValueError("reference must be given with gallery_group: this process's part of the gallery")
        if reference_labels is not None or reference_ids is not None or reference_cameras is not None:
            raise ValueError("reference must be given with reference_labels, reference_ids or reference_cameras")
        reference, reference_labels = query, query_labels
        reference_ids, reference_cameras = query_ids, query_cameras
        ref_includes_query = query_ids is None
    with agreeing(gallery_group):  # or one process would wait for another that has stopped
        query = check_embeddings(query, "query").detach().to(device)
        reference = check_embeddings(reference, "reference").detach().to(device)
        one_number = label_comparison_fn is torch.eq
        query_labels = _labels(query_labels, "query_labels", len(query), one_number).to(device)
        reference_labels = _labels(reference_labels, "reference_labels", len(reference), one_number).to(device)
    if gallery_group is not None:
        reference_labels, reference_ids, reference_cameras = (
            joined(part, gallery_group) for part in (reference_labels, reference_ids, reference_cameras)
        )
        reference_labels = reference_labels.to(device)
    n_reference = len(reference_labels)
    if ref_includes_query:
        _check_same_items(query_labels, reference_labels, query_ids)
    ids = _codes(query_ids, reference_ids, "ids", len(query), n_reference, device)
    cameras = _codes(query_cameras, reference_cameras, "cameras", len(query), n_reference, device)

    positives = _positives(query_labels, reference_labels, label_comparison_fn)
    excluded: list[Matches] = []
    if ref_includes_query:
        excluded.append(SamePosition())
    if ids is not None:
        excluded.append(EqualCodes(*ids))
    if cameras is not None:
        excluded.append(_same_label_and_camera(positives, *cameras))
    return Search(
        query,
        reference,
        query_labels,
        reference_labels,
        ref_includes_query,
        positives,
        excluded,
        knn_func,
        gallery_group,
    )


def _labels(labels: Any, name: str, length: int, one_number: bool) -> torch.Tensor:
    if labels is None:
        raise ValueError(f"{name} must be given, got None")
    labels = as_tensor(labels, name)
    if labels.ndim == 0 or len(labels) != length:
        got = len(labels) if labels.ndim else "a single number"
        raise ValueError(f"{name} must have one entry an embedding: expected {length}, got {got}")
    if labels.ndim != 1 and one_number:
        raise ValueError(f"{name} must be 1-dimensional without a label_comparison_fn, got {tuple(labels.shape)}")
    return labels


def _check_same_items(query_labels: torch.Tensor, reference_labels: torch.Tensor, query_ids: Any) -> None:
    if query_ids is not None:
        raise ValueError("ref_includes_query must be False where query_ids tell which items are the same")
    if len(reference_labels) < len(query_labels):
        raise ValueError(
            "reference must hold every query with ref_includes_query=True, got "
            f"{len(reference_labels)} rows for {len(query_labels)} queries"
        )
    if not torch.equal(query_labels, reference_labels[: len(query_labels)]):
        raise ValueError(
            "reference_labels must begin with query_labels with ref_includes_query=True, as row i is the same item "
            "in both; where the order differs, pass query_ids and reference_ids"
        )


def _positives(
    query_labels: torch.Tensor, reference_labels: torch.Tensor, label_comparison_fn: Callable[..., torch.Tensor]
) -> Matches:
    if label_comparison_fn is torch.eq and query_labels.ndim == 1:
        dtype = torch.promote_types(query_labels.dtype, reference_labels.dtype)
        return EqualCodes(query_labels.to(dtype), reference_labels.to(dtype))

    def match(queries: torch.Tensor) -> torch.Tensor:
        own = query_labels[queries, None]
        return label_comparison_fn(own, reference_labels.expand(len(own), *reference_labels.shape))

    return Compared(match)


def _same_label_and_camera(positives: Matches, query_cameras: torch.Tensor, reference_cameras: torch.Tensor) -> Matches:
    class LabelAndCamera(Matches):
        def lists(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            index, valid = positives.lists(queries)
            return index, valid & (query_cameras[queries, None] == reference_cameras[index])

    return LabelAndCamera()


def _codes(
    query: Any, reference: Any, name: str, n_query: int, n_reference: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Number the distinct values of a pair of ``(Q,)`` and ``(N,)`` arguments, whatever their type."""
    if query is None and reference is None:
        return None
    if query is None or reference is None:
        missing, given = ("query", "reference") if query is None else ("reference", "query")
        raise ValueError(f"{missing}_{name} must be given with {given}_{name}, got None")
    values = [c_f.to_numpy(side) for side in (query, reference)]
    for side, value, length in zip(("query", "reference"), values, (n_query, n_reference), strict=True):
        if np.shape(value) != (length,):
            raise ValueError(f"{side}_{name} must have shape ({length},), got {np.shape(value)}")
    if {np.asarray(value).dtype.kind for value in values} == {"i", "u"}:  # their common type would be a float
        values = [np.asarray(value).astype(object) for value in values]
    codes = torch.from_numpy(np.unique(np.concatenate(values), return_inverse=True)[1]).to(device)
    return codes[:n_query], codes[n_query:]
