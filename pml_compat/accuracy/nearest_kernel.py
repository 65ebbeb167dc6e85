"""Compiled loops over a tile of scores: what is not counted is taken out, the nearest positive found (numba)."""
# mypy: ignore-errors
# What numba compiles: the types are those of the machine, which Python's do not tell.

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def remove(row: np.ndarray, column: int, items: np.ndarray, first: int, length: int, value: float) -> None:
    """Set the scores of some gallery items, of which ``row`` has those from ``column``."""
    place = first + np.searchsorted(items[first : first + length], column)
    while place < first + length and items[place] < column + len(row):
        row[items[place] - column] = value
        place += 1


@njit(nogil=True, cache=True)
def nearest_right(
    scores: np.ndarray,
    column: int,
    items: np.ndarray,
    first: np.ndarray,
    length: np.ndarray,
    out_items: np.ndarray,
    out_first: np.ndarray,
    out_length: np.ndarray,
    right: np.ndarray,
    found: np.ndarray,
) -> None:
    """Look for the nearest positive in a tile, and leave the scores of wrong items alone: infinity for the others.

    Args:
        scores: as for :func:`~pml_compat.accuracy.counting_kernel.count_scores`, like the following; is overwritten.
        column: ...
        items: ...
        first: ``(q,)``.
        length: ``(q,)``.
        out_items: ...
        out_first: ``(q,)``.
        out_length: ``(q,)``.
        right: ``(q,)`` float32, made smaller: the score of the nearest positive.
        found: ``(q,)`` int64, added to: how many positives are in the ranking.
    """
    for i in range(len(scores)):
        row, stop = scores[i], first[i] + length[i]
        remove(row, column, out_items, out_first[i], out_length[i], np.float32(np.inf))
        place = first[i] + np.searchsorted(items[first[i] : stop], column)
        while place < stop and items[place] < column + len(row):
            score = row[items[place] - column]
            if score < np.inf:
                right[i] = min(right[i], score)
                found[i] += 1
                row[items[place] - column] = np.inf
            place += 1
