"""What one of several methods came to, in words that a team can act on."""

from __future__ import annotations

import statistics

from ..upgrade.comparison import Comparison
from ..upgrade.names import METRICS
from .comparison_table import gain_in_words


def method_in_words(comparison: Comparison, method: str) -> str:
    """Return one paragraph: does the criterion hold, by how much, how sure, and what it cost the new model."""
    met = [all(seed) for seed in zip(*(comparison.holds(method, metric) for metric in METRICS), strict=True)]
    seeds = f"in {sum(met)} of {len(met)} seeds" if len(met) > 1 else "in the one seed run"
    mapped = comparison.served[method] == "new_to_transformed_old"
    gallery = "the transformed old gallery" if mapped else "the old gallery"
    if all(met):
        opening = f"{method}: compatible. New queries find {gallery} better than old queries did, {seeds}"
    elif any(met):
        opening = f"{method}: not reliably compatible. The criterion holds {seeds}"
    else:
        opening = f"{method}: not compatible. New queries find {gallery} no better than old queries did"
    sentences = [f"{opening}: {'; '.join(_against_old(comparison, method, metric) for metric in METRICS)}."]
    if any(met):
        surely = sum(comparison.holds_surely(method))
        sentences.append(f"By 95% intervals over the queries it is better for sure in {surely} of {len(met)}.")
    if method != "independent":
        gain = ", ".join(f"{METRICS[m]} {gain_in_words(comparison, method, m)}" for m in METRICS)
        sentences.append(f"Update gain (1 is as good as re-embedding everything): {gain}.")
        if comparison.has_own_gallery(method):
            cost = ", ".join(f"{METRICS[m]} {_points(_cost(comparison, method, m))}" for m in METRICS)
            sentences.append(f"New queries on a new gallery, against the independent model: {cost}.")
        else:
            sentences.append("The new model is the independent one, as it was.")
    return " ".join(sentences)


def _against_old(comparison: Comparison, method: str, metric: str) -> str:
    new, old = (statistics.fmean(values) for values in (comparison.cross(method, metric), comparison.old(metric)))
    text = f"{METRICS[metric]} {new:.1%} against {old:.1%} ({_points(new - old)})"
    chance = comparison.chance()
    return text if chance is None or new > 2 * chance else f"{text}, where chance is {chance:.1%}"


def _cost(comparison: Comparison, method: str, metric: str) -> float:
    own, best = (comparison.values(name, "new_to_new", metric) for name in (method, "independent"))
    return statistics.fmean(own) - statistics.fmean(best)


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"
