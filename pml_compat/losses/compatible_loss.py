"""A task loss and losses that read old embeddings, added up."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from ..frozen.class_weights import unwrap_loss
from ..frozen.old_references import check_references
from ._base import NamedTermsLoss, check_weight
from ._reduction import escaped, reduced
from ._task import Given, TaskAndTermsLoss, steady_for, unwrapped
from .gathered_loss import GatheredLoss
from .softness import softness_by_spread

_NAME = "old_loss"
_ATTRIBUTES = {"loss", "reducer", "distance", "balance", "head", "weights", "old_losses", "training", "collect_stats"}


class CompatibleLoss(TaskAndTermsLoss):
    r"""Train by a task loss, and by one or more losses against embeddings of old models.

    .. math:: L = L_{task}(f_n, y) + \sum_m w_m \, L_m(f_n, y, f_{o,m})

    PML's ``MultipleLosses`` cannot do this: it passes no ``ref_emb`` on. The task loss sees the new embeddings alone,
    unless it is a loss of ours that needs old ones too, such as :class:`NCCLLoss`.

    Args:
        loss: the task loss, any PML loss; it keeps its own reducer, and its parameters are in ``parameters()``.
        old_losses: a loss without a task loss of its own, called as ``old_loss(embeddings, labels,
            ref_emb=old_embeddings)``; PML's pair losses as by :class:`CrossModelLoss`. Or, for several old models, a
            mapping of names to losses.
        weights: None, the default, for multipliers :math:`w_m` that keep the gradient of each old loss as strong as the
            task loss's (:class:`GradientBalance`), and for temperatures of PML's losses, in a call, times the old
            embeddings' spread / 0.6; or one number for all, 0 or more; or a mapping with the same names.
        class_weight_length: of the task loss's class weights at construction, above 0; see
            :func:`shorten_class_weights`. None leaves them as they are.
        **kwargs: ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``; each loss reduces by its own
            reducer.
    Shape:
        - embeddings ``(N, D_new)``, carries the gradient; labels ``(N,)``, where a loss needs
          them; indices_tuple and what else the call is given: for the task loss
        - ref_emb: old embeddings of the same rows, which receive no gradient; one tensor for every loss, or a mapping
          with the names of ``old_losses``, one tensor each, whose widths may differ as far as its loss allows
        - output: scalar, float32 or better; ``terms["task_loss"]`` and a term for each old loss, by its name or
          ``"old_loss"``, after the call, multiplied by its weight
    Raises:
        ValueError: no old losses, one named ``task_loss`` or like an attribute of the loss, or one with a task
            loss of its own; names of ``weights`` or ``ref_emb`` that differ from
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
        self.old_losses = torch.nn.ModuleDict({escaped(name): old_loss for name, old_loss in named.items()})
        self.weights = {name: check_weight(given[name], f"weights[{name!r}]") for name in self._names}

    def _sub_loss_names(self) -> list[str]:
        return ["task_loss", *self._names]

    @property
    def needs_ref_emb(self) -> bool:
        """Always."""
        return True

    @property
    def needs_labels(self) -> bool:
        """Whether an old loss that has a weight needs them."""
        return any(getattr(inner_loss(old_loss), "needs_labels", True) for _, old_loss in self._active())

    def references(self, ref_emb: Any, embeddings: torch.Tensor) -> dict[str, Any]:
        """Return the old embeddings for each old loss."""
        if ref_emb is None:
            raise ValueError("ref_emb must be given: the old model's embeddings of the same items, row by row")
        return super().references(_by_name(ref_emb, self._names, "ref_emb"), embeddings)

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Look for every old loss of ours."""
        super().look_at_labels(labels, ref_labels)
        for _, old_loss in self._active():
            inner = inner_loss(old_loss)
            if isinstance(inner, NamedTermsLoss):
                inner.look_at_labels(labels, ref_labels)

    def _active(self) -> list[tuple[str, torch.nn.Module]]:
        return [(name, self.old_losses[escaped(name)]) for name in self._names if self.weights[name] != 0]

    def parts(self, given: Given) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return what the task loss sees, and by name what each old loss sees: all of it."""
        return given.embeddings, dict.fromkeys(self._names, given.embeddings)

    def target(self, old_embeddings: torch.Tensor) -> torch.Tensor:
        """Return what an old loss compares with: the old embeddings."""
        return old_embeddings

    def task_references(self, given: Given) -> tuple[Any, Any]:
        """Return the old embeddings where the task loss asks for them; one tensor for all as that tensor."""
        if not getattr(self.loss, "needs_ref_emb", False):
            return None, None
        ref_emb = given.ref_emb
        several = len({id(rows) for rows in ref_emb.values()}) > 1
        return ref_emb if several else ref_emb[self._names[0]], given.ref_labels

    def compute_terms(self, given: Given, rest: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return every old loss, which has reduced itself."""
        found: dict[str, Any] = {name: self.zero_loss() for name in self._names}
        for name, old_loss in self._active():
            new, labels, ref_labels = rest[name], given.labels, given.ref_labels
            target = self.target(given.ref_emb[name])
            inner = inner_loss(old_loss)
            if not hasattr(inner, "needs_labels"):
                # PML's: no gradient for the old rows, and labels that are not one object
                new, labels, target, ref_labels = check_references(new, labels, target, ref_labels)
                new = steady_for(old_loss, new, given.dtype)
            weight = self.weights[name]
            softness = nullcontext() if weight is not None else softness_by_spread(unwrap_loss(inner), target)
            with softness:
                value = self.at_own_pace(old_loss, name)(new, labels, ref_emb=target, ref_labels=ref_labels)
            found[name] = reduced(value if weight is None else value * weight)
        return found


def check_old_losses(old_losses: Any) -> Mapping[str, torch.nn.Module]:
    """Return the losses by name; raise a ValueError where there are none, or other things than losses."""
    named = old_losses if isinstance(old_losses, Mapping) else {_NAME: old_losses}
    if not named or "task_loss" in named:
        raise ValueError(f"old_losses must have one loss or more, none of them named task_loss, got {list(named)}")
    taken: dict[str, str] = {}
    for name, old_loss in named.items():
        if not isinstance(old_loss, torch.nn.Module):
            raise ValueError(f"old_losses must be PML loss objects, got {old_loss!r} for {name!r}")
        if not isinstance(name, str) or not name or hasattr(CompatibleLoss, name) or hasattr(torch.nn.ModuleDict, name):
            raise ValueError(f"old_losses must have names that no attribute of a loss has, got {name!r}; add a prefix")
        if name in _ATTRIBUTES or escaped(name) in taken:
            raise ValueError(f"old_losses must have names of their own, got {name!r}; add a prefix")
        taken[escaped(name)] = name
        if isinstance(inner_loss(old_loss), TaskAndTermsLoss):
            kind = type(inner_loss(old_loss)).__name__
            raise ValueError(
                f"old_losses must have no task loss of their own, which would count twice, got {kind} for {name!r}; "
                f"train by {kind} alone, or make it the task loss: CompatibleLoss({kind}(task_loss, ...), old_losses)"
            )
    return named


def inner_loss(loss: torch.nn.Module) -> torch.nn.Module:
    """Return the loss inside ``torch.compile`` and GatheredLoss."""
    while True:
        inner = unwrapped(loss)
        if isinstance(inner, GatheredLoss):
            inner = inner.loss
        if inner is loss:
            return loss
        loss = inner


def _by_name(value: Any, names: list[str], argument: str) -> dict[str, Any]:
    """Return one entry a name: of a mapping with these names, or the same for all."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    if set(value) != set(names):
        raise ValueError(f"{argument} must have the names of old_losses, {sorted(names)}, got {sorted(value)}")
    return dict(value)
