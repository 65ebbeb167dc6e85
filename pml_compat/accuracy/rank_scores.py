"""The ranking metrics by name, and a score of each query for each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch

from .places import PositiveRanks
from .rank_metrics import average_precision, hit_rate, r_precision, reciprocal_rank


def _average_precision_at_r(ranks: PositiveRanks, k: int | None) -> torch.Tensor:
    return average_precision(ranks, ranks.relevant if k is None else ranks.relevant.clamp_max(k))


_METRICS: dict[str, Callable[[PositiveRanks, int | None], torch.Tensor]] = {
    "precision_at_1": lambda ranks, _: hit_rate(ranks, 1),
    "mean_average_precision": average_precision,
    "mean_average_precision_at_r": _average_precision_at_r,
    "mean_reciprocal_rank": reciprocal_rank,
    "r_precision": r_precision,
    "cmc_top_1": lambda ranks, _: hit_rate(ranks, 1),
    "cmc_top_5": lambda ranks, _: hit_rate(ranks, 5),
    "cmc_top_10": lambda ranks, _: hit_rate(ranks, 10),
}
RANK_METRICS = tuple(_METRICS)
FIRST_ONLY = {"precision_at_1", "cmc_top_1"}  # what the nearest item alone tells


def score_queries(
    ranks: Iterator[tuple[torch.Tensor, PositiveRanks]], k: int | None, n_query: int, metrics: Collection[str]
) -> dict[str, torch.Tensor]:
    """Score queries chunk by chunk; only one number a query and metric is kept."""
    scores: dict[str, torch.Tensor] = {}
    for numbers, chunk in ranks:
        add_scores(scores, numbers, chunk, k, n_query, metrics)
    return scores


def add_scores(
    scores: dict[str, torch.Tensor],
    numbers: torch.Tensor,
    ranks: PositiveRanks,
    k: int | None,
    n_query: int,
    metrics: Collection[str],
) -> None:
    """Put the metrics of some queries, and how many positives they have, into the ``(Q,)`` scores."""
    found = {"relevant": ranks.relevant} | {name: _METRICS[name](ranks, k) for name in metrics}
    for name, values in found.items():
        scores.setdefault(name, values.new_zeros(n_query))[numbers] = values


def without_lone(scores: dict[str, torch.Tensor], metrics: Collection[str]) -> dict[str, torch.Tensor]:
    """Return ``(Q,)`` metrics in float64 on the CPU, NaN for queries that have no positive."""
    lone = scores["relevant"] == 0
    return {name: scores[name].double().masked_fill(lone, torch.nan).cpu() for name in metrics}
