"""Every method of the library that trains a new network, as the demo builds its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss, SupConLoss

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
)
from ..transformations import OrthogonalTransformation

CLASSES, OLD_WIDTH, NEW_WIDTH = 10, 32, 64
TEMPERATURE = 0.25  # soft enough that the influence goes on shaping classes it already tells apart
# The term's multiplier; for mixbct the share of rows that are replaced. From benchmarks/method_weights.py, but for bct
# and lce, whose choice is older.
WEIGHTS = {
    "bct": 3.0,
    "lce": 100.0,
    "lce_backward": 100.0,
    "unibct": 10.0,
    "cross_model": 10.0,
    "ract": 1.0,
    "point_alignment": 1.0,
    "lwf": 3.0,
    "focal_distillation": 100.0,
    "nccl": 10.0,
    "advbct": 1.0,
    "mixbct": 0.5,
}


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


def task_loss(classes: int, width: int) -> NormalizedSoftmaxLoss:
    """The loss of every model that learns from labels."""
    return NormalizedSoftmaxLoss(classes, width, temperature=TEMPERATURE)


def _with_old_embeddings(old_loss: torch.nn.Module, weight: float) -> Training:
    return Training(CompatibleLoss(task_loss(CLASSES, OLD_WIDTH), old_loss, weight), OLD_WIDTH, True)


def _independent(old: OldSystem) -> Training:
    return Training(task_loss(CLASSES, NEW_WIDTH), NEW_WIDTH)


def _bct(old: OldSystem) -> Training:
    return Training(BCTLoss(task_loss(CLASSES, NEW_WIDTH), old.classifier, WEIGHTS["bct"]), NEW_WIDTH)


def _lce(old: OldSystem) -> Training:
    return Training(LCELoss(task_loss(CLASSES, OLD_WIDTH), old.centers, WEIGHTS["lce"]), OLD_WIDTH)


def _lce_backward(old: OldSystem) -> Training:
    to_old = OrthogonalTransformation(NEW_WIDTH, OLD_WIDTH)
    return Training(
        LCELoss(task_loss(CLASSES, NEW_WIDTH), old.centers, WEIGHTS["lce_backward"], backward_transformation=to_old),
        NEW_WIDTH,
    )


def _unibct(old: OldSystem) -> Training:
    return Training(UniBCTLoss(task_loss(CLASSES, NEW_WIDTH), old.centers, WEIGHTS["unibct"]), NEW_WIDTH)


def _cross_model(old: OldSystem) -> Training:
    return _with_old_embeddings(CrossModelLoss(SupConLoss()), WEIGHTS["cross_model"])


def _ract(old: OldSystem) -> Training:
    return _with_old_embeddings(RACTLoss(temperature=0.1), WEIGHTS["ract"])


def _point_alignment(old: OldSystem) -> Training:
    return _with_old_embeddings(PointAlignmentLoss(), WEIGHTS["point_alignment"])


def _lwf(old: OldSystem) -> Training:
    return _with_old_embeddings(LwFLoss(old.classifier), WEIGHTS["lwf"])


def _focal_distillation(old: OldSystem) -> Training:
    return _with_old_embeddings(FocalDistillationLoss(old.centers), WEIGHTS["focal_distillation"])


def _nccl(old: OldSystem) -> Training:
    loss = NCCLLoss(
        task_loss(CLASSES, OLD_WIDTH), len(old.embeddings), embedding_size=OLD_WIDTH, feature_weight=WEIGHTS["nccl"]
    )
    loss.fill(old.embeddings, old.labels)
    return Training(loss, OLD_WIDTH, True)


def _advbct(old: OldSystem) -> Training:
    return _with_old_embeddings(AdvBCTLoss.from_embeddings(old.embeddings, old.labels), WEIGHTS["advbct"])


def _mixbct(old: OldSystem) -> Training:
    return Training(MixBCTLoss(task_loss(CLASSES, OLD_WIDTH), share=WEIGHTS["mixbct"]), OLD_WIDTH, True)


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
