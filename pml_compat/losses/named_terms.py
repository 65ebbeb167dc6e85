"""Losses of several named terms that can each be read after the call."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.reducers import DoNothingReducer, MultipleReducers


class NamedTermsLoss(BaseMetricLossFunction):
    """Base of our losses whose terms can be read; after a call ``loss.terms`` holds each term's reduced value.

    ``terms`` maps every sub-loss name (the regularizer's too) to a detached 0-dimensional tensor, as it went into
    the sum; it is empty before the first call and with PML's ``DoNothingReducer``, which reduces nothing. With
    ``collect_stats=True`` the same values, as floats, are stats of the loss under the terms' names, so that PML's
    record-keeping logs them.
    """

    reducer: torch.nn.Module

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_to_recordable_attributes(list_of_names=self.sub_loss_names(), is_stat=True)

    def set_reducer(self, reducer: Any) -> None:
        """Give every term its own copy of ``reducer``, as PML does, and keep the reduced values."""
        super().set_reducer(reducer)
        if isinstance(self.reducer, MultipleReducers):
            self.reducer = TermReducers(self.reducer.reducers, default_reducer=self.reducer.default_reducer)
        elif not isinstance(self.reducer, DoNothingReducer):  # a loss of one term, whose reducer PML leaves unnamed
            self.reducer = TermReducers({self.sub_loss_names()[0]: self.reducer})

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss, as PML's losses do, and keep each term's value."""
        loss = super().forward(*args, **kwargs)
        if self.collect_stats:
            for name, term in self.terms.items():
                setattr(self, name, term.item())
        return loss

    @property
    def terms(self) -> dict[str, torch.Tensor]:
        """The reduced, detached value of each term in the last call."""
        return dict(getattr(self.reducer, "terms", {}))


class TermReducers(MultipleReducers):
    """PML's ``MultipleReducers``, summed in float32 or better (PML's float16 overflows at 65504), values kept."""

    def __init__(self, reducers: Any, **kwargs: Any) -> None:
        super().__init__(reducers, **kwargs)
        self.terms: dict[str, torch.Tensor] = {}

    def forward(self, loss_dict: dict[str, Any], embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Reduce each term by its reducer and return their sum in the dtype of ``embeddings``."""
        self.reset_stats()
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        values = {}
        for name, info in loss_dict.items():
            reducer = self.reducers[name] if name in self.reducers else self.default_reducer  # noqa: SIM401 (no .get)
            values[name] = reducer({name: info}, embeddings, labels).to(dtype).squeeze()
        self.terms = {name: value.detach() for name, value in values.items()}
        return torch.stack(list(values.values())).sum().to(embeddings.dtype)
