"""Where the positives of queries stand, and for which queries the rounding of scores could show in a metric."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch

FIRST_PLACES = 10  # where the order is not left to rounding
CHANGE = 1e-3  # share of a query's average precision, or of its reciprocal rank, that is left to rounding at most


@dataclass(frozen=True)
class PositiveRanks:
    """Where the positives of some queries stand; every tensor but ``relevant`` is ``(Q, P)``, nearest first.

    A row has as many valid entries as its query has positives in the ranking. Ties make ``within`` exceed
    ``closer + 1``: the item stands anywhere from place ``closer + 1`` to place ``within``.
    """

    valid: torch.Tensor  # False for padding
    closer: torch.Tensor  # gallery items strictly closer than this positive
    within: torch.Tensor  # gallery items at most as far, itself included
    positives_within: torch.Tensor  # positives at most as far, itself included
    relevant: torch.Tensor  # (Q,) positives of each query, in the ranking or not

    def of(self, queries: torch.Tensor) -> PositiveRanks:
        """Return the ranks of some of the queries."""
        return PositiveRanks(**{field.name: getattr(self, field.name)[queries] for field in fields(self)})

    @cached_property
    def tied(self) -> bool:
        """Whether any positive ties with another item."""
        return bool((self.within - self.closer).mul_(self.valid).max() > 1)

    @cached_property
    def precision(self) -> torch.Tensor:
        """The ``(Q, P)`` precision, float64, of the list that ends with the positive and its ties; 0 for padding."""
        return (self.positives_within * self.valid).double() / self.within.clamp_min(1)  # float64: int32 makes float32


@dataclass(frozen=True)
class PlaceBounds:
    """What rounding leaves of the places of positives; every tensor is ``(Q, P)``."""

    closer: torch.Tensor  # gallery items that are closer for sure
    within: torch.Tensor  # gallery items that may be as close, itself included
    positives_closer: torch.Tensor  # positives that are closer for sure
    positives_within: torch.Tensor  # positives that may be as close, itself included

    def precisions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the least and the largest precision that each positive may end a list with."""
        wrong_before = (self.closer - self.positives_closer).clamp_min(0)
        wrong_within = (self.within - self.positives_within).clamp_min(0)
        least = (self.positives_closer + 1).double()
        most = self.positives_within.clamp_min(1).double()
        return least / (least + wrong_within), most / (most + wrong_before)


def first_ranks(
    right: torch.Tensor, wrong: torch.Tensor, relevant: torch.Tensor, tolerance: torch.Tensor
) -> tuple[PositiveRanks, torch.Tensor]:
    """Return the rank of the nearest positive, 1 or not, and for which queries rounding decides.

    Args:
        right: ``(Q,)`` scores of the nearest positives; lower is nearer.
        wrong: ``(Q,)``, of the nearest other items.
        relevant: ``(Q,)``, how many positives there are.
        tolerance: ``(Q,)``.
    """
    closer = (wrong < right).long()[:, None]
    ranks = PositiveRanks(
        valid=relevant[:, None] > 0,
        closer=closer,
        within=closer + 1,
        positives_within=torch.ones_like(closer),
        relevant=relevant,
    )
    return ranks, (relevant > 0) & ((right - wrong).abs() <= tolerance)


def unsure_queries(ranks: PositiveRanks, bounds: PlaceBounds, k: int | None) -> torch.Tensor:
    """Tell for which queries rounding could move a positive that a metric looks at, or much of average precision."""
    others = (bounds.within - bounds.closer - 1) * ranks.valid
    seen = bounds.closer < FIRST_PLACES
    cuts = [ranks.relevant[:, None]]
    if k is not None:
        cuts += [torch.full_like(cuts[0], k), cuts[0].clamp_max(k)]
    for cut in cuts:
        seen = seen | ((bounds.closer < cut) & (bounds.within > cut))
    least, most = bounds.precisions()
    precision = ranks.precision
    change = torch.maximum(most - precision, precision - least).mul_(ranks.valid).sum(1)
    first = bounds.closer[:, 0] + 1, bounds.within[:, 0].clamp_min(1)  # whose reciprocals differ by (b - a) / (a b)
    reciprocal = (first[1] - first[0]).double() / first[1] * ranks.valid[:, 0]
    unsure = (change > CHANGE * precision.sum(1)) | (reciprocal > CHANGE)
    return unsure | (seen & (others > 0)).any(1)
