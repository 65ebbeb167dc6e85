"""Where the positives of queries stand, and for which queries the rounding of scores could show in a metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch

FIRST_PLACES = 10  # where the order is not left to rounding
CHANGE = 1e-3  # share of a query's average precision, or of its reciprocal rank, that is left to rounding at most
TIED = 64  # units in the last place of ``(2 |q| + d) ** 2`` by which distances that tie differ at most


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


def unsure_queries(ranks: PositiveRanks, bounds: PlaceBounds, cuts: Sequence[int]) -> torch.Tensor:
    """Tell for which queries rounding could move a positive that a metric looks at, or much of average precision."""
    others = (bounds.within - bounds.closer - 1) * ranks.valid
    seen = bounds.closer < FIRST_PLACES
    borders = [ranks.relevant[:, None]]
    for k in cuts:
        borders += [torch.full_like(borders[0], k), borders[0].clamp_max(k)]
    for cut in borders:
        seen = seen | ((bounds.closer < cut) & (bounds.within > cut))
    least, most = bounds.precisions()
    precision = ranks.precision
    change = torch.maximum(most - precision, precision - least).mul_(ranks.valid).sum(1)
    first = bounds.closer[:, 0] + 1, bounds.within[:, 0].clamp_min(1)  # whose reciprocals differ by (b - a) / (a b)
    reciprocal = (first[1] - first[0]).double() / first[1] * ranks.valid[:, 0]
    unsure = (change > CHANGE * precision.sum(1)) | (reciprocal > CHANGE)
    return unsure | (seen & (others > 0)).any(1)
