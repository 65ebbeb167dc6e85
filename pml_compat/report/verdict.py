"""The outcome in words that a team can act on."""

from __future__ import annotations

import math
import statistics

from .results import METRICS, Results


def verdict(results: Results, method: str) -> str:
    """Return one paragraph: does the criterion hold, by how much, and what it cost the new model."""
    met = [all(seed) for seed in zip(*(results.holds(method, metric) for metric in METRICS), strict=True)]
    seeds = f"in {sum(met)} of {len(met)} seeds" if len(met) > 1 else "in the one seed run"
    mapped = results.cross_pair(method) == "new_to_transformed_old"
    gallery = "the transformed old gallery" if mapped else "the old gallery"
    if all(met):
        opening = f"{method}: compatible. New queries find {gallery} better than old queries did, {seeds}"
    elif any(met):
        opening = f"{method}: not reliably compatible. The criterion holds {seeds}"
    else:
        opening = f"{method}: not compatible. New queries find {gallery} no better than old queries did"
    numbers = "; ".join(_against_old(results, method, metric) for metric in METRICS)
    sentences = [f"{opening}: {numbers}."]
    if method != "independent":
        gain = ", ".join(f"{METRICS[m]} {gain_in_words(results, method, m)}" for m in METRICS)
        sentences.append(f"Update gain (1 is as good as re-embedding everything): {gain}.")
        if results.values(method, "new_to_new", "precision_at_1"):
            cost = ", ".join(f"{METRICS[m]} {_points(_cost(results, method, m))}" for m in METRICS)
            sentences.append(f"New queries on a new gallery, against the independent model: {cost}.")
        else:
            sentences.append("The new model is the independent one, as it was.")
    return " ".join(sentences)


def criterion_in_words(results: Results, method: str) -> str:
    """Return whether the compatibility criterion holds, in P@1 and in mAP, for one cell of a table."""
    met = [all(seed) for seed in zip(*(results.holds(method, metric) for metric in METRICS), strict=True)]
    if all(met):
        return "holds"
    return f"in {sum(met)} of {len(met)}" if any(met) else "fails"


def gain_in_words(results: Results, method: str, metric: str) -> str:
    """Return the mean update gain; "undefined" where the independent model is no better than the old one."""
    gain = statistics.fmean(results.gains(method, metric))
    if math.isnan(gain):
        return "undefined"
    return f"{gain:.2f}" if abs(gain) < 10 else f"{gain:.0f}"


def _against_old(results: Results, method: str, metric: str) -> str:
    new, old = results.mean(method, results.cross_pair(method), metric), results.mean("old", "old_to_old", metric)
    text = f"{METRICS[metric]} {new:.1%} against {old:.1%} ({_points(new - old)})"
    chance = results.chance.get(metric)
    return text if chance is None or new > 2 * chance else f"{text}, where chance is {chance:.1%}"


def _cost(results: Results, method: str, metric: str) -> float:
    return results.mean(method, "new_to_new", metric) - results.mean("independent", "new_to_new", metric)


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"
