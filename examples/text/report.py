"""What the runs of ``upgrade.py`` reached, in tables."""

from __future__ import annotations

from typing import Any

import numpy as np

METRICS = ("precision_at_1", "mean_average_precision")


def summary(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the means over the seeds as Markdown, for each kind of split."""
    lines = []
    for kind, runs in results.items():
        lines.append(f"\n{kind}, mean of {len(runs)} seeds, in percent")
        lines += ["\n| way | P@1 | mAP | seconds |", "| --- | ---: | ---: | ---: |"]
        for way in runs[0]["ways"]:
            first, average = (100 * np.mean([run["ways"][way][metric] for run in runs]) for metric in METRICS)
            seconds = [run["ways"][way]["seconds"] for run in runs if "seconds" in run["ways"][way]]
            lines.append(f"| {way} | {first:.1f} | {average:.1f} | {f'{np.mean(seconds):.1f}' if seconds else ''} |")
        for name in runs[0]["curves"]:
            points = 100 * np.mean([run["curves"][name]["precision_at_1"] for run in runs], axis=0)
            lines.append(f"\nP@1, {name}, 0 to 100 % embedded anew: {' '.join(f'{point:.1f}' for point in points)}")
        lines.append("\n| query/gallery | FAR at today's threshold | TAR there | TAR, threshold set anew |")
        lines.append("| --- | ---: | ---: | ---: |")
        for pair in runs[0]["thresholds"]:
            found = [run["thresholds"][pair] for run in runs]
            far, tar, anew = (np.mean([one[key] for one in found]) for key in ("far", "tar", "tar_set_anew"))
            lines.append(f"| {pair} | {far:.2g} | {100 * tar:.1f} | {100 * anew:.1f} |")
        lines.append(f"\nverdicts: {', '.join(run['verdict'] for run in runs)}")
    return "\n".join(lines)
