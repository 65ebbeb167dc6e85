"""The verdict of an upgrade: swap now, swap with a transformed gallery, backfill a share first, or do not upgrade.

The rule. An option beats today's system where it is better in P@1 and in mAP; surely so, where the lower ends of both
paired bootstrap intervals are above 0. The options, cheapest first: the gallery as it is stored; the transformed
gallery; a partly backfilled one, with the smallest measured share from which on every measured share is better too. The
verdict is the first option that surely beats today's system; else the first that beats it, called not certain; else not
to upgrade.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .bootstrap import BootstrapInterval
from .evaluation import METRICS, PAIR_NAMES, STARTS, Evaluation, without_nan
from .negative_flips import NegativeFlips

Differences = Mapping[str, BootstrapInterval]  # metric to how much better than old/old
_NOTABLE_FLIPS = 0.01  # share of the queries that break: from here on a warning


@dataclass(frozen=True)
class Option:
    """One way to upgrade, and how it compares with today's system.

    Args:
        outcome: ``swap_now``, ``swap_with_transformed_gallery`` or ``backfill_first``.
        differences: metric to interval, less old/old.
        start: the gallery it starts from, ``old`` or ``transformed_old``.
        share: the share of the gallery to re-embed first.
        vectors: how many vectors that is.
        step: the place of the share in the backfill curve.
    """

    outcome: str
    differences: Differences
    start: str = "old"
    share: float = 0.0
    vectors: int = 0
    step: int = 0


@dataclass(frozen=True)
class UpgradeVerdict:
    """What to do, and why.

    Args:
        outcome: see the module :mod:`pml_compat.upgrade.evaluation`; None: there is nothing to compare with.
        certain: whether the intervals of P@1 and mAP exclude that it is no better than today.
        title: the verdict in a few words.
        summary: what to do, in a sentence.
        reasons: why, with numbers, one sentence or two each.
        warnings: what will hurt all the same.
        missing: what to give for a surer or a better answer.
        option: what was chosen, if anything was.
        flips: what breaks with it; with no option, with the gallery as it is stored.
    """

    outcome: str | None
    certain: bool
    title: str
    summary: str
    reasons: list[str]
    warnings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    option: Option | None = None
    flips: NegativeFlips | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the verdict of types that strict JSON has."""
        values = {key: value for key, value in asdict(self).items() if key not in ("option", "flips")}
        chosen = self.option if self.option is not None and self.outcome == "backfill_first" else None
        values |= {"share": chosen and chosen.share, "vectors": chosen and chosen.vectors}
        values["start"] = self.option.start if self.option is not None else None
        return without_nan(values)


def is_better(differences: Differences) -> bool:
    """Tell whether P@1 and mAP are both above old/old's."""
    return all(differences[metric].estimate > 0 for metric in METRICS)


def is_surely_better(differences: Differences) -> bool:
    """Tell whether the intervals of P@1 and mAP both lie above 0."""
    return all(differences[metric].low > 0 for metric in METRICS)


def choose(options: Sequence[Option]) -> tuple[Option | None, bool]:
    """Return the first option that surely beats old/old, or else the first that beats it; and whether it is sure."""
    for certain, beats in ((True, is_surely_better), (False, is_better)):
        for option in options:
            if beats(option.differences):
                return option, certain
    return None, False


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
    outcomes = {"old": "swap_now", "transformed_old": "swap_with_transformed_gallery"}
    options = [
        Option(outcomes[start], evaluation.differences[pair], start)
        for start, pair in STARTS.items()
        if pair in evaluation.differences
    ]
    backfills = []
    for start, steps in evaluation.backfill_differences.items():
        for certain in (True, False):
            place = smallest_share(steps, certain=certain)
            if place is not None:
                curve = evaluation.backfill[start]
                share, vectors = curve.fractions[place], curve.vectors[place]
                backfills.append(Option("backfill_first", steps[place], start, share, vectors, place))
    return options + sorted(backfills, key=lambda option: option.share)


def upgrade_verdict(evaluation: Evaluation) -> UpgradeVerdict:
    """Return the verdict, by the rule of this module."""
    if "old_to_old" not in evaluation.pairs:
        return UpgradeVerdict(
            outcome=None,
            certain=False,
            title="No verdict",
            summary="There is nothing to compare with: the old system was not measured.",
            reasons=[],
            missing=_missing(evaluation),
        )
    option, certain = choose(list_options(evaluation))
    flips = _flips(evaluation, option)
    title, summary = _in_words(evaluation, option)
    return UpgradeVerdict(
        outcome="do_not_upgrade" if option is None else option.outcome,
        certain=certain or option is None,
        title=title if certain or option is None else f"{title}, but this is not certain",
        summary=summary,
        reasons=_reasons(evaluation, option),
        warnings=_warnings(option, certain, flips),
        missing=_missing(evaluation, settled=option is not None and option.outcome == "swap_now" and certain),
        option=option,
        flips=flips,
    )


def _in_words(evaluation: Evaluation, option: Option | None) -> tuple[str, str]:
    if option is None:
        new = evaluation.differences.get("new_to_new")
        if new is not None and is_better(new):
            return (
                "Do not upgrade without re-embedding everything",
                "Only the fully re-embedded gallery serves new queries better than today's system.",
            )
        if new is not None:
            return "Do not upgrade", "The new model is no better than the old one, even on its own gallery."
        return "Do not upgrade", "New queries find what is stored no better than old queries do."
    if option.outcome == "swap_now":
        return "Swap now", "Send new queries to the gallery as it is stored; nothing needs to be re-embedded."
    mapped = "the gallery through the transformation"
    if option.outcome == "swap_with_transformed_gallery":
        return "Swap with a transformed gallery", f"Run {mapped}, then send new queries to it."
    before = f"Run {mapped}, replace" if option.start == "transformed_old" else "Replace"
    vectors = f"{option.vectors:,} of {evaluation.gallery_size:,} vectors"
    return (
        f"Backfill {option.share:.0%} first",
        f"{before} {vectors} (any: they were chosen at random) by new ones, then send new queries to the gallery.",
    )


def _reasons(evaluation: Evaluation, option: Option | None) -> list[str]:
    reasons = [
        _compared(f"New queries on {gallery}", evaluation.differences[pair], evaluation, pair)
        for pair, gallery in (
            ("new_to_old", "the gallery as it is stored"),
            ("new_to_transformed_old", "the transformed gallery"),
            ("new_to_new", "a fully re-embedded gallery"),
        )
        if pair in evaluation.differences
    ]
    if option is not None and option.outcome == "backfill_first":
        values = evaluation.backfill[option.start].per_query[option.step]
        text = f"With {option.share:.0%} of the gallery re-embedded, new queries"
        reasons.append(_compared(text, option.differences, evaluation, values=values))
    elif option is None and evaluation.backfill:
        reasons.append("No share of a random backfill below 100% is better in P@1 and in mAP from there on.")
    for pair, gains in evaluation.gains.items():
        if all(gains[metric].estimate > 0 for metric in METRICS):
            shares = ", ".join(f"{name} {gains[metric].estimate:.0%}" for metric, name in METRICS.items())
            reasons.append(f"{PAIR_NAMES[pair]} brings this share of what re-embedding everything would: {shares}.")
    return reasons


def _compared(
    subject: str,
    differences: Differences,
    evaluation: Evaluation,
    pair: str | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
) -> str:
    per_query = evaluation.pairs[pair] if pair is not None else values
    assert per_query is not None
    if is_surely_better(differences):
        opening = "are better than old queries are today"
    elif is_better(differences):
        opening = "look better than old queries are today, but not for certain"
    elif any(differences[metric].estimate > 0 for metric in METRICS):
        opening = "are better than old queries are today in one metric only"
    else:
        opening = "are no better than old queries are today"
    numbers = "; ".join(
        f"{name} {float(per_query[metric].nanmean()):.1%} against {evaluation.accuracy('old_to_old', metric):.1%} "
        f"({points(differences[metric])})"
        for metric, name in METRICS.items()
    )
    return f"{subject} {opening}: {numbers}."


def points(interval: BootstrapInterval) -> str:
    """Return a difference and its interval, in percentage points."""
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * interval.estimate:+.1f} points, {interval.level:.0%} interval {low:+.1f} to {high:+.1f}"


def _flips(evaluation: Evaluation, option: Option | None) -> NegativeFlips | None:
    if option is not None and option.outcome == "backfill_first":
        return evaluation.flips(evaluation.backfill[option.start].per_query[option.step])
    return evaluation.pair_flips.get(STARTS[option.start if option is not None else "old"])


def _warnings(option: Option | None, certain: bool, flips: NegativeFlips | None) -> list[str]:
    found = []
    if option is not None and not certain:
        found.append(
            "Not certain: an interval reaches down to 0 or below, so that other queries like these could show no gain; "
            "measure on more queries."
        )
    if option is not None and flips is not None and flips.rate >= _NOTABLE_FLIPS:
        worst = ", ".join(f"class {one.label} ({one.flips:g} of {one.queries})" for one in flips.worst(3))
        found.append(
            f"{flips.rate:.1%} of the queries find the right item first today and would not after the upgrade "
            f"({flips.positive_rate:.1%} the other way round); most in {worst}."
        )
    return found


def _missing(evaluation: Evaluation, *, settled: bool = False) -> list[str]:
    wanted = []
    if "old_to_old" not in evaluation.pairs:
        wanted.append(
            "Give --old-queries, the old model's embeddings of the same queries, to compare with today's system."
        )
    if "new_to_transformed_old" not in evaluation.pairs and not settled:
        wanted.append(
            "Give --transformation or --transformed-gallery to see whether mapping the stored vectors would do."
        )
    if "new_to_new" not in evaluation.pairs:
        wanted.append(
            "Give --new-gallery, the new model's embeddings of the gallery or of a sample of it, to see what "
            "re-embedding brings and how much of it is enough."
        )
    return wanted
