"""A task loss and losses that read old embeddings, added up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .task_and_terms import TaskAndTermsLoss, check_weight, reduced

_NAME = "old_loss"


class CompatibleLoss(TaskAndTermsLoss):
    r"""Train by a task loss, and by one or more losses against embeddings of old models.

    .. math:: L = L_{task}(f_n, y) + \sum_m w_m \, L_m(f_n, y, f_{o,m})

    PML's ``MultipleLosses`` cannot do this: it passes no ``ref_emb`` on. The task loss sees the new embeddings alone.

    Args:
        loss: the task loss, any PML loss; it keeps its own reducer, and its parameters are in ``parameters()``.
        old_losses: a loss called as ``old_loss(embeddings, labels, ref_emb=old_embeddings)``; or, for several old
            models, a mapping of names to losses.
        weights: None, the default, for multipliers :math:`w_m` that keep the gradient of each old loss as strong as the
            task loss's (:class:`GradientBalance`); or one number for all, 0 or more; or a mapping with the same names.
        class_weight_length: of the task loss's class weights at construction, above 0; see
            :func:`shorten_class_weights`. None leaves them as they are.
        **kwargs: ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``; each loss reduces by its own
            reducer.
    Shape:
        - embeddings ``(N, D_new)``, carries the gradient; labels ``(N,)``; indices_tuple: for the task loss
        - ref_emb: old embeddings of the same rows, which receive no gradient; one tensor for every loss, or a mapping
          with the names of ``old_losses``, one tensor each, whose widths may differ as far as its loss allows
        - output: scalar of ``embeddings.dtype``; ``terms["task_loss"]`` and a term for each old loss, by its name or
          ``"old_loss"``, after the call, multiplied by its weight
    Raises:
        ValueError: no old losses, or one named ``task_loss``; names of ``weights`` or ``ref_emb`` that differ from
            those of ``old_losses``; a weight < 0; ``ref_emb`` missing.
    Example:
        >>> from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
        >>> from pml_compat.losses import FCTLoss
        >>> task_loss = NormalizedSoftmaxLoss(num_classes=10, embedding_size=16)
        >>> loss_func = CompatibleLoss(task_loss, FCTLoss(), weights=0.5)
        >>> loss = loss_func(torch.randn(4, 16), torch.tensor([0, 3, 3, 9]), ref_emb=torch.randn(4, 16))
        >>> sorted(loss_func.terms)
        ['old_loss', 'task_loss']
    """

    def __init__(
        self,
        loss: torch.nn.Module,
        old_losses: torch.nn.Module | Mapping[str, torch.nn.Module],
        weights: float | Mapping[str, float | None] | None = None,
        **kwargs: Any,
    ) -> None:
        named = check_old_losses(old_losses)
        self._names = list(named)  # before PML's __init__, which asks for the names of the terms
        given = _by_name(weights, self._names, "weights")
        balanced = tuple(name for name in self._names if given[name] is None)
        super().__init__(loss, balanced=balanced, **kwargs)
        self.old_losses = torch.nn.ModuleDict(named)
        self.weights = {name: check_weight(given[name], f"weights[{name!r}]") for name in self._names}
        self.shorten()

    def _sub_loss_names(self) -> list[str]:
        return ["task_loss", *self._names]

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        indices_tuple: Any = None,
        ref_emb: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        ref_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss; ``indices_tuple`` goes to the task loss, ``ref_emb`` and ``ref_labels`` to the others."""
        if ref_emb is None:
            raise ValueError("ref_emb must be given: the old model's embeddings of the same items, row by row")
        references = _by_name(ref_emb, self._names, "ref_emb")
        # PML's forward knows one ref_emb: all of them travel past it in the place of the tuple.
        return super().forward(embeddings, labels, (indices_tuple, references, ref_labels))

    def compute_loss(
        self, embeddings: torch.Tensor, labels: torch.Tensor, indices_tuple: Any, ref_emb: Any, ref_labels: Any
    ) -> dict[str, Any]:
        """Return the task loss and every old loss; each has reduced itself."""
        indices_tuple, references, ref_labels = indices_tuple
        precise = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        own, compared = self.parts(precise)
        task_loss = self.loss(own, labels, indices_tuple)
        found: dict[str, Any] = {}
        for name, old_loss in self.old_losses.items():
            if self.weights[name] == 0:
                found[name] = self.zero_loss()
                continue
            value = old_loss(compared[name], labels, ref_emb=self.target(references[name]), ref_labels=ref_labels)
            weight = self.weights[name]
            found[name] = reduced(value if weight is None else value * weight)
        return {"task_loss": reduced(task_loss), **self.balanced_terms(task_loss, found, precise)}

    def parts(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return what the task loss sees, and by name what each old loss sees: all of it."""
        return embeddings, dict.fromkeys(self._names, embeddings)

    def target(self, old_embeddings: torch.Tensor) -> torch.Tensor:
        """Return what an old loss compares with: the old embeddings."""
        return old_embeddings

    def compute_terms(self, embeddings: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """Return nothing more: the old losses are no terms of the embeddings and labels alone."""
        return {}


def check_old_losses(old_losses: Any) -> Mapping[str, torch.nn.Module]:
    """Return the losses by name; raise a ValueError where there are none, or other things than losses."""
    named = old_losses if isinstance(old_losses, Mapping) else {_NAME: old_losses}
    if not named or "task_loss" in named:
        raise ValueError(f"old_losses must have one loss or more, none of them named task_loss, got {list(named)}")
    for name, old_loss in named.items():
        if not isinstance(old_loss, torch.nn.Module):
            raise ValueError(f"old_losses must be PML loss objects, got {old_loss!r} for {name!r}")
    return named


def _by_name(value: Any, names: list[str], argument: str) -> dict[str, Any]:
    """Return one entry a name: of a mapping with these names, or the same for all."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    if set(value) != set(names):
        raise ValueError(f"{argument} must have the names of old_losses, {sorted(names)}, got {sorted(value)}")
    return dict(value)
