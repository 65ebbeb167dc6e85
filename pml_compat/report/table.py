"""One table of every method and pair of models, for a terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..extras import import_extra
from .results import COSTS, METRICS, Results
from .verdict import criterion_in_words, gain_in_words


def table_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the header and one row a method; a cell holds P@1 / mAP, in percent, means over the seeds.

    A "T" stands behind the numbers of a transformed gallery. Costs have columns where they were measured: the time of a
    training step, and the memory that the method holds beside the model and the task loss.
    """
    costs = list(COSTS) if results.costs else []
    header = ["method", "old/old", "new/old", "new/new", "gain", *(COSTS[cost] for cost in costs), "criterion"]
    rows = []
    for method in results.methods:
        row = [method]
        cross = results.cross_pair(method)
        row += [_accuracies(results, method, pair) for pair in ("old_to_old", cross, "new_to_new")]
        if cross == "new_to_transformed_old":
            row[2] += " T"
        row.append("" if method == "old" else _cell(gain_in_words(results, method, metric) for metric in METRICS))
        row += [_number(results.cost(method, cost)) for cost in costs]
        row.append("" if method == "old" else criterion_in_words(results, method))
        rows.append(row)
    return header, rows


def rich_table(results: Results) -> Any:
    """Return the table as a ``rich.table.Table``, of 80 columns at most; needs the ``demo`` extra.

    Where costs were measured, they and the criterion are left to :func:`rich_cost_table`.
    """
    table_module, box = import_extra("rich.table", "demo"), import_extra("rich.box", "demo")
    table = table_module.Table(title=title(results), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    header, rows = table_rows(results)
    shown = [place for place, column in enumerate(header) if column not in COSTS.values()]
    shown = shown[:-1] if results.costs else shown
    for place in shown:
        last = header[place] == "criterion"
        table.add_column(header[place], justify="right" if place and not last else "left", no_wrap=not last)
    for row in rows:
        table.add_row(*(row[place] for place in shown))
    return table


def rich_cost_table(results: Results) -> Any:
    """Return whether each method meets the criterion, and what its training costs; needs the ``demo`` extra."""
    table_module, box = import_extra("rich.table", "demo"), import_extra("rich.box", "demo")
    title = "criterion; time of a training step, memory beside the model and its task loss"
    table = table_module.Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    table.add_column("criterion", no_wrap=True)
    for name in COSTS.values():
        table.add_column(name, justify="right", no_wrap=True)
    for method in results.costs:
        table.add_row(
            method, criterion_in_words(results, method), *(_number(results.cost(method, cost)) for cost in COSTS)
        )
    return table


def markdown_table(results: Results) -> str:
    """Return the table as Markdown."""
    header, rows = table_rows(results)
    lines = [header, ["---"] + ["---:"] * (len(header) - 2) + ["---"], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def title(results: Results) -> str:
    """Return the table's heading: what was measured, over how many seeds."""
    seeds = f"{len(results.seeds)} seeds" if len(results.seeds) > 1 else "1 seed"
    what = " / ".join(METRICS.values())
    mapped = any(results.cross_pair(method) == "new_to_transformed_old" for method in results.methods)
    gallery = " (T: transformed)" if mapped else ""
    return f"{results.data.get('name', 'results')}: query/gallery{gallery}, {what} in percent, mean of {seeds}"


def _accuracies(results: Results, method: str, pair: str) -> str:
    return _cell(_percent(results.mean(method, pair, metric)) for metric in METRICS)


def _cell(values: Iterable[str]) -> str:
    return " / ".join(value for value in values if value)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f}"
