"""What is compared: how each method's loss is built from what is left of the old model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from networks import WIDTH, SecondHalf
from pytorch_metric_learning.losses import SupConLoss
from training import task_loss

from pml_compat.frozen import ClassCenters, FrozenClassifier
from pml_compat.heads import BasisTransformation, CompatibleHead
from pml_compat.losses import (
    AdvBCTLoss,
    BCTLoss,
    BT2Loss,
    CompatibleHeadLoss,
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
from pml_compat.transformations import OrthogonalTransformation


@dataclass(frozen=True)
class OldSystem:
    """The old model's side of the new training set.

    Args:
        embeddings: ``(N, WIDTH)`` of plain images, as the model gives them, on the training's device.
        labels: ``(N,)``.
        centers: of every new class.
    """

    embeddings: torch.Tensor
    labels: torch.Tensor
    centers: ClassCenters


class Training(NamedTuple):
    """How a new model is trained.

    Args:
        loss: called with embeddings and labels, and with what it reads.
        reads: the stored embeddings that it is given of each batch.
        head: what the network gets for it.
        asks: whether the old network is asked about each view, in place of stored embeddings.
    """

    loss: torch.nn.Module
    reads: tuple[str, ...] = ()
    head: torch.nn.Module | None = None
    asks: bool = False


def networks_of(classes: int) -> dict[str, Callable[[OldSystem], Training]]:
    """Return what builds the loss of each method that trains a new model, as it is dropped in: nothing is set."""

    def task() -> torch.nn.Module:
        return task_loss(classes, WIDTH)

    def added(old_loss: torch.nn.Module) -> Training:
        return Training(CompatibleLoss(task(), old_loss), ("old",))

    def nccl(old: OldSystem) -> Training:
        loss = NCCLLoss(task(), embedding_size=WIDTH)
        some = torch.randperm(len(old.labels))[:8192]
        loss.fill(old.embeddings.cpu()[some], old.labels.cpu()[some])
        return Training(loss, ("old",))

    def lce_backward(old: OldSystem) -> Training:
        to_old = OrthogonalTransformation(WIDTH, WIDTH)
        return Training(LCELoss(task(), old.centers, backward_transformation=to_old))

    def bt2(old: OldSystem) -> Training:
        basis = BasisTransformation(WIDTH, WIDTH)
        return Training(BT2Loss(task(), basis, old.centers), ("old", "independent"), basis)

    def head(old: OldSystem, asks: bool = True) -> Training:
        last = CompatibleHead(2 * WIDTH, WIDTH, SecondHalf(), WIDTH)
        loss = CompatibleHeadLoss(task(), last, centers=old.centers)
        return Training(loss, () if asks else ("old",), last, asks)

    return {
        "independent": lambda old: Training(shorten_class_weights(task())),
        "bct": lambda old: Training(BCTLoss(task(), FrozenClassifier.from_centers(old.centers))),
        "bct_paper": lambda old: Training(BCTLoss(task(), FrozenClassifier.from_centers(old.centers), 1.0)),
        "unibct": lambda old: Training(UniBCTLoss(task(), old.centers)),
        "lce": lambda old: Training(LCELoss(task(), old.centers)),
        "lce_paper": lambda old: Training(LCELoss(task(), old.centers, 100.0, 1.0)),
        "lce_backward": lce_backward,
        "cross_model": lambda old: added(CrossModelLoss(SupConLoss())),
        "ract": lambda old: added(RACTLoss()),
        "point_alignment": lambda old: added(PointAlignmentLoss()),
        "lwf": lambda old: added(LwFLoss(FrozenClassifier.from_centers(old.centers))),
        "focal_distillation": lambda old: added(FocalDistillationLoss(old.centers)),
        "nccl": nccl,
        "advbct": lambda old: added(AdvBCTLoss.from_embeddings(old.embeddings.cpu(), old.labels.cpu())),
        "mixbct": lambda old: Training(MixBCTLoss(task()), ("old",)),
        "bt2": bt2,
        "head": head,
        "head_stored": lambda old: head(old, asks=False),  # which does without the old network in the loop
    }


AT_QUERY_TIME = ("rotated", "blended", "two_stages_10", "two_stages_50")  # of the old and the independent model
MAPS = ("linear", "fct", "fct_side", "fct_mixtures", "fastfill", "fastfill_side")  # of the old gallery
