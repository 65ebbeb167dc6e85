"""The old way to compare methods, by their accuracies alone; it goes with the next release.

:class:`pml_compat.upgrade.Comparison` takes evaluations, query by query, in its place.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..upgrade.comparison import COSTS as COSTS
from ..upgrade.comparison import Comparison
from ..upgrade.evaluation import Evaluation
from ..upgrade.names import METRICS as METRICS
from .comparison_plot import RetrievalExample, plot_comparison
from .comparison_table import comparison_table, cost_table, heading
from .comparison_words import method_in_words
from .evaluation_table import to_markdown, to_rich


class Results:
    """Accuracies of every method, pair of models and metric, one value a seed."""

    def __init__(self, data: dict[str, Any], seeds: list[int]) -> None:
        warnings.warn(
            "pml_compat.report.Results goes with the next release: use pml_compat.upgrade.Comparison",
            DeprecationWarning,
            stacklevel=2,
        )
        self._comparison = Comparison(data, seeds)
        self._methods: dict[str, dict[str, list[Mapping[str, float]]]] = {}

    def add(self, method: str, pair: str, accuracies: Mapping[str, float]) -> None:
        """Append one seed's accuracies."""
        self._methods.setdefault(method, {}).setdefault(pair, []).append(accuracies)

    def add_costs(self, method: str, costs: Mapping[str, float]) -> None:
        """Append one seed's costs."""
        self._comparison.add_costs(method, costs)

    def comparison(self) -> Comparison:
        """Return the same as a comparison, of evaluations with one query: what is all of them."""
        out = Comparison(self._comparison.data, self._comparison.seeds, costs=self._comparison.costs)
        for method, pairs in self._methods.items():
            for seed in range(len(self._comparison.seeds) if method != "old" else 0):
                both = {**pairs, "old_to_old": self._methods["old"]["old_to_old"]}
                values = {
                    pair: {metric: torch.tensor([seeds[seed][metric]], dtype=torch.float64) for metric in METRICS}
                    for pair, seeds in both.items()
                }
                out.add(method, Evaluation({}, [0], 1, values))
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comparison(), name)


def markdown_table(results: Results) -> str:
    """Return the table as Markdown."""
    return to_markdown(comparison_table(results.comparison()))


def rich_table(results: Results) -> Any:
    """Return the table as a ``rich.table.Table``."""
    return to_rich(comparison_table(results.comparison(), narrow=True))


def rich_cost_table(results: Results) -> Any:
    """Return the costs as a ``rich.table.Table``."""
    return to_rich(cost_table(results.comparison()))


def title(results: Results) -> str:
    """Return the table's heading."""
    return heading(results.comparison())


def verdict(results: Results, method: str) -> str:
    """Return what a method came to, in a paragraph."""
    return method_in_words(results.comparison(), method)


def plot_compatibility(
    results: Results, path: str | os.PathLike[str], examples: Sequence[RetrievalExample] = ()
) -> None:
    """Draw the accuracies into an image file."""
    plot_comparison(results.comparison(), path, examples)
