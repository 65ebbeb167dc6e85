"""What all our losses share: named terms, and one look at what is given."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from .._checks import check_labels, check_matrix, check_number, one_read, values_are_known, values_known
from .._host import BaseMetricLossFunction, DoNothingReducer, MultipleReducers, to_device
from .._rows import at_least_float32
from ..frozen.old_references import as_rows
from ._reduction import TermReducers, with_indices
from .old_rows import check_row_values


class NamedTermsLoss(BaseMetricLossFunction):
    """Base of our losses, whose terms can be read; after a call ``loss.terms`` holds each term's reduced value.

    ``terms`` maps every sub-loss name (the regularizer's too) to a detached 0-dimensional tensor, as it went into
    the sum; it is empty before the first call and with PML's ``DoNothingReducer``, which reduces nothing. With
    ``collect_stats=True`` the same values, as floats, are stats of the loss under the terms' names, so that PML's
    record-keeping logs them.

    The loss is float32, or float64 for float64 embeddings: float16 has no room for a loss that is scaled. A call reads
    one value back from the device at most, besides what PML's own modules read: :meth:`check_given` checks the values
    of all that is given before :meth:`compute_loss` starts, and inside it values are taken for checked.

    Who owns what: a loss owns what nobody else runs, and it is in its ``parameters()`` and ``state_dict()``: the task
    loss, class weights, a discriminator. What the model runs is the model's, and the loss only refers to it.
    """

    reducer: torch.nn.Module

    # Whether the loss of what is not finite is not finite, and the call leaves nothing behind: then the loss is the one
    # value that is read, and what was given is looked through only where it is not finite.
    tells_by_its_value = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_to_recordable_attributes(list_of_names=self.sub_loss_names(), is_stat=True)

    @property
    def needs_ref_emb(self) -> bool:
        """Whether the loss is called with the other model's embeddings, ``ref_emb``: trainers ask."""
        return False

    @property
    def needs_labels(self) -> bool:
        """Whether the loss cannot be called without labels."""
        return True

    def set_reducer(self, reducer: Any) -> None:
        """Give every term its own copy of ``reducer``, as PML does, and keep the reduced values."""
        if isinstance(reducer, DoNothingReducer):
            self.reducer = reducer
        elif isinstance(reducer, MultipleReducers):
            self.reducer = TermReducers(reducer.reducers, default_reducer=reducer.default_reducer)
        else:
            own = {
                name: self.get_default_reducer() if reducer is None else copy.deepcopy(reducer)
                for name in self.sub_loss_names()
            }
            self.reducer = TermReducers(own)

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Any = None,
        ref_labels: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """Return the loss, as PML's losses do, and keep each term's value; what was not given stays None.

        ``others`` are the loss's own keywords, and those of the task loss where it wraps one.
        """
        if self.collect_stats:
            self.reset_stats()
        check_matrix(embeddings)
        if labels is not None:
            labels = to_device(torch.as_tensor(labels), embeddings)
            if labels.shape != embeddings.shape[:1]:  # an error, which says what is wrong
                check_labels(labels, length=len(embeddings))
        ref_emb = self.references(ref_emb, embeddings)
        if ref_labels is not None:
            ref_labels = to_device(torch.as_tensor(ref_labels), embeddings)
        given = embeddings, labels, indices_tuple, ref_emb, ref_labels
        if torch.compiler.is_compiling():  # values are not read there
            return self._reduce(*given, others)
        late = self.tells_by_its_value and isinstance(self.reducer, TermReducers)
        if not late and not values_are_known():
            with one_read():
                self.check_given(*given, **others)
        with values_known():
            loss = self._reduce(*given, others)
        if late and not values_are_known() and not math.isfinite(loss.item()):
            with one_read():
                self.check_given(*given, **others)
        if self.collect_stats:
            for name, term in self.terms.items():
                setattr(self, name, term.item())
        return loss

    def references(self, ref_emb: Any, embeddings: torch.Tensor) -> Any:
        """Return ``ref_emb`` as tensors, where the embeddings are; PML's for "none", the embeddings, as None."""
        return None if ref_emb is embeddings else as_rows(ref_emb, embeddings)

    def _reduce(
        self, embeddings: torch.Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any, others: Any
    ) -> torch.Tensor:
        loss_dict = self.compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels, **others)
        precise = at_least_float32(embeddings)
        self.add_embedding_regularization_to_loss_dict(loss_dict, precise)
        if not isinstance(self.reducer, TermReducers):
            loss_dict = {name: with_indices(info) for name, info in loss_dict.items()}
        return self.reducer(loss_dict, precise, labels)

    def check_given(
        self, embeddings: torch.Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any, **others: Any
    ) -> None:
        """Check the values of what is given; shapes are checked where they are used."""
        check_row_values(embeddings, ref_emb)
        if labels is not None:
            self.look_at_labels(labels, ref_labels)
        elif self.needs_labels:
            check_labels(labels)

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Check what the terms ask of labels, and count the rows that they are for."""

    @property
    def terms(self) -> dict[str, torch.Tensor]:
        """The reduced, detached value of each term in the last call."""
        return dict(getattr(self.reducer, "terms", {}))


def check_weight(value: Any, name: str) -> float | None:
    """Return a term's multiplier, 0 or more, or None, which stands for one that is measured."""
    return None if value is None else check_number(value, name, minimum=0)
