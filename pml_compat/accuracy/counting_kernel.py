"""Compiled loops that count where positives stand among a query's scores (numba, extra ``fast``).

Each positive of a query is a threshold among the scores of its wrong items. A score's bucket, one multiplication, leads
through a table to the number of thresholds below it, so that hardly a score is compared with a threshold; those in the
bucket of one are. All arrays are C-contiguous, and all scores are finite.

A query's cells: ``LANES`` for scores below every threshold, one for those between two thresholds, ``LANES`` for those
above every threshold. Scores at either end take turns with their cells: a cell that is counted up twice in a row has to
wait for itself.
"""
# mypy: ignore-errors
# What numba compiles: the types are those of the machine, which Python's do not tell.

from __future__ import annotations

import numpy as np
from numba import njit

from .nearest_kernel import remove

LANES = 64  # a power of 2
_SAMPLED = 16  # one score of so many tells how many matter


@njit(nogil=True, cache=True)
def make_tables(
    own: np.ndarray,
    size: np.ndarray,
    tolerance: np.ndarray,
    largest: np.ndarray,
    low: np.ndarray,
    scale: np.ndarray,
    table: np.ndarray,
) -> None:
    """Make each query's way from buckets to cells.

    Args:
        own: ``(q, P)`` float32 thresholds, ascending in the first ``size`` of a row.
        size: ``(q,)`` int32.
        tolerance: ``(q,)`` float32: scores this near to a threshold may lie on either side of it.
        largest: ``(q,)`` float32, the largest absolute value of a score.
        low: ``(q,)`` float32, is filled: where buckets start.
        scale: ``(q,)`` float32, is filled: buckets to a unit of score.
        table: ``(q, LANES + buckets + LANES)`` uint16, is filled: twice the cell, and 1 more where scores of the bucket
            must be compared with thresholds.
    """
    buckets = table.shape[1] - 2 * LANES
    for i in range(len(own)):
        if size[i] == 0:
            continue
        start, stop = own[i, 0] - tolerance[i], own[i, size[i] - 1] + tolerance[i]
        # No finer than rounding, so that no score's bucket is past what int32 holds.
        unit = min(np.float32(buckets - 1) / (stop - start), np.float32(2**24) / largest[i])
        low[i], scale[i] = start, unit
        _fill_table(own[i, : size[i]], tolerance[i], start, unit, table[i], np.uint64(buckets))


@njit(nogil=True, cache=True)
def _fill_table(own: np.ndarray, near: float, low: float, scale: float, to_cell: np.ndarray, buckets: int) -> None:
    to_cell[:] = 0
    for k in range(len(own)):
        first = np.uint64(LANES) + np.uint64(np.int32(((own[k] - near) - low) * scale))
        last = np.uint64(LANES) + np.uint64(np.int32(((own[k] + near) - low) * scale))
        for bucket in range(first, last + np.uint64(1)):
            to_cell[bucket] |= np.uint16(1)
        to_cell[last + np.uint64(1)] += np.uint16(2)
    cell = np.uint16(2 * LANES)
    for bucket in range(np.uint64(LANES), np.uint64(LANES) + buckets):
        entry = to_cell[bucket]
        cell += entry & np.uint16(0xFFFE)
        to_cell[bucket] = cell | (entry & np.uint16(1))
    for lane in range(LANES):
        to_cell[lane] = 2 * lane
        to_cell[LANES + buckets + lane] = 2 * (LANES + len(own) + lane)


@njit(inline="always")
def _is_before(threshold: float, score: float, equal: bool) -> bool:
    return threshold < score or (equal and threshold == score)


@njit(inline="always")
def _first_from(own: np.ndarray, shift: float, score: float, start: int, stop: int, equal: bool = False) -> int:
    """Return the first threshold from ``start`` that, shifted, is at least ``score``, or with ``equal`` above it;
    ``stop`` where none is."""
    step = 1
    while start + step <= stop and _is_before(own[np.uint64(start + step - 1)] + shift, score, equal):
        start += step  # it is mostly among the next
        step *= 2
    stop = min(stop, start + step - 1)
    while start < stop:
        middle = (start + stop) >> 1
        if _is_before(own[np.uint64(middle)] + shift, score, equal):
            start = middle + 1
        else:
            stop = middle
    return start


@njit(nogil=True, cache=True)
def count_scores(
    scores: np.ndarray,
    column: int,
    items: np.ndarray,
    first: np.ndarray,
    length: np.ndarray,
    out_items: np.ndarray,
    out_first: np.ndarray,
    out_length: np.ndarray,
    own: np.ndarray,
    size: np.ndarray,
    tolerance: np.ndarray,
    largest: np.ndarray,
    low: np.ndarray,
    scale: np.ndarray,
    table: np.ndarray,
    counts: np.ndarray,
    shifts: np.ndarray,
    near_items: np.ndarray,
    n_near: np.ndarray,
) -> None:
    """Count a tile of scores, but for those of positives and of items that are not in the ranking.

    Args:
        scores: ``(q, n)`` float32, n at most 65,535; is overwritten.
        column: gallery row of the tile's first column.
        items: as for :func:`own_scores`, like the following.
        first: ``(q,)``.
        length: ``(q,)``.
        out_items: ...
        out_first: ``(q,)``.
        out_length: ``(q,)``.
        own: as for :func:`make_tables`, like the following.
        size: ``(q,)``.
        tolerance: ``(q,)``.
        largest: ``(q,)``.
        low: ``(q,)``.
        scale: ``(q,)``.
        table: ``(q, ...)``.
        counts: ``(q, 2 * (LANES + P + LANES))`` int32, added to: scores by entry of the table, those that were compared
            by the cell below the first threshold that is for sure not below them.
        shifts: ``(q, 4, P + 1)`` int32, added to: by how much these counts differ for the first threshold not below,
            for the first above, for the first that is for sure above, and without the scores near a threshold.
        near_items: ``(q, m)`` int32, gallery rows of scores near a threshold, added to while there is room.
        n_near: ``(q,)`` int32, added to: how many these are.
    """
    n = scores.shape[1]
    chosen = np.empty(n, dtype=np.float32)
    buckets = np.empty(n, dtype=np.uint16)
    compared = np.empty(n, dtype=np.uint16)
    columns = np.empty(n, dtype=np.uint16)
    for i in range(len(scores)):
        if size[i] == 0:
            continue
        row, to_cell, count, near = scores[i], table[i], counts[i], tolerance[i]
        far = 2 * largest[i]
        remove(row, column, items, first[i], length[i], far)
        remove(row, column, out_items, out_first[i], out_length[i], far)

        high = own[i, size[i] - 1] + near
        few = 16 * _estimate_up_to(row, high) < n  # scores that matter: these together
        values = chosen[: _pack(row, high, chosen, columns)] if few else row
        _find_buckets(values, low[i], scale[i], np.int32(len(to_cell) - LANES), buckets)
        n_compared = _count_cells(buckets[: len(values)], to_cell, count, compared)
        own_row, found = own[i, : size[i]], compared[:n_compared]
        start = n_near[i]
        n_near[i] += _compare(values, buckets, found, own_row, near, to_cell, count, shifts[i], near_items[i, start:])
        for place in range(start, min(n_near[i], near_items.shape[1])):
            j = near_items[i, place]
            near_items[i, place] = column + (columns[j] if few else j)


@njit(nogil=True, cache=True)
def _compare(
    values: np.ndarray,
    buckets: np.ndarray,
    compared: np.ndarray,
    own: np.ndarray,
    near: float,
    to_cell: np.ndarray,
    count: np.ndarray,
    shifts: np.ndarray,
    near_places: np.ndarray,
) -> int:
    """Count the scores in the bucket of a threshold by comparing them; list those near it, and return how many."""
    last, n_near = len(own), 0
    for place in range(len(compared)):
        j = np.uint64(compared[place])
        score = values[j]
        maybe = _first_from(own, near, score, np.int64(to_cell[np.uint64(buckets[j])] >> 1) - LANES, last)
        count[np.uint64(2 * (maybe + LANES))] += 1
        if maybe < last and own[maybe] - near <= score:
            for kind in range(4):
                shifts[kind, maybe] -= 1
            shifts[0, _first_from(own, np.float32(0), score, maybe, last)] += 1
            shifts[1, _first_from(own, np.float32(0), score, maybe, last, True)] += 1
            shifts[2, _first_from(own, -near, score, maybe, last, True)] += 1
            if n_near < len(near_places):
                near_places[n_near] = j
            n_near += 1
    return n_near


@njit(nogil=True, cache=True)
def _estimate_up_to(row: np.ndarray, high: float) -> int:
    """Return about how many scores are up to ``high``: it decides how they are counted, not what comes out."""
    found = np.int32(0)
    for j in range(0, len(row), _SAMPLED):
        found += np.int32(row[j] <= high)
    return _SAMPLED * found


@njit(nogil=True, cache=True)
def _find_buckets(values: np.ndarray, start: float, unit: float, top: int, buckets: np.ndarray) -> None:
    for j in range(len(values)):
        lane = np.int32(j & (LANES - 1))
        bucket = np.int32((values[j] - start) * unit) + np.int32(LANES)
        buckets[j] = np.uint16(min(max(bucket, lane), top + lane))


@njit(nogil=True, cache=True)
def _count_cells(buckets: np.ndarray, to_cell: np.ndarray, count: np.ndarray, compared: np.ndarray) -> int:
    """Count scores by their entry in the table; list the places of those to compare, and return how many."""
    n_compared = np.uint64(0)
    for j in range(len(buckets)):
        entry = to_cell[np.uint64(buckets[j])]
        count[np.uint64(entry)] += 1
        compared[n_compared] = j
        n_compared += np.uint64(entry & 1)
    return np.int64(n_compared)


@njit(nogil=True, cache=True)
def _pack(row: np.ndarray, high: float, chosen: np.ndarray, columns: np.ndarray) -> int:
    """Put the scores up to ``high`` and their columns together, and return how many there are."""
    n_chosen = np.uint64(0)
    for start in range(0, len(row), 16):
        stop = min(start + 16, len(row))
        found = False
        for j in range(start, stop):
            found |= row[j] <= high
        if found:
            for j in range(start, stop):
                chosen[n_chosen], columns[n_chosen] = row[j], j
                n_chosen += np.uint64(row[j] <= high)
    return np.int64(n_chosen)


@njit(nogil=True, cache=True)
def sum_counts(size: np.ndarray, counts: np.ndarray, shifts: np.ndarray, wrong: np.ndarray) -> None:
    """Turn counts into wrong items before each threshold, and set the counts back to zero.

    Args:
        size: ``(q,)`` int32.
        counts: what :func:`count_scores` filled.
        shifts: likewise.
        wrong: ``(q, 5, P)`` int32, is filled: the wrong items that may be as close, that are at most as far, that are
            closer, that are closer for sure, and of these the ones that are near no threshold.
    """
    for i in range(len(size)):
        total = np.int32(0)
        for lane in range(LANES):
            total += counts[i, 2 * lane]
        by_kind = np.zeros(4, dtype=np.int32)
        for k in range(size[i]):
            total += counts[i, 2 * (LANES + k)]
            wrong[i, 0, k] = total
            for kind in range(4):
                by_kind[kind] += shifts[i, kind, k]
                wrong[i, kind + 1, k] = total + by_kind[kind]
    counts[:] = 0
    shifts[:] = 0
