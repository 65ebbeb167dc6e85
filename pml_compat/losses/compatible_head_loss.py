"""The loss of an embedding with a compatible and a free part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .._checks import check_embeddings, check_labels, check_same_device, one_read, values_known
from .._rows import at_least_float32, no_autocast, unit_rows
from ..frozen import FrozenClassifier
from ..frozen.old_system import OldSystem, as_centers
from ..heads import CompatibleHead
from ._reduction import mean_of_positive
from ._task import Given, check_task_width
from .compatible_loss import CompatibleLoss, check_old_losses, inner_loss
from .old_rows import check_old_rows
from .point_alignment_loss import PointAlignmentLoss
from .supervised_contrast import supervised_contrast

_TEMPERATURE = 0.1
_WEIGHTS = {"point_loss": 10.0, "contrast_loss": 5.0}
_WEIGHTS_WITH_CENTERS = {"point_loss": 10.0, "class_loss": 10.0, "contrast_loss": 3.0}


class CompatibleHeadLoss(CompatibleLoss):
    r"""Train a :class:`~pml_compat.heads.CompatibleHead`: its free part by your own loss, the other part to fit.

    .. math:: L = L_{task}(f, y) + \lambda_p \operatorname{mean}_i \lVert n(p_i) - t_i \rVert^2
        + \lambda_k \operatorname{mean}_i (1 - \cos(p_i, T_{y_i}))
        - \lambda_c \operatorname{mean}_i \operatorname{mean}_{j: y_j = y_i}
        \log \operatorname{softmax}_j \langle n(p_i), t_j \rangle / \tau

    :math:`t = ` ``head.target(old_embeddings)``, and :math:`T` are the classes' directions. With ``centers`` the head
    is given their whitening for its queries when this loss is made (``head.whiten_queries``). The first added term
    (:class:`PointAlignmentLoss`, weight 10) teaches the head the old space itself; the second (weight 10), with
    ``centers``, where queries of each class find the old embeddings; the third (weight 3, without ``centers`` 5,
    :math:`\tau = 0.1`) what tells the classes of the batch apart, 0 for a batch of one class. A head of several parts
    has one for each term.

    The head belongs to the model. The loss refers to it and does not own it: ``loss.head`` is in neither
    ``parameters()`` nor ``state_dict()``. Copy or pickle the two in one go, ``copy.deepcopy((model, loss))``.

    Args:
        loss: the task loss, any PML loss, for embeddings ``head.free_features`` wide; it keeps its own reducer, and its
            parameters are in ``parameters()`` of this loss.
        head: the model's.
        old_losses: as in :class:`CompatibleLoss`: each called with its compatible part, in the order of the mapping, or
            all with the one of a head of one part; and with the targets as ``ref_emb``. None for the terms above,
            ``"point_loss"``, ``"class_loss"`` and ``"contrast_loss"``.
        weights: their multipliers; None for those above, or with ``old_losses`` for 1.
        centers: of the old model's embeddings of the new training set (ClassCenters, the pair ``(embeddings, labels)``
            or a FrozenClassifier), for the second term; None: there is none.
        **kwargs: ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``; each loss reduces by its own
            reducer.
    Shape:
        - embeddings ``(N, head.out_features)``, as the head gives them, carries the gradient; labels ``(N,)`` of the
          new training set; indices_tuple: for the task loss
        - ref_emb ``(N, head.old_features)``: the old model's embeddings of the same rows; receives no gradient
        - output: scalar, float32 or better; ``terms``: ``task_loss`` and one for each old loss
    Raises:
        ValueError: ``head`` no CompatibleHead, or one with several parts and another number of old losses; a task loss
            of another width than its free part; what :class:`CompatibleLoss` refuses; in a call: ``ref_emb`` missing,
            NaN or of another shape or device; embeddings empty, NaN, infinite or of another width; labels missing,
            negative or past the task loss's classes.
    Example:
        >>> from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
        >>> old, labels = torch.randn(40, 8), torch.arange(40) % 10
        >>> head, task_loss = CompatibleHead(12, 8), NormalizedSoftmaxLoss(num_classes=10, embedding_size=12)
        >>> loss_func = CompatibleHeadLoss(task_loss, head, centers=(old, labels))
        >>> loss = loss_func(head(torch.randn(4, 12)), labels[:4], ref_emb=old[:4])

    Reference:
        Ours. The first term is the L2 baseline of Shen et al., "Towards Backward-Compatible Representation Learning",
        CVPR 2020, on a part of the embedding that has no other task; the second is :class:`BCTLoss`'s; the third is the
        loss of Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, with old references.
    """

    head: CompatibleHead

    def __init__(
        self,
        loss: torch.nn.Module,
        head: CompatibleHead,
        old_losses: torch.nn.Module | Mapping[str, torch.nn.Module] | None = None,
        weights: float | Mapping[str, float] | None = None,
        *,
        centers: OldSystem | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(head, CompatibleHead):
            raise ValueError(f"head must be the model's CompatibleHead, got {type(head).__name__}")
        check_task_width(loss, head.free_features, "head.free_features")
        if old_losses is None:
            terms: dict[str, torch.nn.Module] = {
                "point_loss": PointAlignmentLoss(),
                "contrast_loss": _ContrastTerm(),
            }
            default = _WEIGHTS
            if centers is not None:
                terms["class_loss"] = _ClassTerm(centers, head)
                default = _WEIGHTS_WITH_CENTERS
            old_losses, weights = terms, default if weights is None else weights
        elif centers is not None:
            raise ValueError("centers must be None with old_losses, got both; put a term for the classes among these")
        count = len(check_old_losses(old_losses))
        if head.parts not in (1, count):
            raise ValueError(
                f"head must have a part for each of the {count} old losses, or one for all, got {head.parts}; make it "
                f"with parts={count}"
            )
        super().__init__(loss, old_losses, 1.0 if weights is None else weights, **kwargs)
        # Past nn.Module's registration: it is the model's, and would be optimised and saved twice.
        self.__dict__["head"] = head

    def without_labels(self, embeddings: torch.Tensor, ref_emb: torch.Tensor) -> torch.Tensor:
        """Return the loss of items whose class nobody knows: of the old losses that read no labels, by their weights.

        More of the old space than the training classes show comes from what both models can be asked about: images of
        the gallery's kind without labels, or mixtures of training images (``examples/cifar100/training.py``).

        Args:
            embeddings: ``(N, head.out_features)``, as the head gives them; the free part receives no gradient.
            ref_emb: ``(N, head.old_features)``, the old model's embeddings of the same items; receives no gradient.
        Shape:
            - output: scalar, float32 or better
        Raises:
            ValueError: every old loss that has a weight reads labels; empty, NaN or infinite, other widths or lengths.
        """
        readers = [(name, term) for name, term in self._active() if not getattr(inner_loss(term), "needs_labels", True)]
        if not readers:
            raise ValueError(
                "old_losses must have one that reads no labels, such as PointAlignmentLoss, and has a weight, got "
                f"{self._names}"
            )
        with one_read():
            check_embeddings(embeddings)
            check_embeddings(ref_emb, "ref_emb")
        with values_known():
            compared = self._compared(at_least_float32(embeddings))
            target = self.target(ref_emb)
            losses = [self._weight(name) * term(compared[name], ref_emb=target) for name, term in readers]
        return torch.stack(losses).sum()

    def _weight(self, name: str) -> torch.Tensor | float:
        weight = self.weights[name]
        if weight is not None:
            return weight
        assert self.balance is not None  # it has the names that have no weight
        return self.balance.weight(name)

    def parts(self, given: Given) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the free part, which the task loss sees, and by name what each old loss sees."""
        return self.head.free_part(given.embeddings), self._compared(given.embeddings)

    def _compared(self, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
        compatible = self.head.compatible_parts(embeddings)
        if self.head.parts == 1:
            compatible *= len(self._names)
        return dict(zip(self._names, compatible, strict=True))

    def target(self, old_embeddings: torch.Tensor) -> torch.Tensor:
        """Return where the compatible part should lie."""
        old = check_embeddings(old_embeddings, "ref_emb", self.head.old_features).detach()
        check_same_device(old, "ref_emb", next(self.head.compatible.parameters()), "the head")
        return self.head.target(at_least_float32(old))


class _ClassTerm(torch.nn.Module):
    """How far the new embeddings are from their old classes' directions, called like a loss of old embeddings."""

    def __init__(self, centers: OldSystem, head: CompatibleHead) -> None:
        super().__init__()
        centers = as_centers(centers, width=head.old_features)
        if head.whitening is None:
            head.whiten_queries(centers.whitening)
        rows = head.target(centers.directions)
        self.classifier = FrozenClassifier(rows, labels=centers.labels, kind="cosine")
        self.needs_ref_emb, self.needs_labels = False, True

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor, **references: Any) -> torch.Tensor:
        """Return the mean over the samples whose class has a direction."""
        losses, known = self.classifier.direction_losses(embeddings, labels)
        return losses.sum() / known.sum().clamp(min=1)


class _ContrastTerm(torch.nn.Module):
    """The supervised contrast of new embeddings with old ones."""

    needs_ref_emb, needs_labels = True, True

    def forward(
        self, embeddings: torch.Tensor, labels: torch.Tensor, *, ref_emb: torch.Tensor, ref_labels: Any = None
    ) -> torch.Tensor:
        """Return the mean over the rows of a class that is there; 0 where there is no other to be told apart from."""
        new, old = check_old_rows(embeddings, ref_emb)
        ref_labels = labels if ref_labels is None else check_labels(ref_labels, "ref_labels", len(old))
        with no_autocast(new):
            losses = supervised_contrast(unit_rows(new), unit_rows(old), labels, ref_labels, _TEMPERATURE)
            several = (labels != ref_labels[:1]).any() | (ref_labels != ref_labels[:1]).any()
            return torch.where(several, mean_of_positive(losses), 0.0)
