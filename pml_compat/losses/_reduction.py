"""How the terms of a loss become one number."""

from __future__ import annotations

from typing import Any

import torch

from .._host import AvgNonZeroReducer, MeanReducer, MultipleReducers


class TermReducers(MultipleReducers):
    """PML's ``MultipleReducers``, summed in float32 or better (PML's float16 overflows at 65504), values kept.

    Terms are named as people name models, ``"v1.0"``, which torch's containers refuse.
    """

    def __init__(self, reducers: Any, **kwargs: Any) -> None:
        super().__init__({escaped(name): reducer for name, reducer in reducers.items()}, **kwargs)
        self.terms: dict[str, torch.Tensor] = {}

    def forward(self, loss_dict: dict[str, Any], embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Reduce each term by its reducer and return their sum."""
        values = [
            _reduced_by(self.of(name), name, info, embeddings, labels).to(embeddings.dtype)
            for name, info in loss_dict.items()
        ]
        self.terms.clear()
        self.terms.update((name, value.detach()) for name, value in zip(loss_dict, values, strict=True))
        return sum(values[1:], values[0])

    def of(self, name: str) -> torch.nn.Module:
        """Return the reducer of a term."""
        key = escaped(name)
        return self.reducers[key] if key in self.reducers else self.default_reducer  # noqa: SIM401 (no .get)


def _reduced_by(
    reducer: torch.nn.Module, name: str, info: dict[str, Any], embeddings: torch.Tensor, labels: Any
) -> torch.Tensor:
    """Return what PML's reducer gives; of the mean, without the checks and records around it."""
    losses = info["losses"]
    if type(reducer) is MeanReducer and not reducer.collect_stats and isinstance(losses, torch.Tensor):
        if info["reduction_type"] == "element":
            return losses.mean()
        if info["reduction_type"] == "already_reduced":
            return losses.squeeze()
    return reducer({name: with_indices(info)}, embeddings, labels).squeeze()


def is_mean(reducer: torch.nn.Module, name: str) -> bool:
    """Whether a term is reduced to the mean of its losses, and nothing else is asked of them."""
    own = reducer.of(name) if isinstance(reducer, TermReducers) else reducer
    return type(own) is MeanReducer and not own.collect_stats


class MeanOfPositive(AvgNonZeroReducer):
    """PML's ``AvgNonZeroReducer`` for one loss a row, without asking the device how many are above 0."""

    def element_reduction(
        self, losses: torch.Tensor, loss_indices: Any, embeddings: torch.Tensor, labels: Any
    ) -> torch.Tensor:
        """Return :func:`mean_of_positive`."""
        return mean_of_positive(losses)


def mean_of_positive(losses: torch.Tensor) -> torch.Tensor:
    """Return the mean over the losses above 0; where there are none, 0."""
    above = losses > 0
    return torch.where(above, losses, 0).sum() / above.sum().clamp(min=1)


def reduced(loss: torch.Tensor) -> dict[str, Any]:
    """Return the entry of a term that is one number already."""
    return {"losses": loss, "indices": None, "reduction_type": "already_reduced"}


def per_sample(losses: torch.Tensor, index: torch.Tensor | None = None) -> dict[str, Any]:
    """Return the entry of a term with one loss for each of the samples ``index``; None: for all of them."""
    return {"losses": losses, "indices": index, "reduction_type": "element", "divisor": len(losses)}


def with_indices(info: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of a term with the indices that it has one loss for; most reducers do without."""
    if info["indices"] is not None or info["reduction_type"] != "element":
        return info
    return {**info, "indices": torch.arange(len(info["losses"]), device=info["losses"].device)}


def escaped(name: str) -> str:
    """Return the name of a term as torch's containers take it."""
    return name.replace(".", "\u00b7")
