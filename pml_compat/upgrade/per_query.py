"""Per-query values of several models side by side: what flips and bootstrap intervals are made from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def as_vector(value: Any, name: str) -> np.ndarray:
    """Return a tensor, an array or a sequence of numbers or bools as ``(N,)`` float64; one number as ``(1,)``.

    Raises:
        ValueError: missing, not numbers, more than one dimension, empty, or infinite.
    """
    if value is None:
        raise ValueError(f"{name} must be given, got None")
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double()
    try:
        vector = np.atleast_1d(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, got {value!r}") from None
    if vector.ndim != 1 or not len(vector):
        raise ValueError(f"{name} must be one row of numbers, (N,), got shape {vector.shape}")
    if np.isinf(vector).any():
        raise ValueError(f"{name} must not be infinite, entry {int(np.isinf(vector).argmax())} is")
    return vector


def complete_queries(**values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Stack per-query values of the same queries, without those that lack one (NaN) in any of them.

    Args:
        **values: argument name to ``(Q,)`` values, as ``get_per_query_accuracy`` returns them.
    Shape:
        - output: ``(len(values), Q')`` float64; ``(Q,)`` bool, which queries these are
    Raises:
        ValueError: lengths that differ; no query left; what :func:`as_vector` raises.
    """
    vectors = {name: as_vector(value, name) for name, value in values.items()}
    lengths = {name: len(vector) for name, vector in vectors.items()}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{length} in {name}" for name, length in lengths.items())
        raise ValueError(f"{' and '.join(vectors)} must have one entry a query, the same queries: got {got}")
    stacked = np.stack(list(vectors.values()))
    kept = ~np.isnan(stacked).any(0)
    if not kept.any():
        raise ValueError(f"{' and '.join(vectors)} must have a query with a value in each, got only NaN")
    return stacked[:, kept], kept
