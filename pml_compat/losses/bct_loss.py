"""Backward-compatible training: the old classifier's influence on a new model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .._checks import check_same_device, count_rows, rows_where
from .._rows import fit_width
from ..frozen.old_system import OldSystem, as_classifier
from ._base import check_weight
from ._reduction import per_sample
from ._task import Given, TaskAndTermsLoss
from .class_weight_length import CLASS_WEIGHT_LENGTH


class BCTLoss(TaskAndTermsLoss):
    r"""Train a new model so that its queries find the vectors that an old model stored.

    .. math:: L = L_{task}(f_n, y) + \lambda \operatorname{mean}_{i: y_i \text{ known}}
        \ell_{old}(\tau(f_{n,i}), y_i)

    :math:`\tau` fits the new embedding to the old width: its first coordinates, or zeros appended
    (:func:`pml_compat.fit_width`). By default :math:`\ell_{old}(f, y) = 1 - \cos(f, t_y)` draws an embedding
    onto the direction of its class in the old classifier (``FrozenClassifier.directions``), as strongly as the task
    loss draws (:class:`GradientBalance`). With an ``influence_weight`` :math:`\ell_{old}` is the old classifier's own
    loss, frozen, with its margin and its scale. Samples of labels that it does not know take no part;
    ``FrozenClassifier.extend`` gives it rows for them.

    Args:
        loss: the task loss, any PML loss; it keeps its own reducer, and its parameters are in ``parameters()``.
        old_classifier: a FrozenClassifier, whose tensors are buffers, ClassCenters, or the pair
            ``(embeddings, labels)`` of stored old embeddings of the new training set.
        influence_weight: ``lambda`` of the paper's form, 0 or more (public code: 1); None: the default's form. An
            attribute that may be set at any time, and is in ``state_dict()``.
        class_weight_length: above 0, see :func:`shorten_class_weights`; None leaves class weights as they are.
        **kwargs: ``reducer`` (of the influence, one loss a known sample; default ``MeanReducer``),
            ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``, which also records
            ``known_fraction``, the share of the batch that the old classifier knows.
    Shape:
        - embeddings ``(N, D_new)``, carries the gradient; labels ``(N,)``, needed unless ``influence_weight=0``
        - what else the call is given goes to the task loss
        - output: scalar, float32 or better; ``terms``: ``task_loss``, ``influence_loss``
    Raises:
        ValueError: ``influence_weight`` < 0; ``class_weight_length`` not above 0; ``old_classifier`` something else;
            embeddings empty, NaN, infinite or on another device; labels missing, negative or past the task loss's
            classes.
    Example:
        >>> from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
        >>> from pml_compat.frozen import FrozenClassifier
        >>> old_classifier = FrozenClassifier(torch.randn(5, 8), kind="cosine")  # old classes: labels 0 to 4
        >>> loss_func = BCTLoss(NormalizedSoftmaxLoss(num_classes=10, embedding_size=16), old_classifier)
        >>> loss = loss_func(torch.randn(4, 16), torch.tensor([0, 3, 7, 9]))
        >>> sorted(loss_func.terms)
        ['influence_loss', 'task_loss']

    Reference:
        Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020. Differs from the paper in: the
        default; the label map is explicit and unknown labels are left out; the old loss keeps its family, margin and
        scale, where public code has a softmax over plain logits.
    """

    def __init__(
        self,
        loss: torch.nn.Module,
        old_classifier: OldSystem,
        influence_weight: float | None = None,
        *,
        class_weight_length: float | None = CLASS_WEIGHT_LENGTH,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, balanced=("influence_loss",), class_weight_length=class_weight_length, **kwargs)
        self.old_classifier = as_classifier(old_classifier)
        self.influence_weight = influence_weight
        self._by_old_loss = False  # whether the paper's form is taken without a weight, too
        if self.influence_weight is not None:
            self.add_to_recordable_attributes(list_of_names=["influence_weight"], is_stat=False)
        self.add_to_recordable_attributes(name="known_fraction", is_stat=True)

    def _sub_loss_names(self) -> list[str]:
        return ["task_loss", "influence_loss"]

    @property
    def influence_weight(self) -> float | None:
        """The multiplier of the paper's form, or None for one that is measured."""
        return self._influence_weight

    @influence_weight.setter
    def influence_weight(self, weight: float | None) -> None:
        self._influence_weight = check_weight(weight, "influence_weight")

    def get_extra_state(self) -> torch.Tensor:
        """Return the influence's weight, NaN for None, for ``state_dict()``: as bytes, which no device rounds."""
        weight = math.nan if self.influence_weight is None else self.influence_weight
        return torch.tensor([weight], dtype=torch.float64).view(torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Go on with the influence's weight of a state."""
        weight = float(state.cpu().view(torch.float64))
        self.influence_weight = None if math.isnan(weight) else weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Keep the weight where a state has none, as those of earlier versions."""
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @property
    def needs_labels(self) -> bool:
        """Whether there is an influence, which is that of the label's class."""
        return self.influence_weight != 0

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Count the samples that the old classifier knows, where it does not know all classes."""
        super().look_at_labels(labels, ref_labels)
        if self.influence_weight != 0 and not self._knows_all:
            count_rows(self, self.old_classifier.index_of(labels) >= 0)

    @property
    def _knows_all(self) -> bool:
        return self.num_classes is not None and self.old_classifier.label_map.gapless >= self.num_classes

    def balanced_terms(
        self, task_loss: torch.Tensor, terms: Mapping[str, dict[str, Any]], embeddings: torch.Tensor
    ) -> dict[str, Any]:
        """Balance the influence where no weight was given."""
        if self.influence_weight is not None:
            return dict(terms)
        return super().balanced_terms(task_loss, terms, embeddings)

    def compute_terms(self, given: Given, rest: torch.Tensor) -> dict[str, Any]:
        """Return the influence, one loss a known sample."""
        weight = self.influence_weight
        if weight == 0:
            return {"influence_loss": self.zero_loss()}
        old = self.old_classifier
        check_same_device(rest, "embeddings", old.rows, "the loss")
        old_space, targets, index = fit_width(rest, old.in_features), old.index_of(given.labels), None
        if not self._knows_all:
            index = rows_where(self, targets >= 0)
            if len(index) < len(targets):
                old_space, targets = old_space[index], targets[index]
        if self.collect_stats:
            self.known_fraction = len(targets) / len(rest)
        if len(targets) == 0:
            return {"influence_loss": self.zero_loss()}
        by_old_loss = self._by_old_loss or weight is not None
        losses = old.losses_at(old_space, targets) if by_old_loss else old.direction_losses_at(old_space, targets)
        return {"influence_loss": per_sample(losses if weight is None else losses * weight, index)}
