"""The parts of an evaluation as strict JSON has them: numbers, text, lists and null."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..verification.verification import VerificationResult
from .bootstrap import BootstrapInterval
from .negative_flips import NegativeFlips


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
