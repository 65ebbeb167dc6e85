"""Backward-compatible training: the old classifier's influence on a new model."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.utils import common_functions as c_f

from ..checks import check_number, check_same_device
from ..frozen import FrozenClassifier
from ..width import fit_width
from .task_and_terms import TaskAndTermsLoss, per_sample


class BCTLoss(TaskAndTermsLoss):
    r"""Train a new model so that its queries find the vectors that an old model stored.

    .. math:: L = L_{task}(f_n, y) + \lambda \operatorname{mean}_{i: y_i \text{ known}}
        \ell_{old}(\tau(f_{n,i}), y_i)

    :math:`\ell_{old}` is the old classifier's own loss with its weights frozen, and :math:`\tau` fits the new
    embedding to the old width: its first coordinates, or zeros appended (:func:`pml_compat.width.fit_width`).
    Samples whose label the old classifier does not know take no part in the second term; give it pseudo rows for
    them with ``FrozenClassifier.extend``.

    Args:
        loss: the task loss, any PML loss; it keeps its own reducer and may have parameters, which are in
            ``parameters()`` of this loss.
        old_classifier: the frozen classifier; its tensors are buffers.
        influence_weight: the multiplier ``lambda``; 0 or more, no unit. 1 is what public code has. What is best depends
            on the scales of both losses: beside a softmax over cosines on CIFAR-100 it was 10 (``docs/cifar100.md``).
        **kwargs: ``reducer`` (for the influence term, one loss a known sample; default ``MeanReducer``),
            ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``. With ``collect_stats`` both terms
            are recorded under their names, and the share of the batch that the old classifier knows as
            ``known_fraction``.
    Shape:
        - embeddings ``(N, D_new)``, carries the gradient; labels ``(N,)`` of the new training set
        - output: scalar of ``embeddings.dtype``; ``terms["task_loss"]`` and ``terms["influence_loss"]`` after the call
    Raises:
        ValueError: ``influence_weight`` < 0; ``old_classifier`` no FrozenClassifier; embeddings empty, NaN, infinite
            or on another device; labels missing, negative or past the task loss's classes.
    Example:
        >>> from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
        >>> old_classifier = FrozenClassifier(torch.randn(5, 8), kind="cosine")  # old classes: labels 0 to 4
        >>> loss_func = BCTLoss(NormalizedSoftmaxLoss(num_classes=10, embedding_size=16), old_classifier)
        >>> loss = loss_func(torch.randn(4, 16), torch.tensor([0, 3, 7, 9]))
        >>> sorted(loss_func.terms)
        ['influence_loss', 'task_loss']

    Reference:
        Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020. Differs from the
        paper in: the label map is explicit and unknown labels are left out; the old loss's family, margin and scale
        are kept, where the public implementations use a softmax over plain logits.
    """

    def __init__(
        self,
        loss: torch.nn.Module,
        old_classifier: FrozenClassifier,
        influence_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, **kwargs)
        if not isinstance(old_classifier, FrozenClassifier):
            raise ValueError(
                f"old_classifier must be a FrozenClassifier, got {type(old_classifier).__name__}; make one with "
                "FrozenClassifier.from_loss(old_loss), .from_layer(old_linear) or .from_centers(class_centers)"
            )
        self.old_classifier = old_classifier
        self.influence_weight = check_number(influence_weight, "influence_weight", minimum=0)
        self.add_to_recordable_attributes(list_of_names=["influence_weight"], is_stat=False)
        self.add_to_recordable_attributes(name="known_fraction", is_stat=True)

    def _sub_loss_names(self) -> list[str]:
        return ["task_loss", "influence_loss"]

    def compute_terms(self, embeddings: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """Return the influence, one loss a known sample."""
        if self.influence_weight == 0:
            return {"influence_loss": self.zero_loss()}
        check_same_device(embeddings, "embeddings", self.old_classifier.rows, "the loss")
        old_space = fit_width(embeddings, self.old_classifier.in_features)
        losses, known = self.old_classifier.losses(old_space, labels)
        if self.collect_stats:
            self.known_fraction = known.float().mean().item()
        index = known.nonzero()[:, 0]
        if len(index) == 0:
            return {"influence_loss": self.zero_loss()}
        losses = losses[index] * self.influence_weight
        return {"influence_loss": per_sample(losses, c_f.to_device(index, embeddings))}
