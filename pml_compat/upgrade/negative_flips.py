"""Queries that the old system answered rightly and the upgraded one answers wrongly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..accuracy.items import as_values
from .per_query import complete_queries


class ClassFlips(NamedTuple):
    """One class: its label, how many of its queries flipped from right to wrong, and of how many."""

    label: Any
    flips: float
    queries: int


@dataclass(frozen=True)
class NegativeFlips:
    """What :func:`negative_flips` found.

    Args:
        rate: share of the queries that were right and now are wrong (NFR).
        positive_rate: share that were wrong and now are right. The new accuracy is the old one less ``rate`` plus this.
        relative_rate: ``rate`` over what it would be if the new model's errors had nothing to do with the old one's;
            below 1, the new model errs mostly where the old one did. NaN where no old answer is right or no new one
            is wrong.
        queries: how many queries were compared.
        left_out: how many were not, for want of a positive.
        labels: ``(C,)``, ascending.
        class_flips: ``(C,)`` float64, queries of the class that flipped from right to wrong.
        class_queries: ``(C,)`` queries of the class.
    """

    rate: float
    positive_rate: float
    relative_rate: float
    queries: int
    left_out: int
    labels: torch.Tensor | np.ndarray
    class_flips: torch.Tensor
    class_queries: torch.Tensor

    @property
    def class_rates(self) -> torch.Tensor:
        """``(C,)`` share of each class's queries that flipped from right to wrong."""
        return self.class_flips / self.class_queries

    def worst(self, k: int = 10) -> list[ClassFlips]:
        """Name up to ``k`` classes with flips: most flips first, then the highest rate, then the lowest label."""
        flips, queries = self.class_flips.numpy(), self.class_queries.numpy()
        order = np.lexsort((-self.class_rates.numpy(), -flips))  # stable, and labels ascend
        return [
            ClassFlips(self.labels[row].item(), float(flips[row]), int(queries[row])) for row in order[:k] if flips[row]
        ]


def negative_flip_rate(old_correct: Any, new_correct: Any) -> float:
    r"""Return the share of queries that the old system answered rightly and the new one answers wrongly.

    .. math:: NFR = \frac1Q \sum_i \mathbb{1}[\text{old right}_i \wedge \text{new wrong}_i]

    An upgrade that is better on average can still break what users relied on. For retrieval, compare old queries
    on the old gallery with new queries on it: ``precision_at_1`` of ``get_per_query_accuracy``.

    Args:
        old_correct: ``(Q,)`` bools, or 1 and 0: was the query answered rightly? NaN, a query without a positive, is
            left out. Where items tie, ``precision_at_1`` is a chance between 0 and 1, and counts as that.
        new_correct: ``(Q,)``, the same queries in the same order.
    Raises:
        ValueError: lengths that differ; a value outside 0 to 1; no query left.
    Example:
        >>> negative_flip_rate([True, True, False, True], [True, False, True, True])
        0.25

    Reference:
        Yan et al., "Positive-Congruent Training: Towards Regression-Free Model Updates", CVPR 2021.
    """
    (old, new), _ = _correct(old_correct, new_correct)
    return float((old * (1 - new)).mean())


def negative_flips(old_correct: Any, new_correct: Any, labels: Any) -> NegativeFlips:
    r"""Return the rates of flips both ways, and the classes that lost most.

    .. math:: NFR_{rel} = \frac{NFR}{(1 - Err_{old}) \, Err_{new}}

    Args:
        old_correct: as in :func:`negative_flip_rate`.
        new_correct: as in :func:`negative_flip_rate`.
        labels: ``(Q,)`` query labels.
    Raises:
        ValueError: as :func:`negative_flip_rate`; labels that are not one a query.
    Example:
        >>> flips = negative_flips([1, 1, 0, 1], [1, 0, 1, 1], torch.tensor([5, 5, 7, 7]))
        >>> flips.rate, flips.positive_rate, flips.worst()
        (0.25, 0.25, [ClassFlips(label=5, flips=1.0, queries=2)])

    Reference:
        Yan et al., "Positive-Congruent Training: Towards Regression-Free Model Updates", CVPR 2021.
    """
    (old, new), kept = _correct(old_correct, new_correct)
    labels = as_values(labels, "labels")
    if labels.shape != (len(kept),):
        raise ValueError(f"labels must have one entry a row: expected {len(kept)}, got {len(labels)}")
    labels = labels[kept].astype(str) if labels.dtype.kind in "OS" else labels[kept]
    lost = torch.from_numpy(old * (1 - new))
    by_chance = old.mean() * (1 - new.mean())
    classes, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    row = torch.from_numpy(place)
    return NegativeFlips(
        rate=float(lost.mean()),
        positive_rate=float(((1 - old) * new).mean()),
        relative_rate=float(lost.mean() / by_chance) if by_chance else math.nan,
        queries=len(old),
        left_out=int((~kept).sum()),
        labels=torch.from_numpy(classes) if classes.dtype.kind in "bi" else classes,
        class_flips=torch.zeros(len(classes), dtype=torch.float64).index_add_(0, row, lost),
        class_queries=torch.from_numpy(counts),
    )


def _correct(old_correct: Any, new_correct: Any) -> tuple[np.ndarray, np.ndarray]:
    values, kept = complete_queries(old_correct=old_correct, new_correct=new_correct)
    for name, correct in zip(("old_correct", "new_correct"), values, strict=True):
        wrong = (correct < 0) | (correct > 1)
        if wrong.any():
            raise ValueError(f"{name} must be bools, or from 0 (wrong) to 1 (right), got {correct[wrong][0]:g}")
    return values, kept
