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

from pml_compat.accuracy import CrossModelAccuracyCalculator, backfill_curve, is_compatible, negative_flip_rate
from pml_compat.accuracy import update_gain as gain_of

METRICS = {"precision_at_1": "top-1", "cmc_top_5": "top-5", "mean_average_precision": "mAP"}


def measure(
    method: str, embeddings: Callable[[str], torch.Tensor | None], labels: torch.Tensor, seed: int
) -> dict[str, Any]:
    """Return the accuracies of a method's pairs, the flips of the first place, and the backfill curve."""
    calculator = CrossModelAccuracyCalculator(include=tuple(METRICS))

    def per_query(query: torch.Tensor, gallery: torch.Tensor) -> dict[str, torch.Tensor]:
        # Queries and gallery are the same images: each is left out of its own ranking.
        return calculator.get_per_query_accuracy(query, labels, gallery, labels, ref_includes_query=True)

    def means(found: dict[str, torch.Tensor]) -> dict[str, float]:
        return {metric: float(values.mean()) for metric, values in found.items()}

    old = embeddings("old")
    assert old is not None
    old_to_old = per_query(old, old)
    if method == "old":
        return {"method": method, "old_to_old": means(old_to_old)}
    mapped = embeddings(f"{method}_gallery")
    new = embeddings("independent" if mapped is not None else method)
    assert new is not None
    gallery = old if mapped is None else mapped
    query = embeddings(f"{method}_query") if mapped is None else None
    cross = per_query(new if query is None else query, gallery)
    found: dict[str, Any] = {"method": method, "gallery": "old" if mapped is None else "transformed old"}
    found |= {"new_to_old": means(cross), "new_to_new": means(per_query(new, new))}
    found["negative_flips"] = negative_flip_rate(old_to_old["precision_at_1"], cross["precision_at_1"])
    if query is None and method != "independent":
        ids = torch.arange(len(labels))
        curve = backfill_curve(
            new, labels, gallery, new, labels, seed=seed, calculator=calculator, query_ids=ids, reference_ids=ids
        )
        found["backfill"] = {
            "fractions": list(curve.fractions),
            "values": {metric: list(values) for metric, values in curve.values.items()},
            "area": {metric: curve.area(metric) for metric in METRICS},
        }
    return found


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
        "| method | seeds | new/old | new/new | gain | criterion | negative flips | backfill area |",
        "|---|---:|---:|---:|---:|---|---:|---:|",
        f"| old (old/old) | {len(old)} | {_numbers(list(old.values()))} | | | | | |",
    ]
    for method, seeds in found.items():
        if method == "old":
            continue
        gains = {metric: [] for metric in METRICS}
        holds = []
        for one in seeds:
            before, after, independent = old[one["seed"]], one["new_to_old"], best.get(one["seed"])
            holds.append(all(is_compatible(old_to_old=before[m], new_to_old=after[m]) for m in METRICS))
            for metric, values in gains.items():
                if independent is not None:
                    pair = before[metric], after[metric]
                    values.append(gain_of(old_to_old=pair[0], new_to_old=pair[1], independent=independent[metric]))
        mapped = " T" if seeds[0]["gallery"] != "old" else ""
        area = [one["backfill"]["area"] for one in seeds if "backfill" in one]
        lines.append(
            f"| {method} | {len(seeds)} | {_numbers([one['new_to_old'] for one in seeds])}{mapped} "
            f"| {_numbers([one['new_to_new'] for one in seeds])} "
            f"| {' / '.join(_spread(values, 1, 2) for values in gains.values())} | {sum(holds)} of {len(holds)} "
            f"| {_spread([one['negative_flips'] for one in seeds], 100, 1)} | {_numbers(area) if area else ''} |"
        )
    return lines


def _numbers(seeds: list[dict[str, float]]) -> str:
    return " / ".join(_spread([one[metric] for one in seeds], 100, 1) for metric in METRICS)


def _spread(values: list[float], factor: float, digits: int) -> str:
    if not values or any(math.isnan(value) for value in values):
        return "-"
    mean = f"{factor * statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ±{factor * statistics.stdev(values):.{digits}f}"
