"""The parts of an evaluation as strict JSON has them: numbers, text, lists and null.

``metrics.json`` is strict JSON; accuracies, differences and rates are fractions, and what is undefined is null::

    {
      "pml_compat": version,
      "data": {"queries", "scored_queries", "gallery", "classes", "widths": {file: width}, "files": {file: path},
               "normalized", "same_items": "position" | "id" | null, "cameras", "k", "seed"},
      "pairs": {pair: {metric: value, ..., "cmc": [at 1, at 2, ...]}},
      "differences": {pair: {metric: INTERVAL}},            less old_to_old, over the same queries
      "update_gain": {pair: {metric: INTERVAL}},            share of what re-embedding everything would bring
      "negative_flips": {pair or "backfill": {"rate", "positive_rate", "relative_rate", "queries", "left_out",
                                              "worst": [{"label", "flips", "queries"}]}},
      "backfill": {start: {"order", "fractions": [], "vectors": [], "values": {metric: []}, "area": {metric: value},
                           "differences": {metric: [INTERVAL]}}},
      "criterion": {"same_label", "different_label", "n_same_label", "n_different_label"} | null,
      "verification": {pair: {"at_far": {FAR: POINT}, "at_old_threshold": {FAR: POINT}, "genuine_pairs",
                              "impostor_pairs"}} | null,
      "verdict": {"outcome", "certain", "share", "share_range": [low, high], "vectors", "start", "queries_needed",
                  "title", "summary", "reasons": [], "warnings": [], "missing": []},
      "groups": {group: all of this, of its queries},
      "notes": [], "suspicions": []
    }

A pair is ``old_to_old``, ``new_to_old``, ``new_to_transformed_old``, ``new_to_new`` or ``old_to_new``, the query's
model first; ``rotated_to_old`` and ``blended_to_old`` (:class:`pml_compat.serving.QueryBlend`); ``two_stages_10``, the
10 nearest of old/old in the new model's order, of P@1 and mAP alone. A start is ``old`` or ``transformed_old``.
INTERVAL is ``{"estimate", "low", "high", "probability", "level", "queries", "left_out", "classes", "p"}``
(:class:`pml_compat.upgrade.BootstrapInterval`), POINT ``{"threshold", "far", "tar"}``. What needs ``--old-queries`` or
a gallery that was not given is an empty object, or null. ``outcome`` is ``swap_now``, ``swap_with_a_new_threshold``,
``swap_with_transformed_gallery``, ``blend_queries``, ``search_in_two_stages``, ``backfill_first``, ``do_not_upgrade``,
``not_enough_queries``, or null without ``--old-queries`` and where the input cannot be right.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from ..verification.verification import VerificationResult
from .bootstrap import BootstrapInterval
from .names import METRICS
from .negative_flips import NegativeFlips

if TYPE_CHECKING:
    from .evaluation import Evaluation


def flips_to_json(flips: NegativeFlips) -> dict[str, Any]:
    """Return rates and the worst classes."""
    return {
        "rate": flips.rate,
        "positive_rate": flips.positive_rate,
        "relative_rate": flips.relative_rate,
        "queries": flips.queries,
        "left_out": flips.left_out,
        "worst": [one._asdict() for one in flips.worst()],
    }


def without_nan(value: Any) -> Any:
    """Return nested dicts and lists with None for NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def interval_to_json(found: BootstrapInterval) -> dict[str, Any]:
    """Return everything but what no difference has."""
    values = dataclasses.asdict(found)
    del values["undefined"]
    return values


def intervals_to_json(found: dict[str, BootstrapInterval]) -> dict[str, Any]:
    """Return :func:`interval_to_json` of each metric."""
    return {metric: interval_to_json(one) for metric, one in found.items()}


def verification_to_json(found: VerificationResult) -> dict[str, Any]:
    """Return the points by FAR, as text."""
    return {
        "at_far": {f"{far:g}": dataclasses.asdict(point) for far, point in found.at_far.items()},
        "at_old_threshold": {f"{far:g}": dataclasses.asdict(point) for far, point in found.at_threshold.items()},
        "genuine_pairs": found.genuine_pairs,
        "impostor_pairs": found.impostor_pairs,
    }


def measured_to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return what was measured, without the verdict."""
    return {
        "data": evaluation.data,
        "pairs": {
            pair: {metric: evaluation.accuracy(pair, metric) for metric in values}
            | ({"cmc": evaluation.cmc(pair)} if "mean_reciprocal_rank" in values else {})
            for pair, values in evaluation.pairs.items()
        },
        "differences": {pair: intervals_to_json(found) for pair, found in evaluation.differences.items()},
        "update_gain": {pair: intervals_to_json(found) for pair, found in evaluation.gains.items()},
        "negative_flips": {pair: flips_to_json(found) for pair, found in evaluation.pair_flips.items()},
        "backfill": {start: _backfill_to_json(evaluation, start) for start in evaluation.backfill},
        "criterion": None if evaluation.criterion is None else dataclasses.asdict(evaluation.criterion),
        "verification": None
        if evaluation.verification is None
        else {pair: verification_to_json(found) for pair, found in evaluation.verification.items()},
        "groups": {name: one.to_json() for name, one in evaluation.groups.items()},
        "notes": evaluation.notes,
        "suspicions": evaluation.suspicions,
    }


def _backfill_to_json(evaluation: Evaluation, start: str) -> dict[str, Any]:
    curve = evaluation.backfill[start]
    steps = evaluation.backfill_differences.get(start, [])
    return {
        "order": curve.order,
        "fractions": list(curve.fractions),
        "vectors": list(curve.vectors),
        "values": {metric: curve.values(metric) for metric in METRICS},
        "area": {metric: curve.area(metric) for metric in METRICS},
        "differences": {metric: [interval_to_json(step[metric]) for step in steps] for metric in METRICS}
        if steps
        else {},
    }
