"""The verdict of an upgrade: what to do, and why.

The rule. An option beats today's system for sure where P@1 and mAP are both above old/old's: the lower end of the
paired bootstrap interval is above 0 (whole classes are resampled where labels repeat), and where few queries differ the
exact sign test agrees. The options, cheapest first: the gallery as it is stored; the transformed gallery; old and new
query blended; a search in two stages, with the fewest items a query; a backfilled gallery, with the smallest measured
share from which on every share is better too, on average over several random orders. The first option that surely beats
today's system is the verdict. A swap at whose old threshold false accepts or rejects change comes with a new threshold.
Where no option surely beats it, but one may by more than the margin, there are not enough queries to say. No verdict is
given where the input cannot be right: an old system at chance, or galleries that look exchanged.

A caution: the rule is made of the quantities that it judges by. It is not validated against another measure of what an
upgrade did to a service.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .as_json import without_nan
from .bootstrap import BootstrapInterval
from .doubts import impossible, new_gallery_warning, threshold_warnings
from .evaluation import Evaluation
from .groups import group_warnings
from .names import METRICS, STARTS
from .negative_flips import NegativeFlips
from .options import Option, choose, list_options, may_be_better
from .words import title_and_summary, what_is_missing, why

_NOTABLE_FLIPS = 0.01  # share of the queries that break: from here on a warning


@dataclass(frozen=True)
class UpgradeVerdict:
    """What to do, and why.

    Args:
        outcome: see :func:`upgrade_verdict`; None: there is nothing to compare with.
        certain: whether the intervals of P@1 and mAP exclude that it is no better than today.
        title: the verdict in a few words.
        summary: what to do, in a sentence.
        reasons: why, with numbers, one sentence or two each.
        warnings: what will hurt all the same.
        missing: what to give for a surer or a better answer.
        option: what was chosen, if anything was.
        flips: what breaks with it; with no option, with the gallery as it is stored.
        queries_needed: about how many queries would do, where there are not enough.
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
    queries_needed: int | None = None

    @property
    def exit_code(self) -> int:
        """0 go, 1 no, 2 not enough to say."""
        if self.outcome is None or self.outcome == "not_enough_queries":
            return 2
        return 1 if self.outcome == "do_not_upgrade" else 0

    def to_json(self) -> dict[str, Any]:
        """Return the verdict of types that strict JSON has."""
        values = {key: value for key, value in asdict(self).items() if key not in ("option", "flips")}
        chosen = self.option if self.option is not None and self.outcome == "backfill_first" else None
        values |= {"share": chosen and chosen.share, "vectors": chosen and chosen.vectors}
        values["share_range"] = chosen and list(chosen.share_range)
        values["start"] = self.option.start if self.option is not None else None
        values["pair"] = self.option.pair if self.option is not None else None
        return without_nan(values)


def upgrade_verdict(evaluation: Evaluation) -> UpgradeVerdict:
    """Return the verdict, by the rule of this module."""
    if "old_to_old" not in evaluation.pairs:
        return UpgradeVerdict(
            outcome=None,
            certain=False,
            title="No verdict",
            summary="There is nothing to compare with: the old system was not measured.",
            reasons=[],
            missing=what_is_missing(evaluation),
        )
    doubts = [*evaluation.suspicions, *impossible(evaluation)]
    if doubts:
        return UpgradeVerdict(
            outcome=None,
            certain=False,
            title="No verdict: look at the files first",
            summary="These numbers cannot be those of two working models on the same items in the same order.",
            reasons=[*doubts, *why(evaluation, None)],
            warnings=new_gallery_warning(evaluation),
        )
    option = choose(list_options(evaluation))
    threshold = threshold_warnings(evaluation, _pair(option))
    if option is not None and option.outcome == "swap_now" and threshold:
        option = replace(option, outcome="swap_with_a_new_threshold")
    needed = None if option is not None else _queries_needed(evaluation)
    flips = _flips(evaluation, option)
    if needed is not None:
        title, summary = "Not enough queries to say", f"About {needed:,} queries like these would do."
    else:
        title, summary = title_and_summary(evaluation, option)
    if threshold and option is not None:
        summary = f"{threshold[0]} {summary}"
    no = "not_enough_queries" if needed is not None else "do_not_upgrade"
    return UpgradeVerdict(
        outcome=no if option is None else option.outcome,
        certain=needed is None,
        title=title,
        summary=summary,
        reasons=why(evaluation, option),
        warnings=[
            *threshold,
            *new_gallery_warning(evaluation),
            *_warnings(option, flips),
            *([] if option is None else group_warnings(evaluation, option.pair)),
        ],
        missing=what_is_missing(
            evaluation, settled=_pair(option) == "new_to_old" and option is not None and option.share == 0
        ),
        option=option,
        flips=flips,
        queries_needed=needed,
    )


def _queries_needed(evaluation: Evaluation) -> int | None:
    """Return how many queries would tell, where an option may be better for all that was measured; else None."""
    candidates = [option.differences for option in list_options(evaluation) if option.pair is not None]
    candidates += [step for steps in evaluation.backfill_differences.values() for step in steps[1:-1]]
    counts = []
    for differences in candidates:
        if may_be_better(differences, evaluation.margin):
            counts.append(max(_count_needed(differences[metric], evaluation.margin) for metric in METRICS))
    return min(counts) if counts else None


def _count_needed(found: BootstrapInterval, margin: float) -> int:
    half = max(found.high - found.estimate, found.estimate - found.low, 1 / found.queries)
    aim = max(abs(found.estimate), margin, 1e-3)
    count = found.queries * max((half / aim) ** 2, 1.0)
    digits = 10 ** max(0, len(str(int(count))) - 2)
    return max(found.queries + 1, math.ceil(count / digits) * digits)


def _flips(evaluation: Evaluation, option: Option | None) -> NegativeFlips | None:
    if option is not None and option.outcome == "backfill_first":
        return evaluation.flips(evaluation.backfill[option.start].steps[option.step])
    return evaluation.pair_flips.get(_pair(option))


def _pair(option: Option | None) -> str:
    """Return the pair that an option was measured as, or starts from."""
    if option is None:
        return STARTS["old"]
    return option.pair or STARTS[option.start]


def _warnings(option: Option | None, flips: NegativeFlips | None) -> list[str]:
    found = []
    if option is not None and flips is not None and flips.rate >= _NOTABLE_FLIPS:
        worst = ", ".join(f"class {one.label} ({one.flips:g} of {one.queries})" for one in flips.worst(3))
        found.append(
            f"{flips.rate:.1%} of the queries find the right item first today and would not after the upgrade "
            f"({flips.positive_rate:.1%} the other way round); most in {worst}."
        )
    return found
