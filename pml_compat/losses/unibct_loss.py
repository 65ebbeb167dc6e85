"""Universal backward-compatible training: refined prototypes of every class judge the new model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .._checks import check_number
from .._moved import renamed
from ..frozen import ClassCenters, FrozenClassifier
from ..frozen.check_centers import check_centers
from ..frozen.classifier import DEFAULT_SCALE
from ..frozen.heads import SoftmaxHead
from ..frozen.old_system import OldSystem, as_centers
from ..frozen.prototypes import refine_prototypes
from .bct_loss import BCTLoss


class UniBCTLoss(BCTLoss):
    r"""BCT's influence by one prototype a class, refined as the new model comes to know the classes better.

    .. math:: L = L_{task}(f_n, y) + \lambda \operatorname{mean}_{i: y_i \text{ known}}
        -\log \frac{e^{s \cos(\theta_{i y_i} + m)}}{e^{s \cos(\theta_{i y_i} + m)} + \sum_{j \ne y_i} e^{s \cos
        \theta_{ij}}}, \quad \theta_{ij} = \angle(\tau(f_{n,i}), p_j)

    The prototypes :math:`p_j` lie in the old space and are frozen; :math:`\tau` fits the new embedding to their width
    as in :class:`BCTLoss`, whose default holds here too. :meth:`update_prototypes` estimates them anew, from the stored
    old embeddings and the new model's of the same items (:func:`pml_compat.frozen.refine_prototypes`).

    The paper refines the prototypes after epochs 10 and 20, and has no influence before (``influence_weight=0``, an
    attribute that is set then)::

        if epoch in (10, 20):
            loss_func.update_prototypes(old_embeddings, embed(model, train_set), labels)

    Args:
        loss: the task loss, any PML loss; it keeps its own reducer, and its parameters are in ``parameters()``.
        centers: the prototypes, of the old embeddings of the new training set: ``ClassCenters.from_embeddings`` or
            ``refine_prototypes``, or the pair ``(embeddings, labels)``, or a FrozenClassifier, for its directions.
            Copied, as buffers; samples of other labels take no part in the influence.
        influence_weight: None, or the multiplier ``lambda`` of the paper's form, 0 or more. An attribute that may be
            set at any time, and is in ``state_dict()``.
        scale: ``s`` of the cosines in the paper's form, above 0; None: the one that fits the old embeddings best.
        margin: ``m`` on the angle with the own prototype in the paper's form, in radians, in [0, pi]; 0 is a softmax.
            A scale or a margin makes it the paper's form without an ``influence_weight``, too.
        prototypes: the old name of ``centers``, for a release.
        **kwargs: as for :class:`BCTLoss`.
    Shape:
        - embeddings ``(N, D_new)``, carries the gradient; labels ``(N,)`` of the new training set
        - output: scalar, float32 or better; ``terms``: ``task_loss``, ``influence_loss``
    Raises:
        ValueError: as :class:`BCTLoss`; ``centers`` something else; ``scale`` or ``margin`` out of its range.
    Example:
        >>> from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
        >>> old, labels = torch.randn(40, 8), torch.arange(40) % 10
        >>> prototypes = ClassCenters.from_embeddings(old, labels)
        >>> loss_func = UniBCTLoss(NormalizedSoftmaxLoss(num_classes=10, embedding_size=16), prototypes)
        >>> loss = loss_func(torch.randn(4, 16), torch.tensor([0, 3, 7, 9]))
        >>> loss_func.update_prototypes(old, torch.randn(40, 16), labels)

    Reference:
        Zhang et al., "Towards Universal Backward-Compatible Representation Learning", IJCAI 2022. Differs from
        the public implementations in: cosines are scaled (unscaled they give a nearly flat softmax); the refinement
        uses a softmax over rows, without which it changes nothing.
    """

    def __init__(
        self,
        loss: torch.nn.Module,
        centers: OldSystem | None = None,
        influence_weight: float | None = None,
        *,
        scale: float | None = None,
        margin: float = 0.0,
        prototypes: ClassCenters | None = None,
        **kwargs: Any,
    ) -> None:
        prototypes = as_centers(renamed(centers, "centers", prototypes, "prototypes", stacklevel=4))
        margin = check_number(margin, "margin", minimum=0)
        if margin > torch.pi:
            raise ValueError(f"margin must be in radians, in [0, pi], got {margin!r}; PML's ArcFaceLoss takes degrees")
        classifier = FrozenClassifier.from_centers(prototypes, scale)
        if margin > 0:
            head = SoftmaxHead(prototypes.scale or DEFAULT_SCALE if scale is None else float(scale))
            classifier.head = replace(head, margin_type="angle", margin=margin)
        super().__init__(loss, classifier, influence_weight, **kwargs)
        self._by_old_loss = scale is not None or margin > 0

    def update_prototypes(self, old_embeddings: Any, new_embeddings: Any, labels: Any, **refinement: Any) -> None:
        """Put refined prototypes in the place of those of the classes in ``labels``; the others stay.

        Args:
            old_embeddings: ``(N, D_old)``, see :func:`pml_compat.frozen.refine_prototypes`.
            new_embeddings: ``(N, D_new)``, of the model in training, now, in eval mode; row i of the same item.
            labels: ``(N,)``, each one with a prototype in this loss.
            **refinement: ``smoothing``, ``temperature``, ``max_class_size``.
        Raises:
            ValueError: as ``refine_prototypes``; another width than the prototypes'; a label without a prototype.
        """
        prototypes = refine_prototypes(old_embeddings, new_embeddings, labels, **refinement)
        check_centers(prototypes, "old_embeddings", width=self.old_classifier.in_features)
        rows = self.old_classifier.rows
        index = self.old_classifier.index_of(prototypes.labels)
        if bool((index < 0).any()):
            label = int(prototypes.labels.to(index.device)[index < 0][0])
            raise ValueError(
                f"labels must be among those of the prototypes that the loss was made with, got {label}; "
                "make it with prototypes of every class of the new training set"
            )
        # New tensors: a graph that holds the ones before can still be gone back through.
        self.old_classifier.rows = rows.index_copy(0, index, prototypes.centers.to(rows))
        if not self.influence_weight and not self._by_old_loss:  # 0 may be followed by None
            directions = prototypes.directions.to(rows)
            self.old_classifier.directions = self.old_classifier.directions.index_copy(0, index, directions)
