"""The papers' tables: what was measured of every method, over the seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plots import plot_backfill, plot_trade_off

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.gallery import backfill_scores
from pml_compat.serving import MixedGallery, two_stage_accuracy
from pml_compat.upgrade import backfill_curve, is_compatible
from pml_compat.upgrade import update_gain as gain_of
from pml_compat.upgrade.negative_flips import negative_flip_rate

AREAS = {
    "backfill": "area",
    "backfill_worst_first": "area, worst first",
    "backfill_by_margin": "area, by margin",
    "mixed": "calibrated area",
    "mixed_worst_first": "calibrated area, worst first",
    "mixed_by_margin": "calibrated area, by margin",
}
TENTHS = tuple(step / 10 for step in range(11))
METRICS = {"precision_at_1": "top-1", "cmc_top_5": "top-5", "mean_average_precision": "mAP"}


def measure(
    method: str, embeddings: Callable[[str, str], torch.Tensor | None], labels: dict[str, torch.Tensor], seed: int
) -> dict[str, Any]:
    """Return the accuracies of a method's pairs, the flips of the first place, and the backfill curves.

    Args:
        method: its name.
        embeddings: what gives the stored embeddings of a name and a part, None where there are none.
        labels: of the parts ``"test"`` and, where a mixed gallery can be calibrated, ``"calibration"``.
        seed: of a random backfill.
    """
    calculator = CrossModelAccuracyCalculator(include=tuple(METRICS), fit_width=True)

    def per_query(query: torch.Tensor, gallery: torch.Tensor) -> dict[str, torch.Tensor]:
        # Queries and gallery are the same images: each is left out of its own ranking.
        return calculator.get_per_query_accuracy(
            query, labels["test"], gallery, labels["test"], ref_includes_query=True
        )

    def rows(part: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the gallery's old vectors, new ones, and what searches the old ones if that is not these."""
        old, mapped = embeddings("old", part), embeddings(f"{method}_gallery", part)
        new = embeddings("independent" if mapped is not None else method, part)
        assert old is not None and new is not None
        return old if mapped is None else mapped, new, embeddings(f"{method}_query", part)

    old = embeddings("old", "test")
    assert old is not None
    old_to_old = per_query(old, old)
    if method == "old":
        return {"method": method, "old_to_old": _means(old_to_old)}
    gallery, new, query = rows("test")
    if method.startswith("two_stages_"):
        depth = int(method.rsplit("_", 1)[1])
        reached = two_stage_accuracy(old, new, old, new, labels["test"], labels["test"], depth=depth, same_items=True)
        found = {"method": method, "gallery": "old", "new_to_new": _means(per_query(new, new))}
        return found | {"new_to_old": {metric: reached[depth].get(metric, math.nan) for metric in METRICS}}
    cross = per_query(new if query is None else query, gallery)
    found: dict[str, Any] = {"method": method, "gallery": "transformed old"}
    if embeddings(f"{method}_gallery", "test") is None:
        found["gallery"] = "old"
    found |= {"new_to_old": _means(cross), "new_to_new": _means(per_query(new, new))}
    found["negative_flips"] = negative_flip_rate(old_to_old["precision_at_1"], cross["precision_at_1"])
    if method == "independent":
        return found

    ids = torch.arange(len(new))
    orders = {
        "": "random",
        "_worst_first": embeddings(f"{method}_uncertainty", "test"),
        "_by_margin": None if found["gallery"] == "old" else backfill_scores(gallery, labels["test"]),
    }

    def curve(name: str, query: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
        """Measure a backfill in random order, by predicted errors, and by class margins where that is of use."""
        for suffix, order in orders.items():
            if order is not None:
                given = {"order": order, "seed": seed, "calculator": calculator, "query_ids": ids, "reference_ids": ids}
                given["fit_width"] = True
                fractions = TENTHS if len(ids) <= 10_000 else TENTHS[::2]
                measured = backfill_curve(query, labels["test"], old, new, labels["test"], fractions=fractions, **given)
                found[name + suffix] = {
                    "fractions": list(measured.fractions),
                    "values": {metric: list(values) for metric, values in measured.values.items()},
                    "area": {metric: measured.area(metric) for metric in METRICS},
                }

    if query is None:
        curve("backfill", new, gallery, new)
    if "calibration" in labels:
        old_rows, new_rows, searching = rows("calibration")
        one_space = searching is None
        mixed = MixedGallery.fit(
            new_rows if one_space else searching, old_rows, labels["calibration"], None if one_space else new_rows
        )
        queries = mixed.query_rows(new) if query is None else mixed.query_rows(query, new)
        curve("mixed", queries, mixed.old_rows(gallery), mixed.new_rows(new))
    return found


def _means(found: dict[str, torch.Tensor]) -> dict[str, float]:
    return {metric: float(values.mean()) for metric, values in found.items()}


def report(folder: Path) -> str:
    """Gather every seed's measurements into results.json and report.md, and return the table."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("seed_*/*.json")):
        measured = json.loads(path.read_text())
        found.setdefault(measured["method"], []).append(measured)
    (folder / "results.json").write_text(json.dumps(found, indent=1))
    text = "\n".join(table(found))
    (folder / "report.md").write_text(text + "\n")
    if "independent" in found and len(found) > 2:
        plot_trade_off(found, folder / "trade_off.png")
        plot_backfill(found, folder / "backfill.png")
    return text


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return a Markdown table: top-1 / top-5 / mAP in percent, means over the seeds, and their spread."""
    old = {one["seed"]: one["old_to_old"] for one in found.get("old", [])}
    best = {one["seed"]: one["new_to_new"] for one in found.get("independent", [])}
    lines = [
        "| method | seeds | new/old | new/new | gain | criterion | negative flips | "
        + " | ".join(AREAS.values())
        + " |",
        "|---|---:|---:|---:|---:|---|---:|" + "---:|" * len(AREAS),
        f"| old (old/old) | {len(old)} | {_numbers(list(old.values()))} | | | | |" + " |" * len(AREAS),
    ]
    for method, seeds in found.items():
        if method == "old":
            continue
        gains = {metric: [] for metric in METRICS}
        holds = []
        for one in seeds:
            before, after, independent = old[one["seed"]], one["new_to_old"], best.get(one["seed"])
            measured = [metric for metric in METRICS if not math.isnan(after[metric])]
            holds.append(all(is_compatible(old_to_old=before[m], new_to_old=after[m]) for m in measured))
            for metric, values in gains.items():
                if independent is not None and metric in measured:
                    pair = before[metric], after[metric]
                    values.append(gain_of(old_to_old=pair[0], new_to_old=pair[1], independent=independent[metric]))
        mapped = " T" if seeds[0]["gallery"] != "old" else ""
        areas = [[one[name]["area"] for one in seeds if name in one] for name in AREAS]
        lines.append(
            f"| {method} | {len(seeds)} | {_numbers([one['new_to_old'] for one in seeds])}{mapped} "
            f"| {_numbers([one['new_to_new'] for one in seeds])} "
            f"| {' / '.join(_spread(values, 1, 2) for values in gains.values())} | {sum(holds)} of {len(holds)} "
            f"| {_spread([one['negative_flips'] for one in seeds if 'negative_flips' in one], 100, 1)} "
            + "".join(f"| {_numbers(area) if area else ''} " for area in areas)
            + "|"
        )
    return lines


def _numbers(seeds: list[dict[str, float]]) -> str:
    return " / ".join(_spread([one[metric] for one in seeds], 100, 1) for metric in METRICS)


def _spread(values: list[float], factor: float, digits: int) -> str:
    if not values or any(math.isnan(value) for value in values):
        return "-"
    mean = f"{factor * statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ±{factor * statistics.stdev(values):.{digits}f}"
