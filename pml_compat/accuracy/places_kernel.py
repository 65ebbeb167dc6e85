"""Compiled loops over the positives of queries (numba, extra ``fast``): their scores, and from counts their places.

All arrays are C-contiguous, and all scores are finite.
"""
# mypy: ignore-errors
# What numba compiles: the types are those of the machine, which Python's do not tell.

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _dot(left: np.ndarray, right: np.ndarray) -> float:
    total = np.float32(0)
    for place in range(len(left)):
        total += left[place] * right[place]
    return total


@njit(nogil=True, cache=True)
def own_scores(
    query: np.ndarray,
    rows: np.ndarray,
    half_norms: np.ndarray,
    items: np.ndarray,
    first: np.ndarray,
    length: np.ndarray,
    out_items: np.ndarray,
    out_first: np.ndarray,
    out_length: np.ndarray,
    own: np.ndarray,
    own_items: np.ndarray,
    size: np.ndarray,
) -> None:
    """Score the positives of each query that are in its ranking.

    Args:
        query: ``(q, D)`` float32.
        rows: ``(N, D)`` float32.
        half_norms: ``(N,)`` float32, half the squared lengths; empty where they do not matter.
        items: int64, rows of positives: query i's, ascending, are ``length[i]`` from ``first[i]``.
        first: ``(q,)`` int64.
        length: ``(q,)`` int64.
        out_items: what is not in a ranking, told in the same way.
        out_first: ``(q,)``.
        out_length: ``(q,)``.
        own: ``(q, P)`` float32, is filled; with infinity after the last.
        own_items: ``(q, P)`` int32, their rows, is filled.
        size: ``(q,)`` int32, how many there are, is filled.
    """
    for i in range(len(query)):
        place = 0
        out, end = out_first[i], out_first[i] + out_length[i]
        for entry in range(first[i], first[i] + length[i]):
            item = items[entry]
            while out < end and out_items[out] < item:
                out += 1
            if out < end and out_items[out] == item:
                continue
            score = -_dot(query[i], rows[item])
            own[i, place] = score + half_norms[item] if len(half_norms) else score
            own_items[i, place] = item
            place += 1
        size[i] = place
        own[i, place:] = np.inf


@njit(nogil=True, cache=True)
def find_places(
    own: np.ndarray,
    size: np.ndarray,
    tolerance: np.ndarray,
    wrong: np.ndarray,
    cuts: np.ndarray,
    first_places: int,
    change: float,
    closer: np.ndarray,
    within: np.ndarray,
    positives_within: np.ndarray,
    unsure: np.ndarray,
) -> None:
    """Find the places of positives, and for which queries rounding could show in a metric.

    The rules are those of ``places.unsure_queries``.

    Args:
        own: ``(q, P)`` float32, ascending.
        size: ``(q,)`` int32.
        tolerance: ``(q,)`` float32.
        wrong: what :func:`sum_counts` filled.
        cuts: ``(c,)`` int64, places at which rankings are cut off.
        first_places: among these no order is left to rounding.
        change: share of average precision, or of the reciprocal rank, that is.
        closer: ``(q, P)`` int32, is filled, like the following.
        within: ``(q, P)`` int32.
        positives_within: ``(q, P)`` int32.
        unsure: ``(q,)`` bool.
    """
    for i in range(len(own)):
        last, near, thresholds = size[i], tolerance[i], own[i]
        before = up_to = surely_before = maybe_up_to = 0
        precisions = changes = 0.0
        doubt = False
        for k in range(last):
            score = thresholds[k]
            while thresholds[before] < score:
                before += 1
            while up_to < last and thresholds[up_to] <= score:
                up_to += 1
            while thresholds[surely_before] < score - near:
                surely_before += 1
            while maybe_up_to < last and thresholds[maybe_up_to] <= score + near:
                maybe_up_to += 1
            closer[i, k] = wrong[i, 2, k] + before
            within[i, k] = wrong[i, 1, k] + up_to
            positives_within[i, k] = up_to
            least_closer, most_within = wrong[i, 3, k] + surely_before, wrong[i, 0, k] + maybe_up_to
            precision = up_to / within[i, k]
            precisions += precision
            if most_within - least_closer == 1:
                continue
            least = (surely_before + 1) / (surely_before + 1 + wrong[i, 0, k])
            most = maybe_up_to / (maybe_up_to + wrong[i, 3, k])
            changes += max(most - precision, precision - least)
            doubt |= least_closer < first_places
            doubt |= least_closer < last < most_within
            for cut in cuts:
                doubt |= least_closer < cut < most_within
                doubt |= least_closer < min(cut, last) < most_within
            if k == 0:
                doubt |= (most_within - least_closer - 1) / most_within > change
        unsure[i] = doubt or changes > change * precisions
        for k in range(last, own.shape[1]):
            closer[i, k] = within[i, k] = positives_within[i, k] = 0


@njit(nogil=True, cache=True)
def choose_thresholds(
    own: np.ndarray,
    order: np.ndarray,
    items: np.ndarray,
    size: np.ndarray,
    replaced: int,
    wrong: np.ndarray,
    chosen: np.ndarray,
    chosen_wrong: np.ndarray,
) -> None:
    """Take, of each positive's old and new threshold, the one that a gallery has of which the first rows are new.

    Args:
        own: ``(q, 2 P)`` float32, ascending: old and new thresholds, two of each positive.
        order: ``(q, 2 P)`` int64, which these are: column p the old one of positive p, column ``P + p`` its new one.
        items: ``(q, P)`` int32, the positives' rows.
        size: ``(q,)`` int32, how many positives there are.
        replaced: how many rows are new.
        wrong: ``(q, 5, 2 P)`` int32.
        chosen: ``(q, P)`` float32, is filled.
        chosen_wrong: ``(q, 5, P)`` int32, is filled.
    """
    width = items.shape[1]
    for i in range(len(own)):
        place = 0
        for k in range(2 * size[i]):
            new = order[i, k] >= width
            if new == (items[i, order[i, k] - width * new] < replaced):
                chosen[i, place] = own[i, k]
                for kind in range(5):
                    chosen_wrong[i, kind, place] = wrong[i, kind, k]
                place += 1
