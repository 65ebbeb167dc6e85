"""Triplets that the old model ranks right and the new queries rank wrong."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import check_integer
from .base import CrossModelMiner

_BLOCK_ELEMENTS = 2**22  # (positive pair, reference) comparisons made at once


class RegressionMiner(CrossModelMiner):
    r"""Take the triplets that went wrong with the upgrade: the negative flips among the old references.

    .. math:: d(f_{o,i}, f_{o,p}) < d(f_{o,i}, f_{o,n}) \quad\text{and}\quad
        d(f_{n,i}, f_{o,p}) \ge d(f_{n,i}, f_{o,n}),\qquad y_p = y_i \ne y_n

    With the old query, positive p comes before negative n; with the new query of the same item it does not. A tie of
    the old model is not right, a tie of the new one is wrong, so a new model equal to the old has none. p may be item
    i itself. What the old model got wrong as well is left to the other losses.

    Time is O(N P M) for P positives an anchor; besides two N x N matrices of distances memory is set by a block of
    fixed size, and by the tuples themselves.

    Args:
        max_triplets_per_anchor: keep the largest violations :math:`d(f_{n,i}, f_{o,p}) - d(f_{n,i}, f_{o,n})` of each
            anchor, and of equal ones the lowest p, then n; 1 or more. None keeps all.
        **kwargs: ``distance`` (default ``LpDistance(p=2)``: unit rows; a similarity counts as inverted),
            ``collect_stats``: then the share of the batch with a triplet is recorded as ``regressed_fraction``.
    Shape:
        - embeddings ``(N, D)``; labels ``(N,)``; ref_emb ``(N, D)``, old, row i of the same item
        - output: (anchors, positives, negatives), indices, sorted by anchor; anchors into ``embeddings``, others into
          ``ref_emb``
    Raises:
        ValueError: ``max_triplets_per_anchor`` < 1; in a call: ``ref_emb`` or ``ref_labels`` of other rows; see also
            :class:`CrossModelMiner`.
    Example:
        >>> old = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> new = torch.tensor([[0.0, 1.0], [0.0, 1.0]])  # the first item's query now finds the second
        >>> RegressionMiner()(new, torch.tensor([0, 1]), old)
        (tensor([0]), tensor([0]), tensor([1]))

    Reference:
        Negative flips are those of Yan et al., "Positive-Congruent Training: Towards Regression-Free Model Updates",
        CVPR 2021; mining them as triplets is ours.
    """

    new_anchors_only = True
    row_aligned = True

    def __init__(self, max_triplets_per_anchor: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if max_triplets_per_anchor is not None:
            check_integer(max_triplets_per_anchor, "max_triplets_per_anchor", minimum=1)
        self.max_triplets_per_anchor = max_triplets_per_anchor
        self.add_to_recordable_attributes(name="regressed_fraction", is_stat=True)

    def mine(
        self, embeddings: torch.Tensor, labels: torch.Tensor, ref_emb: torch.Tensor, ref_labels: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return the triplets."""
        if len(ref_emb) != len(embeddings):
            raise ValueError(
                "ref_emb must be of the same items, row i of ref_emb that of row i of embeddings: expected "
                f"{len(embeddings)} rows, got {len(ref_emb)}"
            )
        new, old = self.distances(embeddings, ref_emb), self.distances(ref_emb, ref_emb)
        same = labels[:, None] == ref_labels
        anchors, positives = same.nonzero(as_tuple=True)
        if len(anchors) * len(labels) <= _BLOCK_ELEMENTS:
            return self._recorded(self._block(new, old, same, anchors, positives), len(labels))
        ends = same.sum(1).cumsum(0).tolist()
        most = max(end - start for start, end in zip([0, *ends], ends, strict=False))
        step = max(1, _BLOCK_ELEMENTS // (most * len(labels)))
        found, start = [], 0
        for last in range(step - 1, len(labels) + step - 1, step):
            end = ends[min(last, len(labels) - 1)]
            found.append(self._block(new, old, same, anchors[start:end], positives[start:end]))
            start = end
        a, p, n = (torch.cat(parts) for parts in zip(*found, strict=True))
        return self._recorded((a, p, n), len(labels))

    def _recorded(self, triplets: tuple[torch.Tensor, ...], length: int) -> tuple[torch.Tensor, ...]:
        if self.collect_stats:
            self.regressed_fraction = len(triplets[0].unique()) / length
        return triplets

    def _block(
        self, new: torch.Tensor, old: torch.Tensor, same: torch.Tensor, a: torch.Tensor, p: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The triplets of some positive pairs: all those of their anchors."""
        wrong = (old[a, p][:, None] < old[a]) & (new[a, p][:, None] >= new[a]) & ~same[a]
        pair, n = wrong.nonzero(as_tuple=True)
        a, p = a[pair], p[pair]
        if self.max_triplets_per_anchor is not None:
            kept = _largest_of_each(a, new[a, p] - new[a, n], self.max_triplets_per_anchor)
            a, p, n = a[kept], p[kept], n[kept]
        return a, p, n


def _largest_of_each(group: torch.Tensor, values: torch.Tensor, k: int) -> torch.Tensor:
    """Return where the ``k`` largest values of each group are, by group; of equal ones the first come first."""
    order = torch.argsort(values, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    group = group[order]
    rank = torch.arange(len(group), device=group.device) - torch.searchsorted(group, group)
    return order[rank < k]
