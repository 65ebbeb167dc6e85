"""Every method of the library that trains a new network, as the demo builds its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .._host import ArcFaceLoss, SupConLoss
from ..frozen import ClassCenters, FrozenClassifier
from ..losses import (
    AdvBCTLoss,
    BCTLoss,
    CompatibleLoss,
    CrossModelLoss,
    FocalDistillationLoss,
    LCELoss,
    LwFLoss,
    MixBCTLoss,
    NCCLLoss,
    PointAlignmentLoss,
    RACTLoss,
    UniBCTLoss,
    shorten_class_weights,
)
from ..transformations import OrthogonalTransformation

CLASSES, OLD_WIDTH, NEW_WIDTH = 10, 32, 64


@dataclass(frozen=True)
class OldSystem:
    """What the old model leaves to the training of a new one.

    Args:
        classifier: its classifier, with pseudo rows for the digits it never saw.
        centers: a centre for every digit, also for those it never saw.
        embeddings: ``(N, OLD_WIDTH)``, its embeddings of the new training images, as it gives them.
        labels: ``(N,)``, of these images.
    """

    classifier: FrozenClassifier
    centers: ClassCenters
    embeddings: torch.Tensor
    labels: torch.Tensor


class Training(NamedTuple):
    """What a new network is trained with: its loss, its width, and whether the loss is given old embeddings."""

    loss: torch.nn.Module
    width: int
    reads_old: bool = False


def task_loss(classes: int, width: int) -> ArcFaceLoss:
    """The loss of every model that learns from labels, with PML's own settings."""
    return ArcFaceLoss(classes, width)


def _with_old_embeddings(old_loss: torch.nn.Module) -> Training:
    return Training(CompatibleLoss(task_loss(CLASSES, OLD_WIDTH), old_loss), OLD_WIDTH, True)


def _independent(old: OldSystem) -> Training:
    return Training(shorten_class_weights(task_loss(CLASSES, NEW_WIDTH)), NEW_WIDTH)


def _bct(old: OldSystem) -> Training:
    return Training(BCTLoss(task_loss(CLASSES, NEW_WIDTH), old.classifier), NEW_WIDTH)


def _lce(old: OldSystem) -> Training:
    return Training(LCELoss(task_loss(CLASSES, OLD_WIDTH), old.centers), OLD_WIDTH)


def _lce_backward(old: OldSystem) -> Training:
    to_old = OrthogonalTransformation(NEW_WIDTH, OLD_WIDTH)
    return Training(LCELoss(task_loss(CLASSES, NEW_WIDTH), old.centers, backward_transformation=to_old), NEW_WIDTH)


def _unibct(old: OldSystem) -> Training:
    return Training(UniBCTLoss(task_loss(CLASSES, NEW_WIDTH), old.centers), NEW_WIDTH)


def _cross_model(old: OldSystem) -> Training:
    return _with_old_embeddings(CrossModelLoss(SupConLoss()))


def _ract(old: OldSystem) -> Training:
    return _with_old_embeddings(RACTLoss())


def _point_alignment(old: OldSystem) -> Training:
    return _with_old_embeddings(PointAlignmentLoss())


def _lwf(old: OldSystem) -> Training:
    return _with_old_embeddings(LwFLoss(old.classifier))


def _focal_distillation(old: OldSystem) -> Training:
    return _with_old_embeddings(FocalDistillationLoss(old.centers))


def _nccl(old: OldSystem) -> Training:
    loss = NCCLLoss(task_loss(CLASSES, OLD_WIDTH), embedding_size=OLD_WIDTH)
    loss.fill(old.embeddings, old.labels)
    return Training(loss, OLD_WIDTH, True)


def _advbct(old: OldSystem) -> Training:
    return _with_old_embeddings(AdvBCTLoss.from_embeddings(old.embeddings, old.labels))


def _mixbct(old: OldSystem) -> Training:
    return Training(MixBCTLoss(task_loss(CLASSES, OLD_WIDTH)), OLD_WIDTH, True)


NETWORKS: dict[str, Callable[[OldSystem], Training]] = {
    "independent": _independent,
    "bct": _bct,
    "lce": _lce,
    "lce_backward": _lce_backward,
    "unibct": _unibct,
    "cross_model": _cross_model,
    "ract": _ract,
    "point_alignment": _point_alignment,
    "lwf": _lwf,
    "focal_distillation": _focal_distillation,
    "nccl": _nccl,
    "advbct": _advbct,
    "mixbct": _mixbct,
}
"""Method to what builds its loss and says how wide the new model is."""
