"""Exact thresholds among all impostor scores, in memory that the number of pairs does not set.

A threshold that accepts at most k impostors lies just above the impostor score of rank k + 1. Pairs drawn at random
tell a band of scores that holds it, all but surely. One float32 pass counts the scores above each band and keeps the
few within it; those that rounding could confuse are scored again in float64. The draw sets what that costs, never the
result: where a band turns out to miss its rank, or to hold too many ties to keep, two float64 passes follow, a
histogram and one of the bins that the ranks fall in, down to single steps of the score grid.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np
import torch

from .pair_scores import GRID, PairScores, to_keys

_MOST_KEPT = 2**22  # pairs within the bands; they take 12 bytes each
_SURE = 5  # standard deviations of a rank among the pairs drawn that a band reaches to either side
_AT_LEAST = 8  # pairs drawn that it reaches besides, where deviations are not those of a normal distribution
_BIN = 2**19  # grid steps in a bin of the histogram
_LOWEST_BIN = GRID // _BIN + 2  # bins below a score of zero; the first holds what is masked out


class _Undecided(Exception):
    """The bands do not tell the thresholds."""


def find_thresholds(
    pairs: PairScores, allowed: Sequence[int], given: Sequence[int]
) -> tuple[list[tuple[int, int]], list[int]]:
    """Find the lowest thresholds that accept at most so many impostors.

    Args:
        pairs: the pairs.
        allowed: the most impostors that each threshold may accept.
        given: other thresholds, as keys.
    Returns:
        ``(threshold, impostors accepted)`` for each of ``allowed``, and the impostors that each of ``given`` accepts.
        Thresholds are keys, see :func:`pml_compat.verification.pair_scores.to_keys`; they accept what equals them.
    """
    everything = (-GRID, pairs.impostors)
    ranks = sorted({count for count in allowed if count < pairs.impostors})
    if not ranks and not given:
        return [everything for _ in allowed], []
    try:
        found, accepted = _count_in_bands(pairs, ranks, given)
    except _Undecided:
        found, accepted = _count_in_bins(pairs, ranks, given)
    by_rank = dict(zip(ranks, found, strict=True))
    return [by_rank.get(count, everything) for count in allowed], accepted


def _float32_is_float32() -> bool:
    """Tell whether torch may not take float32 products in TF32 or bfloat16, which are not within float32_error."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by a newer switch, which this one refuses to read
        return False


def _count_in_bands(
    pairs: PairScores, ranks: list[int], given: Sequence[int]
) -> tuple[list[tuple[int, int]], list[int]]:
    if not _float32_is_float32():
        raise _Undecided
    error = pairs.float32_error
    bands = [_Band(key / GRID - error, key / GRID + error) for key in given]
    bands += _bands_of_ranks(pairs, ranks)

    def add(rows: slice, columns: slice, scores: torch.Tensor) -> None:
        values = scores.view(-1).cpu().numpy()  # whose comparisons are several times as fast as torch's on a CPU
        for band in bands:
            band.add(values, pairs, rows, columns)
        if sum(band.size for band in bands) > _MOST_KEPT:
            raise _Undecided

    pairs.over_impostor_blocks(add)
    accepted = [
        band.above + int((pairs.keys_of(band.pairs()) >= key).sum()) for band, key in zip(bands, given, strict=False)
    ]
    return [_resolve(pairs, band, rank) for band, rank in zip(bands[len(given) :], ranks, strict=True)], accepted


class _Band:
    """How many of a stream of scores are above a band, and those in it: above ``low``, at most ``high``."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.above = self.size = 0
        self._found = [(np.empty(0, np.float32), np.empty(0, np.int64))]
        self._lock = threading.Lock()

    def add(self, scores: np.ndarray, pairs: PairScores, rows: slice, columns: slice) -> None:
        """Take in the scores of a block; several threads may."""
        above, upwards = scores > self.high, scores > self.low
        n_above = int(np.count_nonzero(above))
        within = int(np.count_nonzero(upwards)) - n_above
        with self._lock:
            self.above, self.size = self.above + n_above, self.size + within
        if within:
            hits = np.flatnonzero(upwards != above)
            self._found.append((scores[hits], pairs.pair_numbers(rows, columns, hits)))

    def scores(self) -> np.ndarray:
        return np.concatenate([scores for scores, _ in self._found])

    def pairs(self) -> np.ndarray:
        return np.concatenate([pairs for _, pairs in self._found])


def _bands_of_ranks(pairs: PairScores, ranks: list[int]) -> list[_Band]:
    """Return for each rank a band of float32 scores that holds it, all but surely."""
    if not ranks:
        return []
    drawn = np.sort(pairs.draw_impostors(math.ceil(pairs.impostors ** (2 / 3) / 2)) / GRID)
    from_top = np.concatenate([[np.inf], drawn[::-1], [-np.inf]])  # the drawn score of rank i is at i, from 1
    bands, kept = [], 0.0
    for rank in ranks:
        share = (rank + 1) / pairs.impostors
        place, reach = share * len(drawn), _SURE * math.sqrt(share * (1 - share) * len(drawn)) + _AT_LEAST
        high = from_top[max(0, math.floor(place - reach))] + 3 * pairs.float32_error
        low = from_top[min(len(drawn) + 1, math.ceil(place + reach))] - 3 * pairs.float32_error
        bands.append(_Band(float(low), float(high)))
        kept += np.count_nonzero((drawn > low) & (drawn <= high)) / max(1, len(drawn)) * pairs.impostors
    if kept > _MOST_KEPT:
        raise _Undecided
    return bands


def _resolve(pairs: PairScores, band: _Band, rank: int) -> tuple[int, int]:
    """Tell by float64 which of the pairs around a float32 rank is there."""
    margin, scores = 2 * pairs.float32_error, band.scores()
    if not band.above <= rank < band.above + len(scores):
        raise _Undecided
    around = float(largest(scores, rank + 1 - band.above))
    if around - margin <= band.low or around + margin > band.high:
        raise _Undecided
    above = band.above + int((scores > around + margin).sum())
    keys = pairs.keys_of(band.pairs()[np.abs(scores - around) <= margin])
    refused = largest(keys, rank + 1 - above)
    return int(refused) + 1, above + int((keys > refused).sum())


def _count_in_bins(
    pairs: PairScores, ranks: list[int], given: Sequence[int]
) -> tuple[list[tuple[int, int]], list[int]]:
    coarse = np.zeros(2 * _LOWEST_BIN, np.int64)
    accepted = [0] * len(given)
    for _, _, scores in pairs.impostor_blocks(torch.float64):
        keys = to_keys(scores).view(-1)
        for place, key in enumerate(given):
            accepted[place] += count_true(keys >= key)
        bins = keys.div_(_BIN).floor_().add_(_LOWEST_BIN).clamp_(min=0).long()
        coarse += torch.bincount(bins, minlength=len(coarse)).cpu().numpy()
    coarse[0] = 0
    bin_of = {rank: _last_above(coarse, rank) for rank in ranks}
    fine = {place: np.zeros(_BIN, np.int64) for place in bin_of.values()}
    for _, _, scores in pairs.impostor_blocks(torch.float64) if ranks else ():
        keys = to_keys(scores).view(-1)
        for place, counts in fine.items():
            inside = keys - (place - _LOWEST_BIN) * _BIN
            inside = inside[(inside >= 0) & (inside < _BIN)].long()
            counts += torch.bincount(inside, minlength=_BIN).cpu().numpy()
    thresholds = []
    for rank, place in bin_of.items():
        above = int(coarse[place + 1 :].sum())
        threshold = _last_above(fine[place], rank - above) + 1
        key = (place - _LOWEST_BIN) * _BIN + threshold
        thresholds.append((key, above + int(fine[place][threshold:].sum())))
    return thresholds, accepted


def _last_above(counts: np.ndarray, rank: int) -> int:
    """Return the last place from which on ``counts`` sum up to more than ``rank``; -1 where there is none."""
    return int(np.count_nonzero(counts[::-1].cumsum() > rank)) - 1


def largest(values: np.ndarray, rank: int) -> np.generic:
    """Return the value of a rank, the largest being of rank 1."""
    return np.partition(values, len(values) - rank)[len(values) - rank]


def count_true(mask: torch.Tensor) -> int:
    """Count with NumPy, which is several times as fast as torch's sum on a CPU."""
    return int(np.count_nonzero(mask.cpu().numpy()))


def check_rates(value: float | Sequence[float], name: str) -> list[float]:
    """Return one or several rates as a list of floats above 0 and at most 1, each once."""
    values = list(value) if isinstance(value, Sequence | np.ndarray) else [value]
    if not values:
        raise ValueError(f"{name} must hold at least one rate, got none")
    for rate in values:
        if isinstance(rate, bool | str) or not isinstance(rate, int | float | np.number) or not 0 < rate <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {rate!r}")
    return list(dict.fromkeys(float(rate) for rate in values))


def number_allowed(rate: float, number: int) -> int:
    """Return the most of ``number`` whose share is at most ``rate``, as floats compare: 29 of 100 for 0.29."""
    count = math.floor(rate * number)
    return count + 1 if (count + 1) / number <= rate else count - (count / number > rate)
