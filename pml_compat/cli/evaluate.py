"""``pml-compat evaluate``: :func:`pml_compat.upgrade.evaluate` on files, with what it found on paper."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .._extras import import_extra
from .._files import whole_folder
from ..report.evaluation_table import summary_table, to_rich
from ..report.markdown_page import markdown_page
from ..report.page import html_page
from ..upgrade import Evaluation, evaluate
from .estimate import print_estimate
from .inputs import Inputs, load


def run_evaluate(inputs: Inputs, out: Path, *, as_json: bool = False) -> Evaluation:
    """Measure, print the table and the verdict, and write metrics.json, report.md and report.html.

    Args:
        inputs: the files and settings.
        out: the folder; its files appear together at the end, or not at all.
        as_json: print metrics.json instead of the table.
    Raises:
        FileNotFoundError: an input that is not there.
        ImportError: the ``report`` extra, or for a Parquet file pyarrow, is not installed; before anything is computed.
        ValueError: files that cannot be read or do not fit together; which, and what to do about it.
    """
    console = import_extra("rich.console", "report").Console()
    import_extra("matplotlib.figure", "report")
    with whole_folder(out) as folder:
        arrays = load(inputs)
        print_estimate(arrays, inputs)
        evaluation = evaluate(**arrays, progress=True)
        evaluation.data["files"] = inputs.files()
        values = evaluation.to_json(folder / "metrics.json")
        (folder / "report.md").write_text(markdown_page(evaluation, evaluation.verdict, _TITLE), encoding="utf-8")
        (folder / "report.html").write_text(html_page(evaluation, evaluation.verdict, _TITLE), encoding="utf-8")
    if as_json:
        json.dump(values, sys.stdout, indent=2, allow_nan=False)
        print()
        return evaluation
    verdict = evaluation.verdict
    console.print(to_rich(summary_table(evaluation)))
    console.print(f"{verdict.title}. {verdict.summary}", style="bold", highlight=False)
    for sentence in [*verdict.reasons, *verdict.warnings, *verdict.missing, *evaluation.notes]:
        console.print(f"- {sentence}", highlight=False, markup=False)
    console.print(f"Written to {out}: metrics.json, report.md, report.html", highlight=False, markup=False)
    return evaluation


_TITLE = "Upgrade report"
