"""Verification of an evaluation's pairs of models, of all queries or of some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..verification import verification
from ..verification.verification import VerificationResult
from .evaluation import Evaluation
from .prepare import Prepared


def verify(
    ready: Prepared,
    rates: list[float],
    items: dict[str, Any],
    pairs: Sequence[tuple[str, str]],
    fit_width: bool,
    thresholds: Mapping[float, float] = {},
    rows: torch.Tensor | slice = slice(None),
) -> dict[str, VerificationResult]:
    """Measure verification of some queries, at rates and at thresholds: by default those of the old model."""
    items = {name: value[rows] if name.startswith("query_") else value for name, value in items.items()}
    found: dict[str, Any] = {}
    for model, name in [("old", "old"), *(("new", name) for name in ready.galleries)]:
        if (model, name) in pairs:
            one = verification(
                ready.queries[model][rows],
                ready.labels[0][rows],
                ready.galleries[name],
                ready.labels[1],
                fars=rates,
                thresholds=thresholds,
                fit_width=fit_width,
                **items,
            )
            found[f"{model}_to_{name}"] = one
            if model == "old" and not thresholds:  # what the service runs with today
                thresholds = one.thresholds
    return found


def verify_some(
    ready: Prepared, rates: list[float], found: Evaluation, rows: torch.Tensor, fit_width: bool
) -> dict[str, VerificationResult] | None:
    """Verify some queries at the thresholds of all; None where they have no genuine or no impostor pair."""
    if found.verification is None:
        return None
    items = {name: value for name, value in ready.codes.items() if name.endswith("_ids")}
    pairs = [(query, gallery) for query, gallery in (pair.split("_to_") for pair in found.verification)]
    old = found.verification.get("old_to_old")
    genuine = torch.isin(ready.labels[0][rows], ready.labels[1])
    if not genuine.any() or len(ready.labels[1].unique()) < 2:
        return None
    return verify(ready, rates, items, pairs, fit_width, {} if old is None else old.thresholds, rows)
