"""Losses of several prefixes of one embedding, so that the first coordinates fit an old gallery and all are better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .._checks import check_integer, check_number
from ..frozen import class_weights
from ._base import NamedTermsLoss
from ._reduction import reduced
from ._task import Given, TaskAndTermsLoss
from .old_rows import check_row_values


class MatryoshkaLoss(NamedTermsLoss):
    r"""Train prefixes of an embedding, each by a loss of its own.

    .. math:: L = \sum_m c_m \, L_m(f_{1:m}, y)

    A new model of 512 coordinates whose first 128 fit the old gallery of 128: ``MatryoshkaLoss({128: BCTLoss(...),
    512: ArcFaceLoss(...)})``. New queries are served to the old gallery as ``fit_width(new, 128)``; the new gallery has
    all of them, or any prefix that was trained.

    Args:
        losses: width of a prefix to its loss: any PML loss, or one of ours; losses with class weights are made for that
            width. A loss has parameters of its own, which are in ``parameters()``.
        weights: the multipliers :math:`c_m`, 0 or more, by the same widths; one number for all, 1 by default.
        **kwargs: ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``; each loss reduces by its own
            reducer.
    Shape:
        - embeddings ``(N, D)``, carries the gradient, D at least the largest width
        - labels ``(N,)``, ``indices_tuple``: for every loss
        - ref_emb: for the losses that ask for it, whole
        - output: scalar, float32 or better; ``terms["first_128"]`` and so on after the call, multiplied by its weight
    Raises:
        ValueError: no losses, a width below 1, what is no loss, class weights of another width, a weight < 0 or weights
            of other widths; in a call: embeddings narrower than a prefix; what a loss refuses.
    Example:
        >>> from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
        >>> loss_func = MatryoshkaLoss({w: NormalizedSoftmaxLoss(num_classes=10, embedding_size=w) for w in (4, 16)})
        >>> loss = loss_func(torch.randn(4, 16), torch.tensor([0, 3, 3, 9]))
        >>> sorted(loss_func.terms)
        ['first_16', 'first_4']

    Reference:
        Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022, eq. 1. Differs from the paper in: any loss
        for each prefix, and no classifier that the prefixes share; class weights start short, see
        :func:`shorten_class_weights`.
    """

    def __init__(
        self,
        losses: Mapping[int, torch.nn.Module],
        weights: float | Mapping[int, float] = 1.0,
        **kwargs: Any,
    ) -> None:
        if not isinstance(losses, Mapping) or not losses:
            raise ValueError(f"losses must map the width of a prefix to its loss, got {losses!r}")
        self.widths = sorted(check_integer(width, "losses' widths", minimum=1) for width in losses)
        super().__init__(**kwargs)
        for width in self.widths:
            _check_loss(losses[width], width)
        given = weights if isinstance(weights, Mapping) else dict.fromkeys(self.widths, weights)
        if set(given) != set(self.widths):
            raise ValueError(f"weights must have the widths of losses, {self.widths}, got {sorted(given)}")
        self.weights = {width: check_number(given[width], f"weights[{width}]", minimum=0) for width in self.widths}
        ours = {str(w): one if isinstance(one := losses[w], NamedTermsLoss) else _Alone(one) for w in self.widths}
        self.losses = torch.nn.ModuleDict(ours)

    def _sub_loss_names(self) -> list[str]:
        return [f"first_{width}" for width in self.widths]

    @property
    def needs_ref_emb(self) -> bool:
        """Whether a prefix's loss does."""
        return any(loss.needs_ref_emb for _, loss in self._active())

    @property
    def needs_labels(self) -> bool:
        """Whether a prefix's loss does."""
        return any(loss.needs_labels for _, loss in self._active())

    def _active(self) -> Iterator[tuple[int, Any]]:
        return ((width, self.losses[str(width)]) for width in self.widths if self.weights[width] != 0)

    def check_given(
        self, embeddings: torch.Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any, **others: Any
    ) -> None:
        """Check for every loss."""
        _check_width(embeddings, self.widths[-1])
        check_row_values(embeddings, ref_emb)
        for width, loss in self._active():
            rest = (ref_emb, ref_labels) if loss.needs_ref_emb else (None, None)
            loss.check_given(embeddings[:, :width], labels, indices_tuple, *rest, **others)

    def compute_loss(
        self, embeddings: torch.Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any, **others: Any
    ) -> dict[str, Any]:
        """Return a term for each prefix; its loss has reduced itself."""
        _check_width(embeddings, self.widths[-1])
        found: dict[str, Any] = {name: self.zero_loss() for name in self._sub_loss_names()}
        for width, loss in self._active():
            rest = (ref_emb, ref_labels) if loss.needs_ref_emb else (None, None)
            value = loss(embeddings[:, :width], labels, indices_tuple, *rest, **others)
            weight = self.weights[width]
            found[f"first_{width}"] = reduced(value if weight == 1 else value * weight)
        return found


class _Alone(TaskAndTermsLoss):
    """A PML loss, called as ours are: float32, checked, its class weights short."""

    def _sub_loss_names(self) -> list[str]:
        return ["task_loss"]

    @property
    def needs_labels(self) -> bool:
        """Whether it has classes."""
        return self.num_classes is not None

    def compute_terms(self, given: Given, rest: Any) -> dict[str, Any]:
        """Return none."""
        return {}


def _check_width(embeddings: torch.Tensor, width: int) -> None:
    if embeddings.shape[1] < width:
        raise ValueError(
            f"embeddings must be as wide as the longest prefix: expected {width} or more, got {embeddings.shape[1]}"
        )


def _check_loss(loss: Any, width: int) -> None:
    if not isinstance(loss, torch.nn.Module):
        raise ValueError(f"losses must be PML loss objects, got {loss!r} for width {width}")
    try:
        found = class_weights(getattr(loss, "loss", loss)).shape[1]
    except ValueError:
        return  # pair and triplet losses take any width
    if found != width:
        raise ValueError(
            f"losses[{width}] must have class weights {width} wide, got {found}; make it with embedding_size={width}"
        )
