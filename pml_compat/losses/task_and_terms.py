"""Losses that add terms to a user's own task loss."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_embeddings, check_labels
from ..frozen import class_weights
from .named_terms import NamedTermsLoss


class TaskAndTermsLoss(NamedTermsLoss):
    """Base of our losses that wrap a task loss: the term ``task_loss``, and those of :meth:`compute_terms`.

    Args:
        loss: the task loss, any PML loss; it keeps its own reducer, and its parameters are in ``parameters()``.
        **kwargs: see PML's ``BaseMetricLossFunction``; ``reducer`` is that of the added terms.
    Raises:
        ValueError: ``loss`` is no module; in a call: embeddings empty, NaN or infinite, labels missing, negative or
            past the task loss's classes.
    """

    def __init__(self, loss: torch.nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(loss, torch.nn.Module):
            raise ValueError(f"loss must be a PML loss object, got {loss!r}")
        self.loss = loss
        self.num_classes = _count_classes(loss)

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
        return {"task_loss": reduced(task_loss), **self.compute_terms(precise, labels)}

    def compute_terms(self, embeddings: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """Return the added terms, as PML's ``compute_loss`` does; embeddings are float32 or float64."""
        raise NotImplementedError


def reduced(loss: torch.Tensor) -> dict[str, Any]:
    """Return the entry of a term that is one number already."""
    return {"losses": loss, "indices": None, "reduction_type": "already_reduced"}


def per_sample(losses: torch.Tensor, index: torch.Tensor) -> dict[str, Any]:
    """Return the entry of a term with one loss for each of the samples ``index``."""
    return {"losses": losses, "indices": index, "reduction_type": "element", "divisor": len(index)}


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
