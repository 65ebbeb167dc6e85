"""Several methods in one table: what each pair finds, what was gained, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from ..upgrade.comparison import COSTS, Comparison
from ..upgrade.names import METRICS
from .evaluation_table import Table


def comparison_table(comparison: Comparison, *, narrow: bool = False) -> Table:
    """Return one row a method; a cell holds P@1 / mAP, in percent, means over the seeds.

    A "T" stands behind the numbers of a transformed gallery. ``sure`` are the seeds in which the intervals of P@1 and
    mAP lie above old/old; it has a column where queries were measured one by one. Costs have columns where they were
    measured: the time of a training step, and the memory that the method holds beside the model and the task loss.

    Args:
        comparison: what was measured.
        narrow: 80 columns in a terminal: where costs were measured, they, the criterion and ``sure`` are left to
            :func:`cost_table`.
    """
    after = [] if narrow and comparison.costs else _criterion_header(comparison)
    costs = list(COSTS) if comparison.costs and after else []
    header = ["method", "old/old", "new/old", "new/new", "gain", *(COSTS[cost] for cost in costs), *after]
    old = _cell(_percent(statistics.fmean(comparison.old(metric))) for metric in METRICS)
    rows = [["old", old, *[""] * (len(header) - 2)]]
    for method in comparison.evaluations:
        row = [method, "", _accuracies(comparison, method, comparison.served[method])]
        if comparison.served[method] == "new_to_transformed_old":
            row[2] += " T"
        row.append(_accuracies(comparison, method, "new_to_new") if comparison.has_own_gallery(method) else "")
        row.append(_cell(gain_in_words(comparison, method, metric) for metric in METRICS))
        row += [_number(comparison.cost(method, cost)) for cost in costs]
        rows.append(row + (_criterion(comparison, method) if after else []))
    return Table(heading(comparison), header, rows)


def cost_table(comparison: Comparison) -> Table:
    """Return whether each method meets the criterion, and what its training costs."""
    header = ["method", *_criterion_header(comparison), *COSTS.values()]
    rows = [
        [method, *_criterion(comparison, method), *(_number(comparison.cost(method, cost)) for cost in COSTS)]
        for method in comparison.costs
    ]
    return Table("criterion; time of a training step, memory beside the model and its task loss", header, rows)


def _criterion_header(comparison: Comparison) -> list[str]:
    """Return the columns of :func:`_criterion`; ``sure`` where an interval can be made of more than one query."""
    found = [one for evaluations in comparison.evaluations.values() for one in evaluations]
    queries = all(len(one.pairs["old_to_old"]["precision_at_1"]) > 1 for one in found)
    return ["criterion", "sure"] if queries else ["criterion"]


def _criterion(comparison: Comparison, method: str) -> list[str]:
    cells = [criterion_in_words(comparison, method)]
    if "sure" in _criterion_header(comparison):
        found = comparison.holds_surely(method)
        cells.append(f"{sum(found)}/{len(found)}")
    return cells


def heading(comparison: Comparison) -> str:
    """Return the table's heading: what was measured, over how many seeds."""
    seeds = f"{len(comparison.seeds)} seeds" if len(comparison.seeds) > 1 else "1 seed"
    what = " / ".join(METRICS.values())
    gallery = " (T: transformed)" if "new_to_transformed_old" in comparison.served.values() else ""
    return f"{comparison.data.get('name', 'results')}: query/gallery{gallery}, {what} in percent, mean of {seeds}"


def criterion_in_words(comparison: Comparison, method: str) -> str:
    """Return whether the compatibility criterion holds, in P@1 and in mAP, for one cell of a table."""
    met = [all(seed) for seed in zip(*(comparison.holds(method, metric) for metric in METRICS), strict=True)]
    if all(met):
        return "holds"
    return f"in {sum(met)} of {len(met)}" if any(met) else "fails"


def gain_in_words(comparison: Comparison, method: str, metric: str) -> str:
    """Return the mean update gain; "undefined" where the independent model is no better than the old one."""
    gains = comparison.gains(method, metric)
    if not gains:
        return ""
    gain = statistics.fmean(gains)
    if math.isnan(gain):
        return "undefined"
    return f"{gain:.2f}" if abs(gain) < 10 else f"{gain:.0f}"


def _accuracies(comparison: Comparison, method: str, pair: str) -> str:
    return _cell(_percent(statistics.fmean(comparison.values(method, pair, metric))) for metric in METRICS)


def _cell(values: Iterable[str]) -> str:
    return " / ".join(value for value in values if value)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
