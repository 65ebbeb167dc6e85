"""The accuracy of a gallery while its old embeddings are replaced by new ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._checks import as_tensor, check_embeddings, check_finite, check_labels
from .._rows import as_wide
from ..accuracy import CrossModelAccuracyCalculator
from ..accuracy.mixed_accuracy import mixed_accuracy

_TENTHS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class BackfillCurve:
    """Accuracy of new queries on a gallery, from all old to all new.

    Args:
        fractions: the share of the gallery that is replaced, from 0 to 1.
        values: metric name to its value at each of the fractions.
        order: ``(N,)`` gallery rows, the first to be replaced first.
    """

    fractions: tuple[float, ...]
    values: dict[str, tuple[float, ...]]
    order: torch.Tensor

    def area(self, metric: str) -> float:
        """Return the metric's average over the backfill, by the trapezoidal rule.

        Raises:
            ValueError: ``metric`` was not measured.
        """
        if metric not in self.values:
            raise ValueError(f"metric must be one of {', '.join(self.values)}, got {metric!r}")
        points = itertools.pairwise(zip(self.fractions, self.values[metric], strict=True))
        return sum((right - left) * (low + high) / 2 for (left, low), (right, high) in points)


def backfill_curve(
    query: Any,
    query_labels: Any,
    old_gallery: Any,
    new_gallery: Any,
    gallery_labels: Any,
    *,
    order: Any = "random",
    fractions: Sequence[float] = _TENTHS,
    seed: int = 0,
    calculator: CrossModelAccuracyCalculator | None = None,
    fit_width: bool = False,
    **kwargs: Any,
) -> BackfillCurve:
    r"""Measure new queries on a gallery of which a growing share is replaced by new embeddings.

    .. math:: \tilde M = \int_0^1 M(q, G_\beta) \, d\beta, \quad
        G_\beta: \text{the first } \lfloor \beta N \rfloor \text{ items of the order new, the others old}

    Old and new items are ranked together, by Euclidean distance on the embeddings as given. So their lengths must be
    alike, or one kind stands in front whatever it shows: give unit-length rows. Where the two spaces have different
    widths and ``fit_width`` is asked for, the gallery has the wider one's, and the narrower embeddings (new queries
    too) end in zeros (:func:`pml_compat.fit_width`). This changes neither end: fraction 0 is the cross-test on
    ``old_gallery``, fraction 1 the new model's self-test.

    Args:
        query: ``(Q, D_new)``, as the new model embeds them.
        query_labels: ``(Q,)``.
        old_gallery: ``(N, D_old)``, as stored, or transformed.
        new_gallery: ``(N, D_new)``, the same items in the same order as the new model embeds them.
        gallery_labels: ``(N,)``.
        order: what is replaced first. ``"random"``; ``"class"``, whole classes one after another, in random order;
            ``(N,)`` floats, scores, highest first (ties by row); ``(N,)`` integers, the rows themselves, first to last.
        fractions: where to measure, rising from 0 to 1.
        seed: of a random order.
        calculator: what measures; by default a
            :class:`~pml_compat.accuracy.CrossModelAccuracyCalculator` of ``precision_at_1`` and
            ``mean_average_precision``.
        fit_width: mix vectors of different widths all the same: for a new model that was trained to serve the old
            gallery with its first coordinates.
        **kwargs: for ``calculator.get_accuracy``: ``ref_includes_query``, ``query_ids``, ``query_cameras``, ...
    Raises:
        ValueError: galleries of different lengths, or of different widths without ``fit_width``; queries not as wide as
            ``new_gallery``; an unknown order, scores that are NaN, integers that are no permutation; fractions that do
            not rise from 0 to 1; a calculator that returns a list a metric; what ``get_accuracy`` raises.
    Example:
        >>> labels = torch.tensor([0, 1])
        >>> new, old = torch.eye(2), torch.eye(2).flip(0)
        >>> curve = backfill_curve(new, labels, old, new, labels, order=torch.tensor([1, 0]), fractions=(0, 0.5, 1))
        >>> curve.values["precision_at_1"], curve.area("precision_at_1")
        ((0.0, 0.5, 1.0), 0.5)

    Reference:
        Jaeckle et al., "FastFill: Efficient Compatible Model Update", ICLR 2023.
    """
    old, new = (
        check_embeddings(old_gallery, "old_gallery").detach(),
        check_embeddings(new_gallery, "new_gallery").detach(),
    )
    if len(old) != len(new):
        raise ValueError(f"new_gallery must have the items of old_gallery: expected {len(old)} rows, got {len(new)}")
    query = check_embeddings(query, "query").detach()
    if query.shape[1] != new.shape[1]:
        raise ValueError(
            f"query must be as wide as new_gallery, both the new model's: expected width {new.shape[1]}, "
            f"got {query.shape[1]}"
        )
    fractions = tuple(float(fraction) for fraction in fractions)
    rising = all(left < right for left, right in itertools.pairwise(fractions))
    if not rising or len(fractions) < 2 or (fractions[0], fractions[-1]) != (0, 1):
        raise ValueError(f"fractions must rise from 0 to 1, got {fractions}")
    calculator = calculator or CrossModelAccuracyCalculator(include=("precision_at_1", "mean_average_precision"))
    if calculator.return_per_class:
        raise ValueError("calculator must return one number a metric, got one with return_per_class=True")
    rows = _replacement_order(order, gallery_labels, len(old), seed)

    as_wide(new, old, fit_width, ("new_gallery", "old_gallery"))
    counts = [int(fraction * len(old) + 1e-6) for fraction in fractions]  # 0.29 * 100 is 28.999999999999996
    values: dict[str, list[float]] = {}
    for found in mixed_accuracy(calculator, query, query_labels, old, new, gallery_labels, rows, counts, **kwargs):
        for metric, value in found.items():
            values.setdefault(metric, []).append(value)
    return BackfillCurve(fractions, {metric: tuple(points) for metric, points in values.items()}, rows)


def _replacement_order(order: Any, gallery_labels: Any, length: int, seed: int) -> torch.Tensor:
    if isinstance(order, str):
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(length, generator=generator)
        if order == "random":
            return shuffled
        if order == "class":
            labels = check_labels(gallery_labels, "gallery_labels", length).cpu()[shuffled]
            classes, position = torch.unique(labels, return_inverse=True)
            turn = torch.randperm(len(classes), generator=generator)
            return shuffled[torch.argsort(turn[position], stable=True)]
        raise ValueError(f'order must be "random", "class", scores or a permutation, got {order!r}')
    order = as_tensor(order, "order").detach().cpu()
    if order.shape != (length,):
        raise ValueError(
            f"order must have one entry a gallery item: expected shape ({length},), got {tuple(order.shape)}"
        )
    if order.is_floating_point():
        check_finite(order, "order")
        return torch.argsort(order, descending=True, stable=True)
    rows = check_labels(order, "order")
    if not torch.equal(rows.sort().values, torch.arange(length)):
        raise ValueError(
            f"order must hold each row from 0 to {length - 1} once where it is integers; give scores as floats"
        )
    return rows
