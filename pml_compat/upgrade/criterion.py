"""The formal criterion of backward compatibility, counted pair by pair."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .._checks import check_rows
from .._rows import as_wide
from ..accuracy.items import codes, item_codes

_BLOCK_ROWS = 2**10  # of queries and of the gallery at once: 8 MiB of differences, and a few copies and masks


@dataclass(frozen=True)
class PairCriterion:
    """How many pairs fulfil the criterion.

    Args:
        same_label: share of the pairs of one label that are no further apart than before; NaN where there are none.
        different_label: share of the pairs of two labels that are no closer than before; NaN where there are none.
        n_same_label: how many pairs of one label there are.
        n_different_label: how many pairs of two labels there are.
    """

    same_label: float
    different_label: float
    n_same_label: int
    n_different_label: int

    @property
    def all_pairs(self) -> float:
        """Share of all pairs; most are pairs of two labels."""
        shares = (self.same_label, self.n_same_label), (self.different_label, self.n_different_label)
        return sum(share * n for share, n in shares if n) / (self.n_same_label + self.n_different_label)


def pair_criterion(
    old_query: Any,
    new_query: Any,
    query_labels: Any,
    old_gallery: Any = None,
    gallery_labels: Any = None,
    *,
    ref_includes_query: bool = False,
    query_ids: Any = None,
    reference_ids: Any = None,
    fit_width: bool = False,
) -> PairCriterion:
    r"""Count the pairs of a query i and an old gallery item j that the new model puts no worse than the old one.

    .. math::
        y_i = y_j &\Rightarrow d(n_i, o_j) \le d(o_i, o_j) \\
        y_i \ne y_j &\Rightarrow d(n_i, o_j) \ge d(o_i, o_j)

    No trained model fulfils it for every pair; the shares tell whether new queries come closer to what they should
    find, or only move away from everything. d is Euclidean on the embeddings as given; normalise all three for
    cosine. Distances that differ by no more than rounding are equal. Time grows with queries times gallery, memory
    does not.

    Args:
        old_query: ``(Q, D_old)``, the queries as the old model embeds them.
        new_query: ``(Q, D_new)``, the same items in the same order as the new model embeds them.
        query_labels: ``(Q,)``; an unknown one (NaN, None) is another than all.
        old_gallery: ``(N, D_old)``; by default ``old_query``, each item without the pair with itself.
        gallery_labels: ``(N,)``, with ``old_gallery``.
        ref_includes_query: row i of ``old_gallery`` is the item of row i of the queries, and not a pair with it.
        query_ids: ``(Q,)`` item ids, which say the same for galleries in any order.
        reference_ids: ``(N,)``, with ``query_ids``.
        fit_width: fit a new model of another width to the old one by :func:`pml_compat.fit_width`.
    Raises:
        ValueError: NaN, infinite or empty embeddings; rows or widths that differ; one of a pair of arguments alone;
            ids beside ``ref_includes_query``; no pair left.
    Example:
        >>> old, new = torch.tensor([[0.0], [3.0], [9.0]]), torch.tensor([[1.0], [2.0], [9.0]])
        >>> pair_criterion(old, new, torch.tensor([0, 0, 1]))
        PairCriterion(same_label=1.0, different_label=0.75, n_same_label=2, n_different_label=4)

    Reference:
        Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020, the definition of
        compatibility; as a share of pairs it is ours.
    """
    if old_gallery is None:
        if gallery_labels is not None or reference_ids is not None:
            raise ValueError("old_gallery must be given with gallery_labels or reference_ids, got None")
        old_gallery, gallery_labels, reference_ids = old_query, query_labels, query_ids
        ref_includes_query = query_ids is None
    gallery = check_rows(old_gallery, "old_gallery").detach()
    old = check_rows(old_query, "old_query", gallery.shape[1]).detach().to(gallery.device)
    new = check_rows(new_query, "new_query").detach().to(gallery.device)
    if len(new) != len(old):
        raise ValueError(f"new_query must have the items of old_query: expected {len(old)} rows, got {len(new)}")
    new = as_wide(new, gallery, fit_width, ("new_query", "old_gallery"))
    sizes = len(old), len(gallery)
    own_labels, item_labels = codes(query_labels, gallery_labels, ("query_labels", "gallery_labels"), sizes)
    items = item_codes((own_labels, item_labels), ref_includes_query, query_ids, reference_ids, sizes)
    own_labels, item_labels = own_labels.to(gallery.device), item_labels.to(gallery.device)

    counts = torch.zeros(2, 2, dtype=torch.int64, device=gallery.device)  # same or different label, pairs and fulfilled
    for rows, columns, worse, rounding in _distance_changes(old, new, gallery):
        same = own_labels[rows, None] == item_labels[columns]
        kinds = [same, ~same]
        if items is not None:
            other = (items[0][rows, None] != items[1][columns]).to(gallery.device)
            kinds = [kind & other for kind in kinds]
        fulfilled = worse <= rounding, worse >= -rounding
        for row, (kind, good) in enumerate(zip(kinds, fulfilled, strict=True)):
            counts[row] += torch.stack([kind.sum(), (kind & good).sum()])
    (n_same, good_same), (n_different, good_different) = counts.tolist()
    if not n_same + n_different:
        raise ValueError("old_gallery must hold an item besides the queries' own, got none")
    return PairCriterion(
        same_label=good_same / n_same if n_same else math.nan,
        different_label=good_different / n_different if n_different else math.nan,
        n_same_label=n_same,
        n_different_label=n_different,
    )


def _distance_changes(
    old: torch.Tensor, new: torch.Tensor, gallery: torch.Tensor
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    r"""Yield ``(rows, columns, (q, n) changes, (q, 1) rounding)``, block by block.

    A change is :math:`d(n_i, o_j)^2 - d(o_i, o_j)^2 = (n_i - o_i) \cdot (n_i + o_i - 2 o_j)`: one product, and exactly
    0 for an embedding that did not change.
    """
    dtype = torch.float32 if gallery.device.type == "mps" else torch.float64
    for rows in _slices(len(old)):
        before, after = old[rows].to(dtype), new[rows].to(dtype)
        step, both = after - before, after + before
        for columns in _slices(len(gallery)):
            block = gallery[columns].to(dtype)
            change = torch.addmm((step * both).sum(1, keepdim=True), step, block.t(), alpha=-2)
            reach = both.norm(dim=1, keepdim=True) + 2 * block.norm(dim=1).max()
            yield rows, columns, change, 64 * torch.finfo(dtype).eps * step.norm(dim=1, keepdim=True) * reach


def _slices(length: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK_ROWS, length)) for start in range(0, length, _BLOCK_ROWS))
