"""An evaluation as Markdown: everything that its HTML page says, but for the pictures."""

from __future__ import annotations

import torch

from .. import __version__
from ..upgrade.evaluation import Evaluation, criterion_in_words
from ..upgrade.verdict import UpgradeVerdict
from .evaluation_table import all_tables, to_markdown


def details_in_words(evaluation: Evaluation) -> str:
    """Return what was measured on, and by what version, in a sentence."""
    data = evaluation.data
    length = "of unit length" if data["normalized"] else "as stored"
    own = {"position": ", row i the same item in both", "id": ", items told apart by id", None: ""}[data["same_items"]]
    return (
        f"{data['queries']:,} queries on {data['gallery']:,} gallery items of {data['classes']:,} classes{own}; "
        f"embeddings {length}; pml-compat {__version__}, torch {torch.__version__}."
    )


def markdown_page(evaluation: Evaluation, verdict: UpgradeVerdict, title: str) -> str:
    """Return verdict, reasons and every table as Markdown."""
    parts = [f"# {title}", details_in_words(evaluation), f"## {verdict.title}", verdict.summary]
    lists = {"Why": verdict.reasons, "Watch out": verdict.warnings, "To say more": verdict.missing}
    for heading, sentences in {**lists, "About the input": evaluation.notes}.items():
        if sentences:
            parts += [f"**{heading}**", "\n".join(f"- {sentence}" for sentence in sentences)]
    for table in all_tables(evaluation, verdict):
        parts += [f"## {table.title}", to_markdown(table)]
    if evaluation.criterion is not None:
        parts.append(criterion_in_words(evaluation))
    return "\n\n".join(parts) + "\n"
