"""Ranking metrics by name: whole rankings', and those at any k, such as ``precision_at_20``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import torch

from .places import PositiveRanks
from .rank_metrics import (
    average_precision,
    discounted_gain,
    hit_rate,
    landmark_average_precision,
    precision,
    r_precision,
    recall,
    reciprocal_rank,
)

RANK_METRICS = (
    "precision_at_1",
    "mean_average_precision",
    "mean_average_precision_at_r",
    "mean_reciprocal_rank",
    "r_precision",
    "cmc_top_1",
    "cmc_top_5",
    "cmc_top_10",
)
_AT_K: dict[str, Callable[[PositiveRanks, int], torch.Tensor]] = {
    "precision_at": precision,
    "recall_at": recall,
    "cmc_top": hit_rate,
    "ndcg_at": discounted_gain,
    "mean_average_precision_at": landmark_average_precision,
}
_FIRST_POSITIVE = ("cmc_top", "mean_reciprocal_rank")


def split_name(name: str) -> tuple[str, int | None]:
    """Return a metric's name without its k, and the k: ``("ndcg_at", 10)``; the name and None where it has none."""
    family, _, k = name.rpartition("_")
    if family in _AT_K and k.isascii() and k.isdecimal() and k[0] != "0":
        return family, int(k)
    return name, None


def is_ranked(name: str) -> bool:
    """Tell whether a metric is made from the ranks of positives."""
    return name in RANK_METRICS or split_name(name)[1] is not None


def needs_first_positive_alone(names: Iterable[str]) -> bool:
    """Tell whether the metrics look at nothing but the place of each query's nearest positive."""
    return all(name == "precision_at_1" or split_name(name)[0] in _FIRST_POSITIVE for name in names)


def places(names: Iterable[str], k: int | None) -> set[int]:
    """Return the places at which the metrics cut rankings off: ``k``, and what the names say."""
    own = {split_name(name)[1] for name in names} | {k}
    return {place for place in own if place is not None}


def depth(names: Iterable[str], k: int | None) -> int | None:
    """Return how much of a ranking the metrics look at; None, all of it."""
    if k is None and any(split_name(name)[1] is None for name in names):
        return None
    return max(places(names, k), default=None)


def score(
    ranks: Iterator[tuple[torch.Tensor, PositiveRanks]], names: Collection[str], k: int | None, n_query: int
) -> dict[str, torch.Tensor]:
    """Score queries chunk by chunk; only one number a query and metric is kept, and ``relevant``, its positives."""
    scores: dict[str, torch.Tensor] = {}
    for numbers, chunk in ranks:
        add_scores(scores, numbers, chunk, names, k, n_query)
    return scores


def add_scores(
    scores: dict[str, torch.Tensor],
    numbers: torch.Tensor,
    ranks: PositiveRanks,
    names: Collection[str],
    k: int | None,
    n_query: int,
) -> None:
    """Put the metrics of some queries, and how many positives they have, into the ``(Q,)`` scores."""
    found = {"relevant": ranks.relevant, **{name: _one(name, ranks, k) for name in names}}
    for name, values in found.items():
        scores.setdefault(name, values.new_zeros(n_query))[numbers] = values


def without_lone(scores: dict[str, torch.Tensor], names: Collection[str]) -> dict[str, torch.Tensor]:
    """Return ``(Q,)`` metrics in float64 on the CPU, NaN for queries that have no positive."""
    lone = scores["relevant"] == 0
    return {name: scores[name].double().masked_fill(lone, torch.nan).cpu() for name in names}


def _one(name: str, ranks: PositiveRanks, k: int | None) -> torch.Tensor:
    family, own_k = split_name(name)
    if own_k is not None:
        return _AT_K[family](ranks, own_k)
    if name == "mean_average_precision_at_r":
        return average_precision(ranks, ranks.relevant if k is None else ranks.relevant.clamp_max(k))
    whole = {
        "mean_average_precision": average_precision,
        "mean_reciprocal_rank": reciprocal_rank,
        "r_precision": r_precision,
    }
    return whole[name](ranks, k)
