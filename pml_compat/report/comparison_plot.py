"""The outcome as a picture: how well each pair of models retrieves, and what a few queries find."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._extras import import_extra
from ..upgrade.comparison import Comparison
from ..upgrade.names import METRICS
from .evaluation_plots import PAIR_COLORS

_BARS = {"old_to_old": "old/old", "cross": "new/old", "transformed": "new/transformed old", "new_to_new": "new/new"}
_COLORS = {
    **PAIR_COLORS,
    "cross": PAIR_COLORS["new_to_old"],
    "transformed": PAIR_COLORS["new_to_transformed_old"],
}
_MANY_METHODS = 8  # above which names and numbers are turned
_RIGHT, _WRONG = "#2e8b57", "#c0392b"


@dataclass(frozen=True)
class RetrievalExample:
    """One query image and what each method's model finds in the old gallery, nearest first."""

    query: np.ndarray
    found: dict[str, Sequence[tuple[np.ndarray, bool]]]  # method -> (image, has the query's label)


def plot_comparison(
    comparison: Comparison, path: str | os.PathLike[str], examples: Sequence[RetrievalExample] = ()
) -> None:
    """Draw every method's accuracies against the old system's, and ``examples`` below them, into an image file.

    Bars are means over the seeds, dots the seeds. The dashed line is the old system: where a new/old bar passes it,
    the upgrade pays without re-embedding anything.
    """
    figure_module = import_extra("matplotlib.figure", "demo")
    below_inches = 0.5 + 0.55 * len(examples[0].found) if examples else 0.0
    size = max(12.5, 1.25 * (1 + len(comparison.evaluations))), 4.6 + below_inches
    figure = figure_module.Figure(figsize=size, layout="constrained")
    top, *below = figure.subfigures(2, 1, height_ratios=[4.6, below_inches]) if examples else [figure]
    top.suptitle("Can new queries search the old gallery?", fontsize=15, fontweight="bold")
    panels = top.subplots(1, len(METRICS), sharey=True)
    for panel, metric in zip(panels, METRICS, strict=True):
        _draw_bars(panel, comparison, metric)
    panels[0].set_ylabel("percent")
    handles, labels = panels[0].get_legend_handles_labels()
    top.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    for subfigure in below:
        _draw_examples(subfigure, examples)
    figure.savefig(path, dpi=150)


def _draw_bars(panel: Any, comparison: Comparison, metric: str) -> None:
    width = 0.38
    bars = {"old": {"old_to_old": comparison.old(metric)}}
    bars |= {method: _bars(comparison, method, metric) for method in comparison.evaluations}
    crowded = len(bars) > _MANY_METHODS
    for kind, name in _BARS.items():
        shown = [(place, own) for place, own in enumerate(bars.values()) if kind in own]
        places = [place + _shift(kind, list(own)) * width for place, own in shown]
        values = [100 * np.array(own[kind]) for _, own in shown]
        means = [one.mean() for one in values]
        panel.bar(places, means, width, color=_COLORS[kind], label=f"{name} (query/gallery)")
        for place, mean, one in zip(places, means, values, strict=True):
            if len(one) > 1:
                panel.scatter(np.full(len(one), place), one, s=9, color="black", alpha=0.45, zorder=3)
            panel.text(place, one.max() + 2, f"{mean:.1f}", ha="center", fontsize=8, rotation=90 if crowded else 0)
    panel.axhline(100 * float(np.mean(comparison.old(metric))), color="#555", linestyle="--", linewidth=1)
    panel.set_title(METRICS[metric])
    panel.set_xticks(range(len(bars)), list(bars), **({"rotation": 35, "ha": "right"} if crowded else {}))
    panel.set_ylim(0, 115)
    panel.set_yticks(range(0, 101, 20))
    panel.spines[["top", "right"]].set_visible(False)


def _bars(comparison: Comparison, method: str, metric: str) -> dict[str, list[float]]:
    """Return the values of a method's bars, by their kind."""
    mapped = comparison.served[method] == "new_to_transformed_old"
    own = {"transformed" if mapped else "cross": comparison.cross(method, metric)}
    if comparison.has_own_gallery(method):
        own["new_to_new"] = comparison.values(method, "new_to_new", metric)
    return own


def _shift(kind: str, kinds: Sequence[str]) -> float:
    """Return where a bar stands, in bars from the middle of those of its method."""
    ordered = [one for one in _BARS if one in kinds]
    return ordered.index(kind) - (len(ordered) - 1) / 2


def _draw_examples(figure: Any, examples: Sequence[RetrievalExample]) -> None:
    methods = list(examples[0].found)
    depth = max(len(found) for example in examples for found in example.found.values())
    figure.suptitle("What a new query finds among the old vectors (green: right class)", fontsize=11)
    columns = len(examples) * (depth + 2) - 1  # a query, what it finds, and a gap
    axes = figure.subplots(len(methods), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for number, example in enumerate(examples):
        first = number * (depth + 2)
        for row, method in enumerate(methods):
            _draw_image(axes[row, first], example.query, "black", "query" if row == 0 else "")
            if number == 0:
                axes[row, 0].text(-0.3, 0.5, method, transform=axes[row, 0].transAxes, ha="right", va="center")
            for place, (image, right) in enumerate(example.found[method]):
                _draw_image(axes[row, first + 1 + place], image, _RIGHT if right else _WRONG, "")


def _draw_image(axis: Any, image: np.ndarray, color: str, heading: str) -> None:
    axis.axis("on")
    axis.imshow(image, cmap="gray_r")
    axis.set(xticks=[], yticks=[])
    axis.set_title(heading, fontsize=8, pad=4)
    for spine in axis.spines.values():
        spine.set(color=color, linewidth=2)
