"""What ``pml-compat evaluate`` measured, and the metrics.json it becomes.

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
import json
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import __version__
from ..accuracy.items import as_values
from ..verification import VerificationResult
from .as_json import flips_to_json, interval_to_json, intervals_to_json, verification_to_json, without_nan
from .bootstrap import BootstrapInterval, bootstrap_update_gain, paired_bootstrap
from .criterion import PairCriterion
from .negative_flips import NegativeFlips, negative_flips

if TYPE_CHECKING:
    from .verdict import UpgradeVerdict

METRICS = {"precision_at_1": "P@1", "mean_average_precision": "mAP"}
PAIRS = {
    "old_to_old": "old/old",
    "new_to_old": "new/old",
    "new_to_transformed_old": "new/transformed old",
    "new_to_new": "new/new",
}
AT_QUERY_TIME = {"rotated_to_old": "rotated/old", "blended_to_old": "blended/old"}
PAIR_NAMES = {**PAIRS, "old_to_new": "old/new", **AT_QUERY_TIME}
TWO_STAGES = "two_stages_"  # and the depth
STARTS = {"old": "new_to_old", "transformed_old": "new_to_transformed_old"}  # a backfill's start: its pair at 0 %
ALL_METRICS = {
    **METRICS,
    "mean_average_precision_at_r": "mAP@R",
    "r_precision": "R-precision",
    "mean_reciprocal_rank": "MRR",
    "cmc_top_5": "CMC@5",
    "cmc_top_10": "CMC@10",
}
_CMC_PLACES = 100


@dataclass(frozen=True)
class Backfill:
    """New queries on a gallery of which a growing share is new: per-query metrics at each share.

    Args:
        order: how the vectors to replace were chosen, in one word.
        fractions: from 0 to 1.
        vectors: how many vectors are new at each.
        per_query: at each, metric to ``(Q,)`` values, in the first order.
        repeats: ``per_query`` in several orders.
    """

    order: str
    fractions: tuple[float, ...]
    vectors: tuple[int, ...]
    per_query: list[dict[str, torch.Tensor]]
    repeats: list[list[dict[str, torch.Tensor]]] = field(default_factory=list)

    @cached_property
    def steps(self) -> list[dict[str, torch.Tensor]]:
        """``per_query``, averaged over the orders."""
        if not self.repeats:
            return self.per_query
        return [
            {metric: torch.stack([one[metric] for one in same]).mean(0) for metric in METRICS}
            for same in zip(*self.repeats, strict=True)
        ]

    def values(self, metric: str) -> list[float]:
        """Return the metric's mean at each share, over the orders."""
        return [mean(step[metric]) for step in self.steps]

    def area(self, metric: str) -> float:
        """Return the metric's average over the backfill, by the trapezoidal rule."""
        values = torch.tensor(self.values(metric), dtype=torch.float64)
        return float(torch.trapezoid(values, torch.tensor(self.fractions, dtype=torch.float64)))


@dataclass
class Evaluation:
    """Everything that tables, plots and the verdict of one upgrade are made from.

    Args:
        data: what was measured on; see the module.
        labels: ``(Q,)`` query labels.
        gallery_size: vectors in the gallery.
        pairs: pair to metric to ``(Q,)`` values, NaN for a query with no positive.
        backfill: start to its curve.
        criterion: shares of pairs, with old queries.
        verification: pair to result, where it was asked for.
        notes: what a reader should know about the input, one sentence each.
        seed: of the bootstrap.
        suspicions: what cannot be right about the input, one sentence each.
        margin: a difference that does not matter.
        groups: group of queries to its own evaluation, where groups were given.
    """

    data: dict[str, Any]
    labels: Any
    gallery_size: int
    pairs: dict[str, dict[str, torch.Tensor]]
    backfill: dict[str, Backfill] = field(default_factory=dict)
    criterion: PairCriterion | None = None
    verification: dict[str, VerificationResult] | None = None
    notes: list[str] = field(default_factory=list)
    seed: int = 0
    suspicions: list[str] = field(default_factory=list)
    margin: float = 0.01
    groups: dict[str, Evaluation] = field(default_factory=dict)

    def accuracy(self, pair: str, metric: str) -> float:
        """Return the mean over the queries that have a positive."""
        return mean(self.pairs[pair][metric])

    def cmc(self, pair: str) -> list[float]:
        """Return the share of queries with a positive in the first 1, 2, ... places, up to 100 or the gallery's size.

        A positive that ties with other items counts at its expected place, but for the first place, where it is P@1.
        """
        values = self.pairs[pair]["mean_reciprocal_rank"]
        values = values[~values.isnan()]
        last = min(_CMC_PLACES, self.gallery_size)
        places = (1 / values - 1e-6).ceil().clamp_max(last + 1).long()  # of the first positive
        curve = torch.bincount(places, minlength=last + 2)[1 : last + 1].cumsum(0).double() / len(values)
        curve[0] = self.accuracy(pair, "precision_at_1")
        return torch.cummax(curve, 0).values.tolist()

    @cached_property
    def differences(self) -> dict[str, dict[str, BootstrapInterval]]:
        """How much better than old/old each pair with new queries is; nothing without old queries."""
        return {pair: self._against_old(self.pairs[pair]) for pair in self._upgrades()}

    @cached_property
    def backfill_differences(self) -> dict[str, list[dict[str, BootstrapInterval]]]:
        """The same for each step of each backfill."""
        if "old_to_old" not in self.pairs:
            return {}
        return {start: [self._against_old(step) for step in curve.steps] for start, curve in self.backfill.items()}

    @cached_property
    def gains(self) -> dict[str, dict[str, BootstrapInterval]]:
        """Update gain of each pair with a gallery that is not re-embedded; needs old queries and the new gallery."""
        if "new_to_new" not in self.differences:
            return {}
        return {
            pair: {metric: self._gain(pair, metric) for metric in METRICS}
            for pair in self.differences
            if pair != "new_to_new"
        }

    def compute_intervals(self) -> None:
        """Compute what is otherwise computed when it is first asked for."""
        _ = self.differences, self.backfill_differences, self.gains

    def _gain(self, pair: str, metric: str) -> BootstrapInterval:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # an undefined gain stands as one
            return bootstrap_update_gain(
                old_to_old=self.pairs["old_to_old"][metric],
                new_to_old=self.pairs[pair][metric],
                independent=self.pairs["new_to_new"][metric],
                seed=self.seed,
            )

    def flips(self, per_query: dict[str, torch.Tensor]) -> NegativeFlips:
        """Return the queries whose first find was right with old/old and is wrong in ``per_query``."""
        old = self.pairs["old_to_old"]["precision_at_1"]
        return negative_flips(old, per_query["precision_at_1"], self.labels)

    @cached_property
    def pair_flips(self) -> dict[str, NegativeFlips]:
        """:meth:`flips` of each pair with new queries; nothing without old queries."""
        return {pair: self.flips(self.pairs[pair]) for pair in self._upgrades()}

    def _upgrades(self) -> list[str]:
        """Return the pairs that could take the place of old/old, which must have been measured."""
        if "old_to_old" not in self.pairs:
            return []
        return [pair for pair in self.pairs if pair not in ("old_to_old", "old_to_new")]

    def _against_old(self, per_query: dict[str, torch.Tensor]) -> dict[str, BootstrapInterval]:
        old = self.pairs["old_to_old"]
        return {
            metric: paired_bootstrap(old[metric], per_query[metric], seed=self.seed, groups=self._classes)
            for metric in METRICS
        }

    @cached_property
    def _classes(self) -> np.ndarray:
        return np.unique(as_values(self.labels, "labels").astype(str), return_inverse=True)[1]

    @cached_property
    def verdict(self) -> UpgradeVerdict:
        """What to do, by the rule of :func:`upgrade_verdict`."""
        from .verdict import upgrade_verdict

        return upgrade_verdict(self)

    def table(self) -> str:
        """Return the numbers that decide, as Markdown."""
        from ..report.evaluation_table import summary_table, to_markdown

        return to_markdown(summary_table(self))

    def to_html(self, path: Any, title: str = "Upgrade report") -> None:
        """Write one HTML page that needs nothing else; needs the ``report`` extra."""
        from ..report.html_page import html_page

        Path(path).write_text(html_page(self, self.verdict, title), encoding="utf-8")

    def to_json(self, path: Any = None) -> dict[str, Any]:
        """Return everything, of types that strict JSON has; see the module. With a path, write it there too."""
        out = {"pml_compat": __version__, **self._measured(), "verdict": self.verdict.to_json()}
        if self.verdict.flips is not None and self.verdict.outcome == "backfill_first":
            out["negative_flips"]["backfill"] = flips_to_json(self.verdict.flips)
        out = without_nan(out)
        if path is not None:
            Path(path).write_text(json.dumps(out, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return out

    def _measured(self) -> dict[str, Any]:
        out = {
            "data": self.data,
            "pairs": {
                pair: {metric: self.accuracy(pair, metric) for metric in values}
                | ({"cmc": self.cmc(pair)} if "mean_reciprocal_rank" in values else {})
                for pair, values in self.pairs.items()
            },
            "differences": {pair: intervals_to_json(found) for pair, found in self.differences.items()},
            "update_gain": {pair: intervals_to_json(found) for pair, found in self.gains.items()},
            "negative_flips": {pair: flips_to_json(found) for pair, found in self.pair_flips.items()},
            "backfill": {start: self._backfill_to_json(start) for start in self.backfill},
            "criterion": None if self.criterion is None else dataclasses.asdict(self.criterion),
            "verification": None
            if self.verification is None
            else {pair: verification_to_json(found) for pair, found in self.verification.items()},
            "groups": {name: one.to_json() for name, one in self.groups.items()},
            "notes": self.notes,
            "suspicions": self.suspicions,
        }
        return out

    def _backfill_to_json(self, start: str) -> dict[str, Any]:
        curve = self.backfill[start]
        steps = self.backfill_differences.get(start, [])
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


def pair_name(pair: str) -> str:
    """Return what a pair is called in tables."""
    return PAIR_NAMES[pair] if pair in PAIR_NAMES else f"two stages, {pair.removeprefix(TWO_STAGES)} items"


def mean(values: torch.Tensor) -> float:
    """Return the mean of what is not NaN."""
    return float(values.nanmean())


def criterion_in_words(evaluation: Evaluation) -> str:
    """Return how many pairs the new model puts no worse than the old one, in a sentence."""
    criterion = evaluation.criterion
    if criterion is None:
        return ""
    parts = []
    if criterion.n_same_label:
        parts.append(f"{criterion.same_label:.1%} of the pairs of one label are no further apart")
    if criterion.n_different_label:
        parts.append(f"{criterion.different_label:.1%} of the pairs of two labels are no closer")
    return f"With new queries on the stored gallery, {' and '.join(parts)} than with old queries."
