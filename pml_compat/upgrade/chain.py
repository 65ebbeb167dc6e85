"""A chain of upgrades in one number: AC and AM over every model's queries on its own and all earlier galleries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def average_compatibility(matrix: Any, *, metric: str | None = None, strict: bool = True) -> float:
    r"""Return AC: of all upgrades in a chain of models, from any to any later one, the share that are compatible.

    .. math:: AC = \frac{2}{T (T - 1)} \sum_{k < t} \mathbb{1}[M_{t,k} > M_{k,k}]

    Args:
        matrix: ``(T, T)`` accuracies, row t the queries of model t, column k the gallery of model k, oldest model
            first; rows may end at the diagonal, and what stands beyond it is not read. Or what
            :func:`compatibility_matrix` returns, its models named oldest first.
        metric: which metric to read, with the latter.
        strict: False counts a new model that is just as good as compatible.
    Raises:
        ValueError: fewer than two models; a row too short; a value that is not finite; ``metric`` missing or unknown.
    Example:
        >>> average_compatibility([[0.30], [0.35, 0.50], [0.28, 0.52, 0.60]])
        0.6666666666666666

    Reference:
        Biondi et al., "CoReS: Compatible Representations via Stationarity", TPAMI 2023. Public code of later work
        counts strictly, that of CoReS does not.
    """
    lower = _lower_triangle(matrix, metric)
    if len(lower) < 2:
        raise ValueError(f"matrix must hold at least 2 models for an upgrade, got {len(lower)}")
    later, earlier = np.tril_indices(len(lower), -1)
    cross, own = lower[later, earlier], lower[earlier, earlier]
    return float(np.mean(cross > own if strict else cross >= own))


def average_multimodel_accuracy(matrix: Any, *, metric: str | None = None) -> float:
    r"""Return AM: the accuracy that a chain of models has on average on its own and all earlier galleries.

    .. math:: AM = \frac{2}{T (T + 1)} \sum_{k \le t} M_{t,k}

    Args:
        matrix: as in :func:`average_compatibility`.
        metric: as in :func:`average_compatibility`.
    Raises:
        ValueError: no model; a row too short; a value that is not finite; ``metric`` missing or unknown.
    Example:
        >>> round(average_multimodel_accuracy([[0.30], [0.35, 0.50], [0.28, 0.52, 0.60]]), 3)
        0.425

    Reference:
        Biondi et al., "CoReS: Compatible Representations via Stationarity", TPAMI 2023.
    """
    lower = _lower_triangle(matrix, metric)
    return float(lower[np.tril_indices(len(lower))].mean())


def _lower_triangle(matrix: Any, metric: str | None) -> np.ndarray:
    """Read ``(T, T)`` float64 accuracies; NaN above the diagonal."""
    if not len(matrix):
        raise ValueError("matrix must hold at least 1 model, got none")
    if isinstance(matrix, Mapping):
        known = sorted({name for row in matrix.values() for cell in row.values() for name in cell})
        if metric not in known:
            raise ValueError(f"metric must be one of the matrix's, {', '.join(known)}, got {metric!r}")
        models = list(matrix)
        missing = [
            (t, k) for row, t in enumerate(models) for k in models[: row + 1] if metric not in matrix[t].get(k, {})
        ]
        if missing:
            raise ValueError(f"matrix must have {metric} of {missing[0][0]} on the gallery of {missing[0][1]}")
        matrix = [[matrix[t][k][metric] for k in models[: row + 1]] for row, t in enumerate(models)]
    elif metric is not None:
        raise ValueError(f"metric is for what compatibility_matrix returns, got {metric!r} with plain rows")
    lower = np.full((len(matrix), len(matrix)), math.nan)
    for t, values in enumerate(matrix):
        if np.ndim(values) != 1 or len(values) <= t:
            raise ValueError(f"matrix must have one gallery a model up to its own: row {t} is {values!r}")
        lower[t, : t + 1] = [float(value) for value in values[: t + 1]]
        if not np.isfinite(lower[t, : t + 1]).all():
            raise ValueError(f"matrix must be finite up to the diagonal, row {t} is {lower[t, : t + 1].tolist()}")
    return lower
