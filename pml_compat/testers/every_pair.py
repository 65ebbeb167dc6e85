"""Several pairs of query model and gallery model behind the face of one accuracy calculator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .._rows import fit_width
from ..accuracy import CrossModelAccuracyCalculator
from ..transformations import Transformation

_SPACES = ("old", "new", "transformed_old")
_PAIRS = {f"{query}_to_{gallery}": (query, gallery) for query in _SPACES for gallery in _SPACES}


class EveryPair:
    """What PML's testers and hooks ask of an accuracy calculator, for several pairs of models."""

    def __init__(self, calculator: CrossModelAccuracyCalculator, pairs: Mapping[str, tuple[str, str]]) -> None:
        self.calculator, self.pairs = calculator, pairs

    def description(self) -> str:
        """Return the calculator's."""
        return self.calculator.description()

    def get_curr_metrics(self) -> list[str]:
        """Name every metric of every pair."""
        return [f"{pair}_{metric}" for pair in self.pairs for metric in self.calculator.get_curr_metrics()]

    def get_accuracy(
        self,
        query: Mapping[str, torch.Tensor],
        query_labels: torch.Tensor,
        reference: Mapping[str, torch.Tensor],
        reference_labels: torch.Tensor,
        ref_includes_query: bool,
    ) -> dict[str, Any]:
        """Return every metric of every pair; ``query`` and ``reference`` are embeddings by the model's name."""
        accuracies = {}
        for pair, (query_model, gallery_model) in self.pairs.items():
            gallery = reference[gallery_model]
            own = fit_width(query[query_model], gallery.shape[1])
            found = self.calculator.get_accuracy(own, query_labels, gallery, reference_labels, ref_includes_query)
            accuracies.update({f"{pair}_{metric}": value for metric, value in found.items()})
        return accuracies


def check_pairs(pairs: Sequence[str] | None, transformation: Transformation | None) -> dict[str, tuple[str, str]]:
    """Return the models of each pair's query and gallery, or raise a ValueError."""
    if pairs is None:
        pairs = ("old_to_old", "new_to_old", "new_to_new")
        pairs += () if transformation is None else ("new_to_transformed_old",)
    if not pairs or not set(pairs) <= _PAIRS.keys():
        raise ValueError(f"pairs must be a sequence of {', '.join(_PAIRS)}, got {pairs!r}")
    if transformation is None and any("transformed" in pair for pair in pairs):
        raise ValueError(f"pairs must not name transformed_old without a transformation, got {pairs!r}")
    return {pair: _PAIRS[pair] for pair in pairs}
