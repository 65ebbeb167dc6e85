"""Retrieval metrics of single queries, from the ranks of their positives.

Where items tie, no order among them is assumed: average precision counts as scikit-learn's
``average_precision_score`` (precision at the end of the tie), the others take the expectation over random orders,
or, for the reciprocal rank, the expected first place.
"""

from __future__ import annotations

import torch

from .places import PositiveRanks


def average_precision(ranks: PositiveRanks, k: int | torch.Tensor | None = None) -> torch.Tensor:
    r"""Return :math:`\frac{1}{R} \sum_{hits} \frac{\text{hits up to here}}{\text{rank}}`, cut off after rank k.

    ``R`` is the number of positives, within the first k or not: PML's denominator. ``k=R`` gives AP@R.
    """
    precision = ranks.precision if k is None else ranks.precision * _chance_within(ranks, k)
    return precision.sum(1) / ranks.relevant


def landmark_average_precision(ranks: PositiveRanks, k: int) -> torch.Tensor:
    r"""Return :func:`average_precision` at k with the denominator :math:`\min(R, k)`, so that 1 can be reached.

    That of landmark retrieval (Weyand et al., "Google Landmarks Dataset v2", CVPR 2020, mAP@100).
    """
    return average_precision(ranks, k) * ranks.relevant / ranks.relevant.clamp(1, k)


def precision(ranks: PositiveRanks, k: int) -> torch.Tensor:
    """Return the share of the first k places that positives hold, of k places even where the ranking has fewer."""
    if k == 1:
        return hit_rate(ranks, 1)  # which looks at the first positive alone
    return _chance_within(ranks, k).sum(1, dtype=torch.float64) / k


def recall(ranks: PositiveRanks, k: int) -> torch.Tensor:
    """Return the share of the positives that stand in the first k places; :func:`hit_rate` asks for any of them."""
    return _chance_within(ranks, k).sum(1, dtype=torch.float64) / ranks.relevant.clamp_min(1)


def discounted_gain(ranks: PositiveRanks, k: int) -> torch.Tensor:
    r"""Return nDCG at k, a positive's gain being 1.

    .. math:: \sum_{hits} \frac{1}{\log_2(\text{rank} + 1)} \Big/ \sum_{i=1}^{\min(R, k)} \frac{1}{\log_2(i + 1)}

    Reference:
        Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", TOIS 2002; ties as in McSherry and
        Najork, ECIR 2008.
    """
    k = min(k, int(torch.maximum(ranks.within.amax(), ranks.relevant.amax()).clamp_min(1)))
    places = torch.arange(2, k + 2, dtype=torch.float64, device=ranks.closer.device)
    gained = torch.nn.functional.pad((1 / places.log2()).cumsum(0), (1, 0))  # by the first 0, 1, ... k places
    size = (ranks.within - ranks.closer).clamp_min(1)
    own = (gained[ranks.within.clamp_max(k)] - gained[ranks.closer.clamp_max(k)]) / size
    return (own * ranks.valid).sum(1) / gained[ranks.relevant.clamp(1, k)]


def r_precision(ranks: PositiveRanks, k: int | None = None) -> torch.Tensor:
    """Return the share of the first R places that positives hold; R is their number, or k where that is less."""
    places = ranks.relevant if k is None else ranks.relevant.clamp_max(k)
    return _chance_within(ranks, places).sum(1, dtype=torch.float64) / places


def hit_rate(ranks: PositiveRanks, k: int) -> torch.Tensor:
    """Return CMC at k: whether one of the first k places holds a positive, or the chance of it where items tie."""
    before, size, positives = _first_group(ranks)
    if k == 1:
        return torch.where(ranks.valid[:, 0] & (before == 0), positives / size, 0.0)
    if bool((size == positives).all()):  # the nearest item is right for sure, wherever it stands
        return ((before < k) & ranks.valid[:, 0]).double()
    slots = (k - before).clamp_min(0).minimum(size)
    # Of the ways to fill the slots from the tied items, those without a positive: C(size - positives, slots).
    wrong = size - positives
    log_miss = _log_choose(wrong, slots.minimum(wrong)) - _log_choose(size, slots)
    miss = torch.where(slots > wrong, 0.0, log_miss.exp())
    miss = torch.where(positives == size, (slots == 0).double(), miss)
    return torch.where(ranks.valid[:, 0], 1 - miss, 0.0)


def reciprocal_rank(ranks: PositiveRanks, k: int | None = None) -> torch.Tensor:
    """Return one over the place of the first positive; 0 where it is past k."""
    before, size, positives = _first_group(ranks)
    place = before + (size + 1) / (positives + 1)
    found = ranks.valid[:, 0] if k is None else ranks.valid[:, 0] & (place <= k)
    return torch.where(found, 1 / place, 0.0)


def _chance_within(ranks: PositiveRanks, places: int | torch.Tensor) -> torch.Tensor:
    """The chance of each positive to stand in the first ``places``: 0 or 1 but for ties across the border."""
    if isinstance(places, torch.Tensor):
        places = places[:, None]
    may = (ranks.closer < places) & ranks.valid
    across = may & (ranks.within > places)
    if not bool(across.any()):
        return may
    chance = may.double()
    size = (ranks.within - ranks.closer)[across].double()
    chance[across] = (places - ranks.closer)[across].double() / size
    return chance


def _first_group(ranks: PositiveRanks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each query: the items before its nearest positive, those tied with it, and the positives among these."""
    before = ranks.closer[:, 0].double()
    return before, (ranks.within[:, 0] - before).clamp_min(1), ranks.positives_within[:, 0].double().clamp_min(1)


def _log_choose(n: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
