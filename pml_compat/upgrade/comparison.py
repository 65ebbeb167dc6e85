"""Several upgrades of one old system side by side, on one or several seeds: each an :class:`Evaluation` a seed."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .compatibility import is_compatible, update_gain
from .evaluation import Evaluation
from .names import METRICS
from .options import is_surely_better

COSTS = {"milliseconds_per_step": "ms/step", "extra_mebibytes": "+MiB"}  # of a method's training
SERVED = ("new_to_transformed_old", "new_to_old")  # what an upgrade without re-embedding serves, if not told
_BASELINE = "independent"


@dataclass
class Comparison:
    """Several methods' evaluations, one a seed; tables, pictures and words are made from it.

    Args:
        data: what was measured on, in words and numbers; ``name`` is its heading.
        seeds: the seeds, in the order of the evaluations.
        evaluations: ``evaluations[method]``, one a seed. The method ``independent``, a new model trained with no
            compatibility term, and its own gallery are what update gains are measured against.
        served: the pair that each method serves before anything is re-embedded.
        costs: ``costs[method][cost]``, one value a seed; the costs are those of ``COSTS``.
    Example:
        >>> import torch
        >>> from pml_compat.upgrade import evaluate
        >>> labels = torch.arange(40) % 4
        >>> old, new = torch.randn(40, 8), torch.eye(8)[labels]
        >>> comparison = Comparison({"name": "toy"}, seeds=[0])
        >>> comparison.add("mine", evaluate(new, old, labels, labels, old_queries=old, same_items=True))
        >>> list(comparison.values("mine", "old_to_old", "precision_at_1")) == comparison.old("precision_at_1")
        True
    """

    data: dict[str, Any]
    seeds: list[int]
    evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)
    served: dict[str, str] = field(default_factory=dict)
    costs: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, method: str, evaluation: Evaluation, pair: str | None = None) -> None:
        """Append one seed's evaluation, of old queries too.

        Args:
            method: its name.
            evaluation: what :func:`pml_compat.upgrade.evaluate` returned.
            pair: what the method serves before anything is re-embedded; by default new queries on the transformed
                gallery, where there is one, else on the stored gallery.
        Raises:
            ValueError: the evaluation has not that pair, or no old queries.
        """
        if pair is None:
            pair = next((name for name in SERVED if name in evaluation.pairs), "new_to_old")
        missing = {pair, "old_to_old"} - evaluation.pairs.keys()
        if missing:
            raise ValueError(f"evaluation must have the pair {min(missing)}, got {', '.join(evaluation.pairs)}")
        self.served.setdefault(method, pair)
        self.evaluations.setdefault(method, []).append(evaluation)

    def add_costs(self, method: str, costs: Mapping[str, float]) -> None:
        """Append one seed's costs."""
        for cost in COSTS:
            self.costs.setdefault(method, {}).setdefault(cost, []).append(costs[cost])

    def cost(self, method: str, cost: str) -> float:
        """Return the mean over the seeds; NaN where it was not measured."""
        return _mean(self.costs.get(method, {}).get(cost, []))

    def values(self, method: str, pair: str, metric: str) -> list[float]:
        """Return one value a seed; nothing where the method has no such pair."""
        return [one.accuracy(pair, metric) for one in self.evaluations.get(method, []) if pair in one.pairs]

    def old(self, metric: str) -> list[float]:
        """Return the old system's accuracy, one value a seed."""
        return self.values(next(iter(self.evaluations), ""), "old_to_old", metric)

    def cross(self, method: str, metric: str) -> list[float]:
        """Return the accuracy of what the method serves before anything is re-embedded, one value a seed."""
        return self.values(method, self.served[method], metric)

    def has_own_gallery(self, method: str) -> bool:
        """Tell whether the method trained a new model, whose new gallery was measured."""
        return bool(self.values(method, "new_to_new", "precision_at_1")) and self.served[method] == "new_to_old"

    def holds(self, method: str, metric: str) -> list[bool]:
        """Return, for each seed, whether the compatibility criterion holds."""
        return [
            is_compatible(old_to_old=old, new_to_old=new)
            for old, new in zip(self.values(method, "old_to_old", metric), self.cross(method, metric), strict=True)
        ]

    def holds_surely(self, method: str) -> list[bool]:
        """Return, for each seed, whether P@1 and mAP are both above old/old's for sure, as the verdict has it."""
        return [is_surely_better(one.differences[self.served[method]]) for one in self.evaluations[method]]

    def gains(self, method: str, metric: str) -> list[float]:
        """Return the update gain of each seed; nothing where the independent model was not measured."""
        best = self.values(_BASELINE, "new_to_new", metric)
        if not best:
            return []
        cells = zip(self.values(method, "old_to_old", metric), self.cross(method, metric), best, strict=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # an undefined gain stands as NaN in the tables
            return [update_gain(old_to_old=old, new_to_old=new, independent=room) for old, new, room in cells]

    def to_json(self) -> dict[str, Any]:
        """Return everything, of types that strict JSON has, one value a seed and the means."""
        return {
            "data": self.data,
            "seeds": self.seeds,
            "chance": {metric: _mean(self._chances()) for metric in METRICS} if self._chances() else {},
            "methods": {"old": {"old_to_old": self._metrics(next(iter(self.evaluations), ""), "old_to_old")}}
            | {
                method: {
                    pair: self._metrics(method, pair)
                    for pair in (self.served[method], *(["new_to_new"] if self.has_own_gallery(method) else []))
                }
                for method in self.evaluations
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
                | {"surely_better": self.holds_surely(method)}
                for method in self.evaluations
            },
        }

    def chance(self) -> float | None:
        """Return the accuracy of a random ranking, where it is known: of P@1, and nearly of mAP."""
        return _mean(self._chances()) if self._chances() else None

    def _chances(self) -> list[float]:
        first = next(iter(self.evaluations.values()), [])
        return [one.data["chance"] for one in first if one.data.get("chance") is not None]

    def _metrics(self, method: str, pair: str) -> dict[str, Any]:
        return {metric: _summary(self.values(method, pair, metric)) for metric in METRICS}


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _summary(values: Sequence[float]) -> dict[str, Any]:
    finite = [value if math.isfinite(value) else None for value in values]  # JSON has no NaN
    return {"mean": None if None in finite or not values else statistics.fmean(values), "per_seed": finite}
