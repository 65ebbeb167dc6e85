"""How sure a difference between two systems is, from the queries it was measured on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import binomtest
from scipy.stats import norm as normal
from scipy.stats import t as student_t

from .._checks import check_integer
from .per_query import complete_queries

_BLOCK_ELEMENTS = 2**22  # counts drawn at once: 32 MiB, and a copy of them as floats
_FEW = 25  # queries that differ, up to which the exact sign test has a say
_MANY = 0.1  # distinct values a query, above which queries are drawn one by one


@dataclass(frozen=True)
class BootstrapInterval:
    """A value measured on a sample of queries, and where it may lie for others like them.

    Args:
        estimate: the value on all the queries.
        low: lower end of the interval.
        high: upper end of the interval.
        probability: share of the resamples in which the value is above 0.
        level: share of the resamples inside the interval.
        queries: how many queries were resampled.
        left_out: how many were not, for want of a value in one of the systems.
        undefined: how many resamples have no value (:func:`bootstrap_update_gain`); they count nowhere else.
        classes: how many classes were resampled; 0, single queries were.
        p: two-sided, of the exact sign test, where few queries differ; 0 where the interval alone decides.
    """

    estimate: float
    low: float
    high: float
    probability: float
    level: float
    queries: int
    left_out: int
    undefined: int = 0
    classes: int = 0
    p: float = 0.0

    @property
    def above(self) -> bool:
        """Whether the difference is above 0 for sure, by the interval and, with few queries, the exact test."""
        return self.low > 0 and self.p <= 1 - self.level

    def __str__(self) -> str:
        return (
            f"{self.estimate:+.4f} [{self.low:+.4f}, {self.high:+.4f}] at {self.level:.0%}, "
            f"above 0 in {self.probability:.1%} of the resamples; {self.queries} queries, {self.left_out} left out"
        )


def paired_bootstrap(
    first: Any, second: Any, *, samples: int = 2000, level: float = 0.95, seed: int = 0, groups: Any = None
) -> BootstrapInterval:
    r"""Return how much better ``second`` is than ``first`` on average, with its percentile bootstrap interval.

    .. math:: \Delta = \frac1Q \sum_i (s_i - f_i), \quad
        \Delta^{(b)} = \frac1Q \sum_i w_i^{(b)} (s_i - f_i), \quad w^{(b)} \sim \mathrm{Multinomial}(Q, 1/Q)

    Queries are drawn with replacement, each with its values in both systems: hard queries are hard for both, which
    makes the difference far surer than either mean. The gallery stays as it is. The order of the queries does not
    matter; memory is bounded; the time grows with ``samples`` times the distinct differences, or the queries.

    Args:
        first: ``(Q,)`` per-query values of one system, as ``get_per_query_accuracy`` returns them; a query that is NaN
            in either is left out.
        second: ``(Q,)``, the same queries in the same order, of the other system.
        samples: how many resamples.
        level: of the interval, between 0 and 1.
        seed: of the resamples.
        groups: ``(Q,)`` what queries belong together, such as their labels: where a class has several queries, their
            results depend on each other, and whole classes are drawn. The interval is widened for few classes, by
            Student's t.
    Raises:
        ValueError: lengths that differ; infinite values; no query left; ``samples`` < 1; ``level`` not between 0 and 1.
    Example:
        >>> paired_bootstrap([0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.5]).estimate
        0.375

    Reference:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    (one, other), kept = complete_queries(first=first, second=second)
    differences = other - one
    group = None if groups is None else np.unique(np.asarray(groups)[kept], return_inverse=True)[1]
    if group is None or not 2 <= group.max() + 1 < len(differences):
        found = _interval(lambda means: means[..., 0], differences[None], kept, samples, level, seed)
    else:
        found = _of_classes(differences, group, kept, samples, level, seed)
    return replace(found, p=_sign_test(differences))


def _of_classes(
    differences: np.ndarray, group: np.ndarray, kept: np.ndarray, samples: int, level: float, seed: int
) -> BootstrapInterval:
    """Return the interval of resampled classes, which are numbered from 0."""
    samples = _check(samples, level)
    totals, sizes = np.bincount(group, differences), np.bincount(group)
    values, rng = np.empty(samples), np.random.default_rng(seed)
    block = max(1, _BLOCK_ELEMENTS // len(sizes))
    for start in range(0, samples, block):
        n_rows = min(block, samples - start)
        times = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=n_rows)
        values[start : start + n_rows] = (times @ totals) / (times @ sizes)
    estimate, tail = float(differences.mean()), (1 + level) / 2
    wider = student_t.ppf(tail, len(sizes) - 1) / normal.ppf(tail) * math.sqrt(len(sizes) / (len(sizes) - 1))
    low, high = np.quantile(values, [1 - tail, tail])
    return BootstrapInterval(
        estimate=estimate,
        low=float(estimate - wider * (estimate - low)),
        high=float(estimate + wider * (high - estimate)),
        probability=float((values > 0).mean()),
        level=float(level),
        queries=int(kept.sum()),
        left_out=int((~kept).sum()),
        classes=len(sizes),
    )


def _sign_test(differences: np.ndarray) -> float:
    """Return the two-sided p of the exact sign test, where so few queries differ that an interval may mislead.

    Of differences of other sizes than 1 (mAP), the least p that so many queries can have.
    """
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    if better + worse > _FEW:
        return 0.0
    if not np.isin(differences, (-1, 0, 1)).all():
        return min(1.0, 2.0 ** (1 - better - worse))
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def bootstrap_update_gain(
    *,
    old_to_old: Any,
    new_to_old: Any,
    independent: Any,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> BootstrapInterval:
    """Return :func:`update_gain` of the means of per-query values, with its percentile bootstrap interval.

    Its denominator is a difference too, so that the interval is wide, and lopsided, where the independent model is
    little better than the old one.

    Args:
        old_to_old: ``(Q,)`` per-query values of old queries on the old gallery.
        new_to_old: ``(Q,)`` of new queries on the old gallery, the same queries in the same order.
        independent: ``(Q,)`` of the independent new model's queries on its own gallery.
        samples: as in :func:`paired_bootstrap`.
        level: as in :func:`paired_bootstrap`.
        seed: as in :func:`paired_bootstrap`.
    Returns:
        The interval, with a RuntimeWarning where the gain has no value in some resamples, in which the independent
        model is not better than the old one; all NaN where it has none on the queries themselves.
    Raises:
        ValueError: as :func:`paired_bootstrap`.
    Example:
        >>> old, new, independent = [0.0, 0.5, 0.0, 0.5], [0.5, 0.5, 0.0, 0.5], [1.0, 1.0, 0.5, 1.0]
        >>> bootstrap_update_gain(old_to_old=old, new_to_old=new, independent=independent).estimate
        0.2

    Reference:
        Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020, for the gain.
    """
    (old, new, paragon), kept = complete_queries(old_to_old=old_to_old, new_to_old=new_to_old, independent=independent)
    found = _interval(_gain, np.stack([new - old, paragon - old]), kept, samples, level, seed)
    if found.undefined:
        where = f"in {found.undefined} of {samples} resamples" if found.undefined < samples else "on these queries"
        warnings.warn(
            f"bootstrap_update_gain has no value {where}: independent must be above old_to_old on average",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def _gain(means: np.ndarray) -> np.ndarray:
    """Divide what was gained by the room there was; NaN where there was none."""
    gained, room = means[..., 0], means[..., 1]
    return np.divide(gained, room, out=np.full_like(room, math.nan), where=room > 0)


def _interval(
    statistic: Callable[[np.ndarray], np.ndarray],
    columns: np.ndarray,
    kept: np.ndarray,
    samples: int,
    level: float,
    seed: int,
) -> BootstrapInterval:
    """Bootstrap a statistic of the means of ``(K, Q)`` columns; it maps ``(..., K)`` to ``(...)``."""
    samples = _check(samples, level)
    estimate = float(statistic(columns.mean(1)))
    values = statistic(_resampled_means(columns, samples, seed))
    values = values[:0] if math.isnan(estimate) else values[~np.isnan(values)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) if len(values) else (math.nan, math.nan)
    return BootstrapInterval(
        estimate=estimate,
        low=float(low),
        high=float(high),
        probability=float((values > 0).mean()) if len(values) else math.nan,
        level=float(level),
        queries=int(kept.sum()),
        left_out=int((~kept).sum()),
        undefined=samples - len(values),
    )


def _check(samples: int, level: float) -> int:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, both excluded, got {level!r}")
    return check_integer(samples, "samples", minimum=1)


def _resampled_means(columns: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Return the ``(samples, K)`` means of resamples of ``(K, Q)`` columns.

    To draw queries with replacement is to draw how often each distinct column occurs, of which many metrics have few:
    the difference of two ``precision_at_1`` has three. Where there are many, drawing the queries is faster.
    """
    distinct, counts = np.unique(columns, axis=1, return_counts=True)
    n_queries, rng = columns.shape[1], np.random.default_rng(seed)
    means = np.empty((samples, len(columns)))
    if len(counts) > _MANY * n_queries:
        ordered = np.repeat(distinct, counts, axis=1)
        for mean in means:
            ordered[:, rng.integers(n_queries, size=n_queries)].mean(1, out=mean)
        return means
    size = max(1, _BLOCK_ELEMENTS // len(counts))
    for start in range(0, samples, size):
        block = means[start : start + size]
        np.divide(rng.multinomial(n_queries, counts / n_queries, size=len(block)) @ distinct.T, n_queries, out=block)
    return means
