"""The pictures of an evaluation, as SVG to put into a page: they take on its text colour, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from .._extras import import_extra
from ..upgrade.evaluation import Evaluation
from ..upgrade.names import METRICS, PAIR_NAMES
from ..upgrade.verdict import UpgradeVerdict

_INK = "#010203"  # stands for the page's text colour until the SVG is written
_LONGEST = 22  # letters of a class's name beside its bar
PAIR_COLORS = {
    "old_to_old": "#8a8f98",
    "new_to_old": "#d1603d",
    "new_to_transformed_old": "#d9a441",
    "new_to_new": "#3d86ad",
    "old_to_new": "#8c6bb1",
    "rotated_to_old": "#a9b665",
    "blended_to_old": "#5f9e4f",
}
_STYLES = {"old_to_old": (0, (5, 2)), "old_to_new": (0, (1, 1.5))}  # told apart without colours, too
_STARTS = {
    "old": ("from the stored gallery", PAIR_COLORS["new_to_old"]),
    "transformed_old": ("from the transformed gallery", PAIR_COLORS["new_to_transformed_old"]),
}


def draw_matrix(evaluation: Evaluation) -> str:
    """Return query models against galleries as a heat map, one panel a metric."""
    galleries = [("old", "old"), ("transformed_old", "transformed\nold"), ("new", "new")]
    galleries = [g for g in galleries if any(pair.endswith(f"_to_{g[0]}") for pair in evaluation.pairs)]
    queries = [
        model for model in ("old", "new", "blended") if any(pair.startswith(f"{model}_to") for pair in evaluation.pairs)
    ]

    def draw(figure: Any) -> None:
        colors = import_extra("matplotlib", "report").colormaps["YlGnBu"]
        panels = figure.subplots(1, len(METRICS), sharey=True)
        for panel, (metric, name) in zip(panels, METRICS.items(), strict=True):
            for row, query in enumerate(queries):
                for column, (gallery, _) in enumerate(galleries):
                    pair = f"{query}_to_{gallery}"
                    value = evaluation.accuracy(pair, metric) if pair in evaluation.pairs else None
                    color = (0.0, 0.0, 0.0, 0.0) if value is None else colors(0.1 + 0.8 * value)
                    panel.add_patch(_rectangle(column, row, color))
                    text, ink = (
                        ("not\nmeasured", _INK) if value is None else (f"{100 * value:.1f}", _readable_on(color))
                    )
                    panel.text(
                        column, row, text, ha="center", va="center", color=ink, fontsize=11 if value is not None else 8
                    )
            panel.set(xlim=(-0.52, len(galleries) - 0.48), ylim=(len(queries) - 0.48, -0.52), title=name)
            panel.set_xticks(range(len(galleries)), [text for _, text in galleries], fontsize=9)
            panel.set_yticks(range(len(queries)), queries)
            panel.set_xlabel("gallery")
            panel.tick_params(length=0)
            panel.spines[:].set_visible(False)
        panels[0].set_ylabel("queries")

    return _svg(draw, "matrix", height=1.2 + 0.7 * len(queries))


def draw_cmc(evaluation: Evaluation) -> str:
    """Return the share of queries with a right item in the first k places, one line a pair."""

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        for pair, values in evaluation.pairs.items():
            if "mean_reciprocal_rank" not in values:  # two stages
                continue
            curve = [100 * value for value in evaluation.cmc(pair)]
            panel.plot(
                range(1, len(curve) + 1),
                curve,
                label=PAIR_NAMES[pair],
                color=PAIR_COLORS[pair],
                linestyle=_STYLES.get(pair, "-"),
                linewidth=1.8,
                marker="o" if len(curve) == 1 else None,
            )
        panel.set_xscale("log")
        last = len(evaluation.cmc(next(iter(evaluation.pairs))))
        ticks = [place for place in (1, 2, 5, 10, 20, 50, 100) if place <= last]
        panel.set_xticks(ticks, [str(place) for place in ticks])
        panel.minorticks_off()
        panel.set(xlabel="first k places", ylabel="queries with a right item, %")
        _finish(panel)

    return _svg(draw, "cmc")


def draw_backfill(evaluation: Evaluation, verdict: UpgradeVerdict) -> str:
    """Return accuracy against the share of re-embedded vectors, beside today's system."""

    def draw(figure: Any) -> None:
        panels = figure.subplots(len(METRICS), 1, sharex=True)
        for panel, (metric, name) in zip(panels, METRICS.items(), strict=True):
            old = evaluation.accuracy("old_to_old", metric) if "old_to_old" in evaluation.pairs else None
            if old is not None:
                panel.axhline(
                    100 * old, color=PAIR_COLORS["old_to_old"], linestyle=_STYLES["old_to_old"], label="old/old"
                )
            for start, curve in evaluation.backfill.items():
                label, color = _STARTS[start]
                shares = [100 * fraction for fraction in curve.fractions]
                if old is not None:
                    steps = [step[metric] for step in evaluation.backfill_differences[start]]
                    low, high = ([100 * (old + getattr(s, end)) for s in steps] for end in ("low", "high"))
                    panel.fill_between(shares, low, high, color=color, alpha=0.2, linewidth=0)
                panel.plot(
                    shares, [100 * v for v in curve.values(metric)], color=color, marker="o", markersize=3, label=label
                )
            option = verdict.option
            if option is not None and verdict.outcome == "backfill_first":
                panel.axvline(100 * option.share, color=_INK, linewidth=1, label=f"{option.share:.0%}")
            panel.set_ylabel(f"{name}, %")
            _finish(panel, legend=panel is panels[0])
        panels[-1].set_xlabel("re-embedded share of the gallery, %")

    return _svg(draw, "backfill", height=4.2)


def draw_flips(verdict: UpgradeVerdict) -> str:
    """Return the classes with the most queries that turn from right to wrong, as bars."""
    worst = verdict.flips.worst()[::-1] if verdict.flips is not None else []

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        rates = [100 * one.flips / one.queries for one in worst]
        panel.barh(range(len(worst)), rates, color=PAIR_COLORS["new_to_old"], height=0.65)
        for place, (one, rate) in enumerate(zip(worst, rates, strict=True)):
            beside = rate + 0.03 * max(rates)  # a space in front would be lost in SVG
            panel.text(beside, place, f"{one.flips:g} of {one.queries}", va="center", color=_INK, fontsize=9)
        panel.set_yticks(range(len(worst)), [_shortened(str(one.label)) for one in worst])
        panel.set(xlabel="broken queries, %", ylabel="class", xlim=(0, 1.5 * max(rates)))
        _finish(panel, legend=False)

    return _svg(draw, "flips", height=1.1 + 0.27 * len(worst))


def _shortened(label: str) -> str:
    """Return a class's name with its middle left out where it would take the bars' room."""
    return label if len(label) <= _LONGEST else f"{label[: _LONGEST // 2]}…{label[-(_LONGEST // 2 - 1) :]}"


def _rectangle(column: int, row: int, color: Any) -> Any:
    patches = import_extra("matplotlib.patches", "report")
    return patches.Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, facecolor=color, edgecolor="none")


def _readable_on(color: tuple[float, ...]) -> str:
    red, green, blue = color[:3]
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.6 else "#1a1a1a"


def _finish(panel: Any, *, legend: bool = True) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="both", color=_INK, alpha=0.12, linewidth=0.6)
    panel.set_axisbelow(True)
    if legend:
        panel.legend(frameon=False, fontsize=9, labelcolor=_INK)


def _svg(draw: Callable[[Any], None], name: str, *, height: float = 3.2) -> str:
    """Run ``draw`` on a figure, and return the figure as an ``<svg>`` element with ids of its own."""
    matplotlib = import_extra("matplotlib", "report")
    figure_module = import_extra("matplotlib.figure", "report")
    ink = {key: _INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    style = {**ink, "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "axes.titlesize": 11}
    file = io.StringIO()
    with matplotlib.rc_context(style):
        figure = figure_module.Figure(figsize=(4.8, height), layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = _bare_root(text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    return text.replace(_INK, "currentColor").replace("xlink:href", "href")


def _bare_root(text: str) -> str:
    """Return the SVG without what a page needs not: name spaces and a size in points."""
    root, rest = text.split(">", 1)
    return re.sub(r'\s+(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", root) + ">" + rest
