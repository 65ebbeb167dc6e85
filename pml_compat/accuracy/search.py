"""A search of a gallery: what is right for each query, what is left out of its ranking, and where its positives end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .._checks import as_tensor, check_rows
from .._rows import as_wide
from ..distributed import agreeing
from .first_positive import first_ranks
from .gallery import Gallery, joined
from .items import as_values, codes, item_codes, pair_of_codes
from .junk import Junk
from .matches import Compared, EqualCodes, Matches, SamePosition, mask
from .named_metrics import depth, needs_first_positive_alone, places, score
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
    knn_func: Callable[..., Any] | None
    gallery_group: Any

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield the numbers of some queries after the other."""
        for rows in query_chunks(len(self.query), len(self.reference_labels)):
            yield torch.arange(rows.start, rows.stop, device=self.query.device)

    def count_positives(self) -> torch.Tensor:
        """Count each query's positives that are in its ranking."""
        size = len(self.reference_labels)
        chunks = ((mask([self.positives], part, size), mask(self.excluded, part, size)) for part in self.chunks())
        return torch.cat([(positive & ~out).sum(1) for positive, out in chunks])

    def ranks(
        self, depth: int | None, cuts: Collection[int] = (), *, first: bool = False
    ) -> Iterator[tuple[torch.Tensor, PositiveRanks]]:
        """Yield some queries after the other, and the places of their positives.

        Args:
            depth: the places that the caller looks at; None, all.
            cuts: the places at which it cuts rankings off.
            first: the place of the nearest positive is enough.
        """
        if self.knn_func is None:
            gallery = Gallery(self.reference, self.gallery_group)
            if first:
                yield from first_ranks(self.query, gallery, self.positives, self.excluded, nearest_only=depth == 1)
            else:
                yield from exact_ranks(self.query, gallery, self.positives, self.excluded, tuple(cuts))
            return
        for numbers, _, indices, kept, out in self._found(depth):
            relevant = mask([self.positives], numbers, len(self.reference))
            yield numbers, listed_ranks(indices, kept, relevant, out)

    def scores(self, names: Collection[str], k: int | None) -> dict[str, torch.Tensor]:
        """Return one number a query and ranking metric, and ``relevant``, each query's positives."""
        ranks = self.ranks(depth(names, k), places(names, k), first=needs_first_positive_alone(names))
        return score(ranks, names, k, len(self.query))

    def neighbors(self, k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the squared distances and the rows of each query's nearest items, at most k and what every query has.

        With a ``knn_func`` the distances are what it returns.
        """
        size = len(self.reference)
        left = min(size - int(mask(self.excluded, part, size).sum(1).max()) for part in self.chunks())
        k = left if k is None else min(k, left)
        if self.knn_func is None:
            parts = list(nearest(self.query, self.reference, self.excluded, k))
            return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        chosen = []
        for _, distances, indices, kept, _ in self._found(k):
            if int(kept.sum(1).min()) < k:
                raise ValueError(f"knn_func must find at least {k} gallery items a query, got {int(kept.sum(1).min())}")
            places = torch.argsort(~kept, dim=1, stable=True)[:, :k]
            chosen.append((distances.gather(1, places), indices.gather(1, places)))
        return torch.cat([part[0] for part in chosen]), torch.cat([part[1] for part in chosen])

    def _found(self, k: int | None) -> Iterator[tuple[torch.Tensor, ...]]:
        """Ask ``knn_func`` for k items, and as many more as are left out of any of these queries' rankings.

        Yields the queries, the ``(q, k')`` distances and gallery rows found, which of them count, and the ``(q, N)``
        exclusions.
        """
        assert self.knn_func is not None
        query, reference = self.query.float(), self.reference.float()
        for numbers in self.chunks():
            out = mask(self.excluded, numbers, len(reference))
            size = len(reference) if k is None else min(k + int(out.sum(1).max()), len(reference))
            distances, indices = self.knn_func(query[numbers], size, reference, False)
            indices = indices.to(query.device)
            found = indices >= 0  # faiss fills up with -1
            indices = indices.clamp_min(0)
            distances = torch.full(indices.shape, torch.nan) if distances is None else distances
            yield numbers, distances.to(query.device), indices, found & ~out.gather(1, indices), out


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
    junk: Any = None,
    *,
    device: torch.device,
    label_comparison_fn: Callable[..., Any],
    knn_func: Callable[..., Any] | None,
    gallery_group: Any,
    fit_width: bool,
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
    equal = label_comparison_fn is torch.eq
    with agreeing(gallery_group, "gallery_group"):  # or one process would wait for another that has stopped
        query = check_rows(query, "query").detach().to(device)
        reference = check_rows(reference, "reference").detach().to(device)
        query = as_wide(query, reference, fit_width)
        query_labels = _labels(query_labels, "query_labels", len(query), equal)
        reference_labels = _labels(reference_labels, "reference_labels", len(reference), equal)
    if gallery_group is not None:
        reference_labels, reference_ids, reference_cameras = (
            joined(part, gallery_group) for part in (reference_labels, reference_ids, reference_cameras)
        )
    sizes = len(query), len(reference_labels)
    label_codes = None
    if equal:
        label_codes = codes(query_labels, reference_labels, ("query_labels", "reference_labels"), sizes)
        query_labels, reference_labels = _as_tensors(query_labels, reference_labels, label_codes)
    items = item_codes(label_codes, ref_includes_query, query_ids, reference_ids, sizes)
    cameras = pair_of_codes(query_cameras, reference_cameras, "cameras", sizes)
    query_labels, reference_labels = query_labels.to(device), reference_labels.to(device)

    positives = _positives(label_codes, query_labels, reference_labels, label_comparison_fn)
    excluded: list[Matches] = []
    if ref_includes_query:
        excluded.append(SamePosition())
    elif items is not None:
        excluded.append(EqualCodes(items[0].to(device), items[1].to(device)))
    if cameras is not None:
        excluded.append(_same_label_and_camera(positives, cameras[0].to(device), cameras[1].to(device)))
    if junk is not None:
        excluded.append(Junk(junk, sizes, device))
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


def _labels(labels: Any, name: str, length: int, equal: bool) -> Any:
    """Return labels as an array of their own type; as a tensor for a function of the user's own."""
    values = as_values(labels, name) if equal else as_tensor(labels, name)
    if values.ndim == 0 or len(values) != length:
        got = len(values) if values.ndim else "a single number"
        raise ValueError(f"{name} must have one entry an embedding: expected {length}, got {got}")
    if values.ndim != 1 and equal:
        raise ValueError(f"{name} must be 1-dimensional without a label_comparison_fn, got {tuple(values.shape)}")
    return values


def _as_tensors(
    query: np.ndarray, reference: np.ndarray, label_codes: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels as tensors that PML's functions and a subclass's can compare: as given, or else their codes."""
    plain = query.dtype == reference.dtype and (query.dtype.kind in "bif" or query.dtype == np.uint8)
    if not plain or any(bool((side < 0).any()) for side in label_codes):
        return label_codes
    return as_tensor(query, "query_labels"), as_tensor(reference, "reference_labels")


def _positives(
    label_codes: tuple[torch.Tensor, torch.Tensor] | None,
    query_labels: torch.Tensor,
    reference_labels: torch.Tensor,
    label_comparison_fn: Callable[..., torch.Tensor],
) -> Matches:
    if label_codes is not None:
        return EqualCodes(label_codes[0].to(query_labels.device), label_codes[1].to(query_labels.device))

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
