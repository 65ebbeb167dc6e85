"""Exact thresholds among all impostor scores, in memory that the number of pairs does not set.

A threshold that accepts at most k impostors lies just above the impostor score of rank k + 1. Small ranks are found in
one float32 pass that keeps the largest scores seen so far, and scores the few pairs that rounding could confuse again
in float64. Large ranks, and ties too many to keep, take two float64 passes: a histogram, then one of the bins that the
ranks fall in, down to single steps of the score grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .pair_scores import GRID, PairScores, to_keys

_MOST_KEPT = 2**22  # the largest rank of the one-pass search; its buffers take 24 bytes a rank
_SPARE = 2**16
_BIN = 2**19  # grid steps in a bin of the histogram
_LOWEST_BIN = GRID // _BIN + 2  # bins below a score of zero; the first holds what is masked out


class _TooManyToKeep(Exception):
    pass


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
    search = _select if max(ranks, default=0) < _MOST_KEPT and _float32_is_float32() else _count_in_bins
    try:
        found, accepted = search(pairs, ranks, given)
    except _TooManyToKeep:
        found, accepted = _count_in_bins(pairs, ranks, given)
    by_rank = dict(zip(ranks, found, strict=True))
    return [by_rank.get(count, everything) for count in allowed], accepted


def _float32_is_float32() -> bool:
    """Tell whether torch may not take float32 products in TF32 or bfloat16, which are not within float32_error."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by a newer switch, which this one refuses to read
        return False


def _select(pairs: PairScores, ranks: list[int], given: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    error = pairs.float32_error
    top = _Largest(ranks[-1] + 1, 2 * error) if ranks else None
    counts = [_AcceptedBy(key / GRID, error) for key in given]
    for rows, columns, scores in pairs.impostor_blocks(torch.float32):
        flat = scores.view(-1)
        if top is not None:
            hits = np.flatnonzero((flat > top.bar).cpu().numpy())
            found = flat[torch.from_numpy(hits).to(flat.device)].cpu().numpy()
            top.add(found, pairs.pair_numbers(rows, columns, hits))
        for count in counts:
            hits = count.add(flat)
            if len(hits):
                count.near.append(pairs.pair_numbers(rows, columns, hits))
    thresholds = [] if top is None else [_resolve(pairs, top, rank, 2 * error) for rank in ranks]
    accepted = []
    for count, key in zip(counts, given, strict=True):
        near = pairs.keys_of(np.concatenate([np.empty(0, np.int64), *count.near]))
        accepted.append(count.above + int((near >= key).sum()))
    return thresholds, accepted


class _Largest:
    """The ``count`` largest of a stream of scores, with all that are within ``margin`` of the smallest of them."""

    def __init__(self, count: int, margin: float) -> None:
        self.bar = -np.inf  # scores up to here are of no interest any more
        self._count, self._margin, self._size = count, margin, 0
        self._scores = np.empty(2 * count + _SPARE, np.float32)
        self._pairs = np.empty(2 * count + _SPARE, np.int64)

    @property
    def scores(self) -> np.ndarray:
        return self._scores[: self._size]

    @property
    def pairs(self) -> np.ndarray:
        return self._pairs[: self._size]

    def add(self, scores: np.ndarray, pairs: np.ndarray) -> None:
        while len(scores):
            part = slice(0, len(self._scores) - self._size)
            end = self._size + len(scores[part])
            self._scores[self._size : end], self._pairs[self._size : end] = scores[part], pairs[part]
            self._size = end
            if end < len(self._scores):
                return
            self._compact()
            rest = scores[part.stop :] > self.bar
            scores, pairs = scores[part.stop :][rest], pairs[part.stop :][rest]

    def _compact(self) -> None:
        self.bar = float(largest(self.scores, self._count)) - self._margin
        kept = self.scores > self.bar
        scores, pairs = self.scores[kept], self.pairs[kept]
        if len(scores) > 0.75 * len(self._scores):
            raise _TooManyToKeep
        self._size = len(scores)
        self._scores[: self._size], self._pairs[: self._size] = scores, pairs


class _AcceptedBy:
    """How many of a stream of scores are above a threshold for certain, and which are too near to it to tell."""

    def __init__(self, threshold: float, error: float) -> None:
        self.above = 0
        self.near: list[np.ndarray] = []
        self._certain, self._possible = threshold + error, threshold - error
        self._room = _MOST_KEPT

    def add(self, scores: torch.Tensor) -> np.ndarray:
        """Count the scores, and return the positions of those that are too near."""
        certain, possible = ((scores > bound).cpu().numpy() for bound in (self._certain, self._possible))
        above, candidates = np.count_nonzero(certain), np.count_nonzero(possible)
        self.above += int(above)
        self._room -= int(candidates - above)
        if self._room < 0:
            raise _TooManyToKeep
        return np.flatnonzero(certain != possible) if above < candidates else np.empty(0, np.int64)


def _resolve(pairs: PairScores, kept: _Largest, rank: int, margin: float) -> tuple[int, int]:
    """Tell by float64 which of the pairs around a float32 rank is there."""
    around = float(largest(kept.scores, rank + 1))
    above = int((kept.scores > around + margin).sum())
    keys = pairs.keys_of(kept.pairs[np.abs(kept.scores - around) <= margin])
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
