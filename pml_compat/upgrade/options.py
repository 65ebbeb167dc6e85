"""The ways to upgrade that were measured, and which of them beats today's system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .bootstrap import BootstrapInterval
from .evaluation import Evaluation
from .names import METRICS, STARTS, TWO_STAGES

Differences = Mapping[str, BootstrapInterval]  # metric to how much better than old/old


@dataclass(frozen=True)
class Option:
    """One way to upgrade, and how it compares with today's system.

    Args:
        outcome: ``swap_now``, ``swap_with_a_new_threshold``, ``swap_with_transformed_gallery``, ``blend_queries``,
            ``search_in_two_stages`` or ``backfill_first``.
        differences: metric to interval, less old/old.
        start: the gallery it starts from, ``old`` or ``transformed_old``.
        share: the share of the gallery to re-embed first.
        vectors: how many vectors that is.
        pair: of the evaluation, that it was measured as; None for a backfill.
        step: the place of the share in the backfill curve.
        share_range: the least and the largest share over the orders.
    """

    outcome: str
    differences: Differences
    start: str = "old"
    pair: str | None = None
    share: float = 0.0
    vectors: int = 0
    step: int = 0
    share_range: tuple[float, float] = (0.0, 0.0)


def is_better(differences: Differences) -> bool:
    """Tell whether P@1 and mAP are both above old/old's."""
    return all(differences[metric].estimate > 0 for metric in METRICS)


def is_surely_better(differences: Differences) -> bool:
    """Tell whether P@1 and mAP are both above old/old's for sure."""
    return all(differences[metric].above for metric in METRICS)


def may_be_better(differences: Differences, margin: float) -> bool:
    """Tell whether P@1 and mAP could both be better by more than the margin, for all that was measured."""
    return all(differences[metric].high > margin for metric in METRICS)


def choose(options: Sequence[Option]) -> Option | None:
    """Return the first option that surely beats old/old."""
    return next((option for option in options if is_surely_better(option.differences)), None)


def smallest_share(steps: Sequence[Differences], *, certain: bool) -> int | None:
    """Return the first step, neither 0 % nor 100 %, from which on all beat old/old; None where there is none.

    Args:
        steps: the differences at each measured share, from 0 to 1.
        certain: the step's own intervals must lie above 0, too.
    """
    found = None
    for place in range(len(steps) - 1, 0, -1):
        if not is_better(steps[place]):
            break
        if place < len(steps) - 1 and (not certain or is_surely_better(steps[place])):
            found = place
    return found


def list_options(evaluation: Evaluation) -> list[Option]:
    """Return what was measured as options, cheapest first."""
    outcomes = {
        "new_to_old": "swap_now",
        "new_to_transformed_old": "swap_with_transformed_gallery",
        "blended_to_old": "blend_queries",
        **{pair: "search_in_two_stages" for pair in evaluation.pairs if pair.startswith(TWO_STAGES)},
    }
    starts = {pair: start for start, pair in STARTS.items()}
    options = [
        Option(outcome, evaluation.differences[pair], starts.get(pair, "old"), pair)
        for pair, outcome in outcomes.items()
        if pair in evaluation.differences
    ]
    backfills = []
    for start, steps in evaluation.backfill_differences.items():
        place = smallest_share(steps, certain=True)
        if place is not None:
            curve = evaluation.backfill[start]
            found = _share_range(evaluation, start, steps)
            share, vectors = curve.fractions[place], curve.vectors[place]
            backfills.append(Option("backfill_first", steps[place], start, None, share, vectors, place, found))
    return options + sorted(backfills, key=lambda option: option.share)


def _share_range(evaluation: Evaluation, start: str, steps: Sequence[Differences]) -> tuple[float, float]:
    """Return the least and the largest share that each order alone would have given."""
    curve = evaluation.backfill[start]
    shares = []
    for repeat in curve.repeats or [curve.per_query]:
        better = [
            all(
                float((values[metric] - evaluation.pairs["old_to_old"][metric]).nanmean())
                > step[metric].estimate - step[metric].low
                for metric in METRICS
            )
            for values, step in zip(repeat, steps, strict=True)
        ]
        last_bad = max((place for place, good in enumerate(better) if not good), default=0)
        shares.append(curve.fractions[min(last_bad + 1, len(better) - 1)])
    return min(shares), max(shares)
