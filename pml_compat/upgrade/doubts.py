"""What makes one doubt an evaluation: patterns that cannot be right, and thresholds that do not hold."""

from __future__ import annotations

import math

from .bootstrap import BootstrapInterval
from .evaluation import Evaluation, mean

_FALSE_ACCEPTS = 2.0  # times what was promised: from here on the old threshold does not hold
_FEW_ACCEPTS = 10  # false accepts that may be chance
_LOST_ACCEPTS = 0.05  # of the genuine pairs, at the old threshold
_NOTABLE = 0.05  # difference in accuracy between pairs that is pointed out


def impossible(evaluation: Evaluation) -> list[str]:
    """Name patterns that no pair of working models shows."""
    found = []
    chance = evaluation.data.get("chance")
    old = evaluation.pairs["old_to_old"]["precision_at_1"]
    value, n_scored = mean(old), int((~old.isnan()).sum())
    if chance is not None:
        spread = 3 * math.sqrt(chance * (1 - chance) / n_scored)
        if value <= chance + spread and chance < 0.5 and spread < 0.25:
            found.append(
                f"Old queries find the stored gallery no better than chance: P@1 {value:.1%}, where chance is "
                f"{chance:.1%}. Are the rows of old_queries in another order than those of queries, or other items?"
            )
    reached = {pair: mean(values["precision_at_1"]) for pair, values in evaluation.pairs.items()}
    other, new = reached.get("old_to_new", 0.0), reached.get("new_to_new", 1.0)
    # A compatible new model's own gallery may serve old queries better, but then it serves new ones best of all.
    if other > value + _NOTABLE and new <= reached.get("new_to_old", 0.0):
        found.append(
            f"Old queries find the new gallery better than the stored one: P@1 {other:.1%} against {value:.1%}. Are "
            "the two galleries exchanged, or are the old queries the new ones?"
        )
    return found


def new_gallery_warning(evaluation: Evaluation) -> list[str]:
    """Say where the new model finds its own gallery far worse than the old model finds its own."""
    new = evaluation.differences.get("new_to_new")
    if new is None or new["precision_at_1"].high > -_NOTABLE:
        return []
    return [
        f"New queries on the new gallery are {points(new['precision_at_1'])} from old/old in P@1: the new model is "
        "worse than the old one on its own gallery, or new_gallery is broken (other rows, another model or other "
        "preprocessing)."
    ]


def threshold_warnings(evaluation: Evaluation, pair: str) -> list[str]:
    """Say what today's thresholds would do, where they do not hold."""
    found: list[str] = []
    measured = evaluation.verification or {}
    if pair not in measured or "old_to_old" not in measured:
        return found
    for far, point in measured[pair].at_threshold.items():
        old, anew = measured["old_to_old"], measured[pair].at_far[far]
        before = old.at_threshold.get(far, old.at_far[far])  # of a group, at the threshold of all
        accepts = point.far * measured[pair].impostor_pairs
        if point.far > _FALSE_ACCEPTS * max(far, before.far) and accepts > _FEW_ACCEPTS:
            what = f"false accepts go from {before.far:.2%} to {point.far:.2%}"
        elif point.tar < before.tar - _LOST_ACCEPTS:
            what = f"true accepts go from {before.tar:.1%} to {point.tar:.1%}"
        else:
            continue
        found.append(
            f"Do not keep the threshold of {before.threshold:.4f} (FAR {far:g}): with it {what}; set it to "
            f"{anew.threshold:.4f}, where {anew.tar:.1%} of the genuine pairs are accepted."
        )
    return found


def points(interval: BootstrapInterval) -> str:
    """Return a difference and its interval, in percentage points."""
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * interval.estimate:+.1f} points, {interval.level:.0%} interval {low:+.1f} to {high:+.1f}"
