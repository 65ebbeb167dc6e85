"""An evaluation of the queries of each group alone: who is better off, who is worse, and whose false accepts rise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..accuracy.items import as_values
from ..verification.verification import VerificationResult
from .doubts import points, threshold_warnings
from .evaluation import Backfill, Evaluation
from .names import METRICS

Verified = dict[str, VerificationResult] | None


def by_group(evaluation: Evaluation, groups: Any, verify: Callable[[torch.Tensor], Verified]) -> dict[str, Evaluation]:
    """Return the evaluation of each group's queries, on the same gallery.

    Args:
        evaluation: of all queries.
        groups: ``(Q,)`` the group of each; a missing one (None, NaN) is in none.
        verify: measures verification of some queries, with the thresholds of all.
    Raises:
        ValueError: another length.
    """
    values = as_values(groups, "groups")
    size = len(as_values(evaluation.labels, "query_labels"))
    if values.shape != (size,):
        raise ValueError(f"groups must have one entry a query: expected ({size},), got {values.shape}")
    names = np.array([None if value is None or value != value else str(value) for value in values.tolist()])
    found = {}
    for name in sorted({name for name in names if name is not None}):
        rows = torch.from_numpy(np.flatnonzero(names == name))
        if not bool(evaluation.pairs[next(iter(evaluation.pairs))]["precision_at_1"][rows].isnan().all()):
            found[name] = _of(evaluation, rows, verify(rows))
    return found


def _of(evaluation: Evaluation, rows: torch.Tensor, verified: Verified) -> Evaluation:
    """Return what was measured on some of the queries."""

    def some(per_query: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {metric: values[rows] for metric, values in per_query.items()}

    def backfill(curve: Backfill) -> Backfill:
        repeats = [[some(step) for step in one] for one in curve.repeats]
        return replace(curve, per_query=[some(step) for step in curve.per_query], repeats=repeats)

    pairs = {pair: some(values) for pair, values in evaluation.pairs.items()}
    scored = int((~next(iter(pairs.values()))["precision_at_1"].isnan()).sum())
    return Evaluation(
        data={**evaluation.data, "queries": len(rows), "scored_queries": scored, "chance": None},
        labels=as_values(evaluation.labels, "query_labels")[rows.numpy()],
        gallery_size=evaluation.gallery_size,
        pairs=pairs,
        backfill={start: backfill(curve) for start, curve in evaluation.backfill.items()},
        verification=verified,
        seed=evaluation.seed,
        margin=evaluation.margin,
    )


def group_warnings(evaluation: Evaluation, pair: str | None) -> list[str]:
    """Name the groups that are worse off with a pair, for sure, or for whom today's threshold does not hold."""
    out = []
    for name, one in evaluation.groups.items():
        differences = one.differences.get(pair or "", {})
        worse = [
            f"{METRICS[metric]} {points(found)}"
            for metric, found in differences.items()
            if found.high < 0 and found.p <= 1 - found.level
        ]
        if worse:
            out.append(f"Group {name} is worse off ({one.data['scored_queries']:,} queries): {'; '.join(worse)}.")
        out += [f"Group {name}: {sentence}" for sentence in threshold_warnings(one, pair or "")]
    return out
