"""What an upgrade experiment measured: the one structure that tables, pictures and verdicts are made from."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..upgrade import is_compatible, update_gain
from ..upgrade.evaluation import METRICS

COSTS = {"milliseconds_per_step": "ms/step", "extra_mebibytes": "+MiB"}  # of a method's training
CROSS_PAIRS = ("new_to_transformed_old", "new_to_old")  # what an upgrade without re-embedding serves


@dataclass
class Results:
    """Accuracies of every method, pair of models and metric, one value a seed, as fractions in [0, 1].

    Args:
        data: what was measured on, in words and numbers.
        seeds: the seeds, in the order of the values.
        methods: ``methods[method][pair][metric]`` is a list with one value a seed. The methods ``old`` (pair
            ``old_to_old``) and ``independent`` (``new_to_new``) are what the others are compared with. A method that
            maps the gallery has ``new_to_transformed_old`` in place of ``new_to_old``, and no ``new_to_new`` where it
            leaves the independent model as it is.
        chance: the accuracy of a random ranking, where it is known.
        costs: ``costs[method][cost]`` is a list with one value a seed; the costs are those of ``COSTS``.
    """

    data: dict[str, Any]
    seeds: list[int]
    methods: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    costs: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, method: str, pair: str, accuracies: Mapping[str, float]) -> None:
        """Append one seed's accuracies."""
        for metric in METRICS:
            self.methods.setdefault(method, {}).setdefault(pair, {}).setdefault(metric, []).append(accuracies[metric])

    def add_costs(self, method: str, costs: Mapping[str, float]) -> None:
        """Append one seed's costs."""
        for cost in COSTS:
            self.costs.setdefault(method, {}).setdefault(cost, []).append(costs[cost])

    def cost(self, method: str, cost: str) -> float:
        """Return the mean over the seeds; NaN where it was not measured."""
        values = self.costs.get(method, {}).get(cost, [])
        return statistics.fmean(values) if values else math.nan

    def values(self, method: str, pair: str, metric: str) -> list[float]:
        """Return one value a seed; nothing where the method has no such pair."""
        return self.methods.get(method, {}).get(pair, {}).get(metric, [])

    def mean(self, method: str, pair: str, metric: str) -> float:
        """Return the mean over the seeds; NaN where the method has no such pair."""
        values = self.values(method, pair, metric)
        return statistics.fmean(values) if values else math.nan

    def new_methods(self) -> list[str]:
        """Return every method but ``old``."""
        return [method for method in self.methods if method != "old"]

    def cross_pair(self, method: str) -> str:
        """Return the pair that ``method`` serves before anything is re-embedded."""
        return next((pair for pair in CROSS_PAIRS if pair in self.methods.get(method, {})), "new_to_old")

    def holds(self, method: str, metric: str) -> list[bool]:
        """Return, for each seed, whether the compatibility criterion holds."""
        return [
            is_compatible(old_to_old=old, new_to_old=new)
            for old, new in self._paired(("old", "old_to_old"), (method, self.cross_pair(method)), metric=metric)
        ]

    def gains(self, method: str, metric: str) -> list[float]:
        """Return the update gain of each seed."""
        independent = ("independent", "new_to_new")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # an undefined gain stands as NaN in the tables
            return [
                update_gain(old_to_old=old, new_to_old=new, independent=best)
                for old, new, best in self._paired(
                    ("old", "old_to_old"), (method, self.cross_pair(method)), independent, metric=metric
                )
            ]

    def _paired(self, *sources: tuple[str, str], metric: str) -> list[tuple[float, ...]]:
        return list(zip(*(self.values(method, pair, metric) for method, pair in sources), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``metrics.json``."""
        return {
            "data": self.data,
            "seeds": self.seeds,
            "chance": self.chance,
            "methods": {
                method: {
                    pair: {metric: _summary(values) for metric, values in metrics.items()}
                    for pair, metrics in pairs.items()
                }
                for method, pairs in self.methods.items()
            },
            "costs": {
                method: {cost: _summary(values) for cost, values in costs.items()}
                for method, costs in self.costs.items()
            },
            "compatibility": {
                method: {
                    metric: {"update_gain": _summary(self.gains(method, metric)), "holds": self.holds(method, metric)}
                    for metric in METRICS
                }
                for method in self.new_methods()
            },
        }


def _summary(values: Sequence[float]) -> dict[str, Any]:
    finite = [value if math.isfinite(value) else None for value in values]  # JSON has no NaN
    return {"mean": None if None in finite else statistics.fmean(values), "per_seed": finite}
