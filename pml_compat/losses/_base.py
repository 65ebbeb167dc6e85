"""Losses that add terms to a user's own task loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..checks import check_embeddings, check_labels, check_number
from ..frozen import class_weights
from ..frozen.heads import rescale_class_weights_
from .gradient_balance import GradientBalance
from .named_terms import NamedTermsLoss

CLASS_WEIGHT_LENGTH = 1.0


class TaskAndTermsLoss(NamedTermsLoss):
    """Base of our losses that wrap a task loss: the term ``task_loss``, and those of :meth:`compute_terms`.

    Args:
        loss: the task loss, any PML loss; it keeps its own reducer, and its parameters are in ``parameters()``.
        balanced: the names of the terms that :class:`GradientBalance` gives their multipliers.
        class_weight_length: see :func:`shorten_class_weights`; None leaves the class weights as they are.
        **kwargs: see PML's ``BaseMetricLossFunction``; ``reducer`` is that of the added terms.
    Raises:
        ValueError: ``loss`` is no module, ``class_weight_length`` not above 0; in a call: embeddings empty, NaN or
            infinite, labels missing, negative or past the task loss's classes.
    """

    def __init__(
        self,
        loss: torch.nn.Module,
        *,
        balanced: tuple[str, ...] = (),
        class_weight_length: float | None = CLASS_WEIGHT_LENGTH,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(loss, torch.nn.Module):
            raise ValueError(f"loss must be a PML loss object, got {loss!r}")
        self.loss = loss
        self.num_classes = _count_classes(loss)
        if class_weight_length is not None:
            check_number(class_weight_length, "class_weight_length", minimum=0, exclusive=True)
        self._class_weight_length = class_weight_length
        self.balance = GradientBalance(balanced) if balanced else None

    def shorten(self) -> None:
        """Shorten the class weights: last in every ``__init__``, as what is refused leaves a user's loss as it was."""
        if self._class_weight_length is not None:
            shorten_class_weights(self.loss, self._class_weight_length)

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        indices_tuple: Any = None,
        ref_emb: torch.Tensor | None = None,
        ref_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss; ``indices_tuple``, ``ref_emb`` and ``ref_labels`` go to the task loss alone."""
        check_embeddings(embeddings)
        labels = check_labels(labels, length=len(embeddings))
        _check_range(labels, self.num_classes)
        return super().forward(embeddings, labels, indices_tuple, ref_emb, ref_labels)

    def compute_loss(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        indices_tuple: Any,
        ref_emb: torch.Tensor,
        ref_labels: torch.Tensor,
    ) -> dict[str, Any]:
        """Return every term; the task loss has reduced itself."""
        # float32 for all terms: PML's classification losses turn their weights, for good, to the dtype of what they
        # are given, and a weighted sum of float16 losses can overflow.
        precise = _at_least_float32(embeddings)
        reference = () if ref_emb is embeddings else (_at_least_float32(ref_emb), ref_labels)
        task_loss = self.loss(precise, labels, indices_tuple, *reference)
        terms = self.compute_terms(precise, labels)
        return {"task_loss": reduced(task_loss), **self.balanced_terms(task_loss, terms, precise)}

    def balanced_terms(
        self, task_loss: torch.Tensor, terms: Mapping[str, dict[str, Any]], embeddings: torch.Tensor
    ) -> dict[str, Any]:
        """Return terms, those that are balanced multiplied so that they draw as strongly as the task loss does."""
        balance = self.balance
        names = [name for name in terms if balance is not None and name in balance.names and _acts(terms[name])]
        if balance is None or not names:
            return dict(terms)
        if (self.training or balance.is_new) and torch.is_grad_enabled():
            compared = {name: (terms[name]["losses"].mean(), *self.drawn_by(name, embeddings)) for name in names}
            balance.measure(task_loss, compared)
        found = dict(terms)
        for name in names:
            losses = terms[name]["losses"]
            found[name] = {**terms[name], "losses": losses * balance.weight(name).to(losses)}
        return found

    def drawn_by(self, name: str, embeddings: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return the tensor on which a term's gradient is compared with the task loss's, and its dimension of rows."""
        return embeddings, 0

    def compute_terms(self, embeddings: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """Return the added terms, as PML's ``compute_loss`` does; embeddings are float32 or float64."""
        raise NotImplementedError


def shorten_class_weights(loss: torch.nn.Module, length: float = CLASS_WEIGHT_LENGTH) -> torch.nn.Module:
    """Give the class weights of a PML loss one length, in place, where it reads their directions alone; return it.

    PML draws their entries from N(0, 1), so they are sqrt(d) long, and the longer a class weight is, the slower it
    turns. Much shorter ones overshoot under SGD at the large scale of PML's margin losses. Every loss of this package
    that wraps a task loss shortens its class weights. Train the model that they are compared with, the independent one,
    from short class weights too.

    Args:
        loss: any PML loss, or a loss that wraps one; those without class weights, whose class weights' lengths count
            (``LargeMarginSoftmaxLoss``) or that regularise them are left as they are.
        length: above 0.
    Raises:
        ValueError: ``length`` is not above 0.
    Example:
        >>> from pytorch_metric_learning.losses import ArcFaceLoss
        >>> loss_func = shorten_class_weights(ArcFaceLoss(num_classes=10, embedding_size=16))
        >>> loss_func.W.norm(dim=0).max().round(decimals=4).item()
        1.0
    """
    rescale_class_weights_(loss, check_number(length, "class_weight_length", minimum=0, exclusive=True))
    return loss


def _acts(term: dict[str, Any]) -> bool:
    """A term that has nothing to learn from is a plain 0."""
    return isinstance(term["losses"], torch.Tensor)


def reduced(loss: torch.Tensor) -> dict[str, Any]:
    """Return the entry of a term that is one number already."""
    return {"losses": loss, "indices": None, "reduction_type": "already_reduced"}


def per_sample(losses: torch.Tensor, index: torch.Tensor) -> dict[str, Any]:
    """Return the entry of a term with one loss for each of the samples ``index``."""
    return {"losses": losses, "indices": index, "reduction_type": "element", "divisor": len(index)}


def check_weight(value: Any, name: str) -> float | None:
    """Return a term's multiplier, 0 or more, or None, which stands for one that is measured."""
    return None if value is None else check_number(value, name, minimum=0)


def check_task_width(loss: torch.nn.Module, width: int, name: str) -> None:
    """Raise a ValueError where a classification loss is made for another width than that of a part of the embedding.

    Args:
        loss: the task loss; pair and triplet losses take any width.
        width: of the part that it sees.
        name: what that width is called, for the error.
    """
    try:
        found = class_weights(loss).shape[1]
    except ValueError:
        return
    if found != width:
        raise ValueError(
            f"loss must be made for the free part of the embedding, {width} wide, got one for width {found}; "
            f"make it with embedding_size={name}"
        )


def _at_least_float32(embeddings: torch.Tensor) -> torch.Tensor:
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def _count_classes(loss: torch.nn.Module) -> int | None:
    """The number of classes of a classification loss; None for pair and triplet losses, whose labels are free."""
    try:
        return len(class_weights(loss))
    except ValueError:
        return None


def _check_range(labels: torch.Tensor, num_classes: int | None) -> None:
    """On a GPU a label past the classes would end the process in a device-side assertion."""
    if torch.compiler.is_compiling():  # reading the labels would cut the graph
        return
    low, high = torch.stack(torch.aminmax(labels)).tolist()
    if low < 0 or (num_classes is not None and high >= num_classes):
        rule = "0 or more" if num_classes is None else f"in [0, {num_classes - 1}], the task loss's classes"
        raise ValueError(f"labels must be {rule}, got {low if low < 0 else high}")
