"""An upgrade measured on stored embeddings: every query model on every gallery that is given, and what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import __version__
from ..accuracy import CrossModelAccuracyCalculator
from ..extras import import_extra
from ..files import whole_folder
from ..report.evaluation_table import summary_table, to_rich
from ..report.html_page import html_page
from ..report.markdown_page import markdown_page
from ..upgrade import backfill_curve, pair_criterion
from ..upgrade.evaluation import ALL_METRICS, METRICS, PAIR_NAMES, Backfill, Evaluation, flips_to_json
from ..upgrade.verdict import UpgradeVerdict, upgrade_verdict
from ..verification import verification
from .estimate import print_estimate
from .inputs import Embeddings, Inputs, load

_BLOCK = 1024  # queries ranked between two steps of the progress bar
_FRACTIONS = 11  # measured shares of a backfill, both ends included


class WatchedCalculator(CrossModelAccuracyCalculator):
    """Ranks block of queries by block, moves a progress bar, and keeps what each query got."""

    def __init__(self, progress: tqdm | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.progress = progress
        self.per_query: list[dict[str, torch.Tensor]] = []

    def get_accuracy(
        self,
        query: Any,
        query_labels: Any,
        reference: Any = None,
        reference_labels: Any = None,
        *args: Any,
        **codes: Any,
    ) -> dict[str, Any]:
        """Return the mean of each metric; ``per_query`` grows by one entry."""
        blocks = []
        for start in range(0, len(query), _BLOCK):
            rows = slice(start, start + _BLOCK)
            own = {name: value[rows] if name.startswith("query_") else value for name, value in codes.items()}
            blocks.append(
                self.get_per_query_accuracy(query[rows], query_labels[rows], reference, reference_labels, **own)
            )
            if self.progress is not None:
                self.progress.update(len(query[rows]))
        self.per_query.append({metric: torch.cat([block[metric] for block in blocks]) for metric in blocks[0]})
        return {metric: float(values.nanmean()) for metric, values in self.per_query[-1].items()}


def run_evaluate(inputs: Inputs, out: Path) -> tuple[Evaluation, UpgradeVerdict]:
    """Measure, print the table and the verdict, and write metrics.json, report.md and report.html.

    Args:
        inputs: the files and settings.
        out: the folder; its files appear together at the end, or not at all.
    Raises:
        FileNotFoundError: an input that is not there.
        ImportError: the ``report`` extra, or for a Parquet file pyarrow, is not installed; before anything is computed.
        ValueError: files that cannot be read or do not fit together; which, and what to do about it.
    """
    console = import_extra("rich.console", "report").Console()
    import_extra("matplotlib.figure", "report")
    with whole_folder(out) as folder:
        embeddings = load(inputs)
        evaluation = measure(embeddings, inputs)
        verdict = upgrade_verdict(evaluation)
        _write(folder, evaluation, verdict)
    console.print(to_rich(summary_table(evaluation)))
    console.print(f"{verdict.title}. {verdict.summary}", style="bold", highlight=False)
    for sentence in [*verdict.reasons, *verdict.warnings, *verdict.missing, *evaluation.notes]:
        console.print(f"- {sentence}", highlight=False, markup=False)
    console.print(f"Written to {out}: metrics.json, report.md, report.html", highlight=False, markup=False)
    return evaluation, verdict


def measure(embeddings: Embeddings, inputs: Inputs) -> Evaluation:
    """Rank everything, after an estimate of the memory and the time on stderr."""
    queries, galleries = embeddings.queries, embeddings.galleries
    calculator = WatchedCalculator(include=tuple(ALL_METRICS), k=inputs.k, device=inputs.device)
    pairs = [(query, gallery) for query in ("old", "new") for gallery in galleries if query in queries]
    pairs = [pair for pair in pairs if pair != ("old", "transformed_old")]
    starts = [name for name in galleries if name != "new"] if "new" in galleries else []
    labels, gallery_labels = embeddings.query_labels.cpu(), embeddings.gallery_labels.cpu()
    rankings = len(pairs) + _FRACTIONS * len(starts)
    print_estimate(embeddings, calculator, rankings)

    passes = rankings + ("old" in queries) + bool(inputs.fars)
    with tqdm(total=passes * len(labels), unit="query", unit_scale=True) as progress:
        calculator.progress = progress
        found = {}
        for query, gallery in pairs:
            progress.set_description(f"{query}/{gallery.replace('_', ' ')}")
            calculator.get_accuracy(queries[query], labels, galleries[gallery], gallery_labels, **embeddings.codes)
            found[f"{query}_to_{gallery}"] = calculator.per_query[-1]
        backfill = {}
        for start in starts:
            progress.set_description(f"backfill of {start.replace('_', ' ')}")
            backfill[start] = _measure_backfill(embeddings, start, inputs, progress)
        items = {name: value for name, value in embeddings.codes.items() if name.endswith("_ids")}
        criterion = verified = None
        if "old" in queries:
            progress.set_description("pair criterion")
            criterion = pair_criterion(
                queries["old"], queries["new"], labels, galleries["old"], gallery_labels, **items
            )
            progress.update(len(labels))
        if inputs.fars:
            progress.set_description("verification")
            verified = _verify(embeddings, inputs.fars, items)
            progress.update(len(labels))
        scored = ~found["new_to_old"]["precision_at_1"].isnan()
        notes = list(embeddings.notes)
        if not scored.all():
            n_lone = int((~scored).sum())
            notes.append(f"{n_lone:,} queries have no item of their label in the gallery and do not count.")
        evaluation = Evaluation(
            data={**embeddings.data, "scored_queries": int(scored.sum())},
            labels=labels,
            gallery_size=len(gallery_labels),
            pairs={pair: found[pair] for pair in PAIR_NAMES if pair in found},
            backfill=backfill,
            criterion=criterion,
            verification=verified,
            notes=notes,
            seed=inputs.seed,
        )
        progress.set_description("intervals")
        evaluation.compute_intervals()
    return evaluation


def _measure_backfill(embeddings: Embeddings, start: str, inputs: Inputs, progress: tqdm) -> Backfill:
    calculator = WatchedCalculator(progress, include=tuple(METRICS), k=inputs.k, device=inputs.device)
    curve = backfill_curve(
        embeddings.queries["new"],
        embeddings.query_labels.cpu(),
        embeddings.galleries[start],
        embeddings.galleries["new"],
        embeddings.gallery_labels.cpu(),
        fractions=[step / (_FRACTIONS - 1) for step in range(_FRACTIONS)],
        seed=inputs.seed,
        calculator=calculator,
        **embeddings.codes,
    )
    vectors = tuple(int(fraction * len(curve.order) + 1e-6) for fraction in curve.fractions)
    return Backfill("random", curve.fractions, vectors, calculator.per_query)


def _verify(embeddings: Embeddings, fars: Sequence[float], items: Mapping[str, Any]) -> dict[str, Any]:
    queries, galleries = embeddings.queries, embeddings.galleries
    labels, gallery_labels = embeddings.query_labels, embeddings.gallery_labels
    found: dict[str, Any] = {}
    thresholds: Mapping[float, float] = {}
    for model, name in [("old", "old"), *(("new", name) for name in galleries)]:
        if model in queries:
            gallery = galleries[name]
            one = verification(
                queries[model], labels, gallery, gallery_labels, fars=fars, thresholds=thresholds, **items
            )
            found[f"{model}_to_{name}"] = one
            thresholds = one.thresholds if model == "old" else thresholds  # what the service runs with today
    return found


def _write(folder: Path, evaluation: Evaluation, verdict: UpgradeVerdict) -> None:
    values = {"pml_compat": __version__, **evaluation.to_json()}
    if verdict.flips is not None and verdict.outcome == "backfill_first":
        values["negative_flips"]["backfill"] = flips_to_json(verdict.flips)
    values["verdict"] = verdict.to_json()
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    (folder / "metrics.json").write_text(text, encoding="utf-8")
    (folder / "report.md").write_text(markdown_page(evaluation, verdict, "Upgrade report"), encoding="utf-8")
    page = html_page(evaluation, verdict, "Upgrade report")
    (folder / "report.html").write_text(page, encoding="utf-8")
