"""Compiled loops that order positives and the wrong items near them by float64 (numba, extra ``fast``)."""
# mypy: ignore-errors
# What numba compiles: the types are those of the machine, which Python's do not tell.

from __future__ import annotations

import math

import numpy as np
from numba import njit


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _distance(query: np.ndarray, row: np.ndarray) -> float:
    """Return the squared distance less the query's squared length."""
    norm = product = 0.0
    for place in range(len(query)):
        value = np.float64(row[place])
        norm += value * value
        product += query[place] * value
    return norm - 2 * product


@njit(nogil=True, cache=True)
def find_distances(
    queries: np.ndarray,
    query: np.ndarray,
    old: np.ndarray,
    new: np.ndarray,
    replaced: int,
    items: np.ndarray,
    size: np.ndarray,
    near: np.ndarray,
    n_old: np.ndarray,
    n_near: np.ndarray,
    own: np.ndarray,
    others: np.ndarray,
) -> None:
    """Compute the distances of some queries to their positives and to the wrong items near these.

    Args:
        queries: ``(u,)`` int64, numbers in the block of queries.
        query: ``(u, D)`` float64.
        old: ``(N, D)`` float32 or float64.
        new: ``(N, D)``, rows that take the old ones' place.
        replaced: how many of the first rows are new.
        items: ``(q, P)`` int32, rows of positives.
        size: ``(q,)`` int32, how many there are.
        near: ``(q, n)`` int32, rows of wrong items near a positive: first old rows, then new ones.
        n_old: ``(q,)`` int32, how many old rows there are.
        n_near: ``(q,)`` int32, how many rows there are.
        own: ``(u, P)`` float64, is filled; infinity after the last.
        others: ``(u, n')`` float64, likewise.
    """
    for place in range(len(queries)):
        i = queries[place]
        for k in range(size[i]):
            item = items[i, k]
            own[place, k] = _distance(query[place], new[item] if item < replaced else old[item])
        own[place, size[i] :] = np.inf
        found = 0
        for j in range(n_near[i]):
            item = near[i, j]
            if j < n_old[i] and item < replaced:
                continue
            others[place, found] = _distance(query[place], old[item] if j < n_old[i] else new[item])
            found += 1
        others[place, found:] = np.inf


@njit(nogil=True, cache=True)
def find_exact_places(
    queries: np.ndarray,
    query: np.ndarray,
    own: np.ndarray,
    others: np.ndarray,
    size: np.ndarray,
    apart: np.ndarray,
    reach: np.ndarray,
    rounding: float,
    closer: np.ndarray,
    within: np.ndarray,
    positives_within: np.ndarray,
    unsure: np.ndarray,
) -> None:
    """Find the places of positives among all items, as ``ranking.sorted_ranks`` does.

    Args:
        queries: ``(u,)`` int64, numbers in the block of queries.
        query: ``(u, D)`` float64.
        own: ``(u, P)`` float64 distances of positives, ascending.
        others: ``(u, n)`` float64 distances of the wrong items near them, ascending, infinity after the last.
        size: ``(q,)`` int32, how many positives there are.
        apart: ``(q, P)`` int32, wrong items near none of the positives that are closer than the first, the second...
        reach: ``(q,)`` float32: a longer tie is left undecided, as an item that is not near could be in it.
        rounding: items tie whose distances differ by no more than this share of ``(2 |q| + d) ** 2``.
        closer: ``(q, P)`` int32, is filled for the queries, like the following.
        within: ``(q, P)`` int32.
        positives_within: ``(q, P)`` int32.
        unsure: ``(q,)`` bool, set to False for the queries that are decided.
    """
    for place in range(len(queries)):
        i = queries[place]
        norm = 0.0
        for value in query[place]:
            norm += value * value
        length = math.sqrt(norm)
        last, n_others = size[i], others.shape[1]
        j = k = start = first = 0  # the next item of either kind; where a tie starts, in all and among the positives
        lowest = highest = tie = 0.0
        decided = True
        while decided and first < last:
            is_own = k < last and (j == n_others or own[place, k] < others[place, j])
            value = own[place, k] if is_own else others[place, j] if j < n_others else np.inf
            if j + k == start:
                lowest = value
            elif value - highest > tie:
                if k > first:
                    decided = highest - lowest + tie <= reach[i] and apart[i, first] == apart[i, k - 1]
                    for p in range(first, k):
                        closer[i, p] = apart[i, p] + start
                        within[i, p] = apart[i, p] + j + k
                        positives_within[i, p] = k
                start, first, lowest = j + k, k, value
            highest = value
            tie = (math.sqrt(max(value + norm, 0.0)) + 2 * length) ** 2 * rounding
            if is_own:
                k += 1
            else:
                j += 1
        unsure[i] = not decided
