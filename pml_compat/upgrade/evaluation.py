"""What an upgrade measured; :mod:`pml_compat.upgrade.as_json` describes its metrics.json."""

from __future__ import annotations

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
from ..verification.verification import VerificationResult
from .as_json import flips_to_json, measured_to_json, without_nan
from .bootstrap import BootstrapInterval, bootstrap_update_gain, paired_bootstrap
from .criterion import PairCriterion
from .names import METRICS
from .negative_flips import NegativeFlips, negative_flips

if TYPE_CHECKING:
    from .verdict import UpgradeVerdict

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
        from ..report.page import html_page

        Path(path).write_text(html_page(self, self.verdict, title), encoding="utf-8")

    def to_json(self, path: Any = None) -> dict[str, Any]:
        """Return everything, of types that strict JSON has; see the module. With a path, write it there too."""
        out = {"pml_compat": __version__, **measured_to_json(self), "verdict": self.verdict.to_json()}
        if self.verdict.flips is not None and self.verdict.outcome == "backfill_first":
            out["negative_flips"]["backfill"] = flips_to_json(self.verdict.flips)
        out = without_nan(out)
        if path is not None:
            Path(path).write_text(json.dumps(out, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return out


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
