"""The pictures: what each method trades, and how a gallery gets better while it is backfilled."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

Found = dict[str, list[dict[str, Any]]]


def plot_trade_off(found: Found, path: Path, metric: str = "mean_average_precision", name: str = "mAP") -> None:
    """Draw new/new against new/old of every method, means over the seeds."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()

    def mean(method: str, pair: str) -> float:
        return 100 * statistics.fmean(one[pair][metric] for one in found[method])

    points: list[tuple[str, float, float]] = []
    methods = [method for method in found if method not in ("old", "independent") and _is_drawn(method)]
    for method in methods:
        mapped = found[method][0]["gallery"] != "old"
        x, y = mean(method, "new_to_old"), mean(method, "new_to_new")
        axes.scatter(x, y, s=60, color="#d9a441" if mapped else "#d1603d", zorder=3)
        points.append((method, x, y))
    axes.axvline(mean("old", "old_to_old"), color="#555", linestyle="--", linewidth=1, label="old/old")
    axes.axhline(mean("independent", "new_to_new"), color="#2f6f8f", linestyle="--", linewidth=1, label="independent")
    axes.scatter([], [], color="#d1603d", label="gallery untouched")
    axes.scatter([], [], color="#d9a441", label="gallery transformed")
    axes.set(xlabel=f"new/old {name}, percent", ylabel=f"new/new {name}, percent")
    axes.set_title("To the right: found without re-embedding. Up: what the new model is worth by itself", fontsize=11)
    axes.margins(x=0.2, y=0.1)
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    _name_points(figure, points)
    figure.savefig(path, dpi=130)


def _name_points(figure: Figure, points: list[tuple[str, float, float]]) -> None:
    """Write each point's name where neither another name nor a point is: beside it, else further up or down."""
    axes = figure.axes[0]
    figure.draw_without_rendering()
    places = axes.transData.transform([(x, y) for _, x, y in points])
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places]
    for name, x, y in points:
        for up, right in itertools.product((4, -12, 15, -23, 26, -34), (6, -6)):
            side = "left" if right > 0 else "right"
            text = axes.annotate(name, (x, y), (right, up), textcoords="offset points", fontsize=9, ha=side)
            box = text.get_window_extent()
            if not box.count_overlaps(taken) and box.x1 < axes.bbox.x1:
                break
            text.remove()
        else:
            axes.annotate(name, (x, y), (6, 4), textcoords="offset points", fontsize=9)
        taken.append(box)


def plot_backfill(found: Found, path: Path, metric: str = "precision_at_1", name: str = "top-1") -> None:
    """Draw the accuracy of new queries while a growing share of the gallery is re-embedded, in random order."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    lines = []
    for method, seeds in found.items():
        curves = [one["backfill"] for one in seeds if "backfill" in one]
        if not curves or not _is_drawn(method):
            continue
        shares = [100 * share for share in curves[0]["fractions"]]
        values = [100 * statistics.fmean(point) for point in zip(*(c["values"][metric] for c in curves), strict=True)]
        style = ("-", "--", ":")[len(lines) // 10 % 3]  # after ten lines the colours come again
        (line,) = axes.plot(shares, values, style, marker="o", markersize=3, label=method)
        lines.append((values[0], line))
    old = 100 * statistics.fmean(one["old_to_old"][metric] for one in found["old"])
    axes.axhline(old, color="#555", linestyle="--", linewidth=1)
    axes.text(100, old, "old/old", ha="right", va="bottom", fontsize=9)
    axes.set(xlabel="share of the gallery re-embedded, percent", ylabel=f"{name} of new queries, percent")
    lines.sort(key=lambda entry: -entry[0])
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    axes.legend(handles=[line for _, line in lines], frameon=False, fontsize=9, **beside)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _is_drawn(method: str) -> bool:
    """FastFill's map is FCT's: its points would hide each other's names."""
    return not method.startswith("fastfill")
