"""What is compared: how each method's loss is built from what is left of the old model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from networks import WIDTH
from profiles import Profile
from pytorch_metric_learning.losses import SupConLoss
from training import task_loss

from pml_compat.frozen import ClassCenters, FrozenClassifier
from pml_compat.losses import (
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
from pml_compat.transformations import OrthogonalTransformation

CLASSES = 100


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
    """A loss, and whether it is given the old embeddings of the batch."""

    loss: torch.nn.Module
    reads_old: bool = False


def networks_of(profile: Profile, weights: dict[str, float]) -> dict[str, Callable[[OldSystem], Training]]:
    """Return what builds the loss of each method that trains a new model.

    ``weights`` are the multipliers chosen on held-out training images; ``*_paper`` have those of the papers.
    """

    def task() -> torch.nn.Module:
        return task_loss(CLASSES, WIDTH, profile)

    def added(old_loss: torch.nn.Module, name: str, task_and_more: torch.nn.Module | None = None) -> Training:
        return Training(CompatibleLoss(task_and_more or task(), old_loss, weights[name]), True)

    def pseudo(old: OldSystem) -> FrozenClassifier:
        return FrozenClassifier.from_centers(old.centers, scale=weights["pseudo_scale"])

    def cross_model() -> torch.nn.Module:
        return CrossModelLoss(SupConLoss(temperature=weights["supcon_temperature"]))

    def nccl(old: OldSystem) -> Training:
        loss = NCCLLoss(
            task(), embedding_size=WIDTH, feature_weight=weights["nccl"], temperature=weights["nccl_temperature"]
        )
        some = torch.randperm(len(old.labels))[:8192]
        loss.fill(old.embeddings.cpu()[some], old.labels.cpu()[some])
        return Training(loss, True)

    def lce_backward(old: OldSystem) -> Training:
        to_old = OrthogonalTransformation(WIDTH, WIDTH)
        return Training(LCELoss(task(), old.centers, weights["lce_backward"], backward_transformation=to_old))

    return {
        "independent": lambda old: Training(task()),
        "bct": lambda old: Training(BCTLoss(task(), pseudo(old), weights["bct"])),
        "bct_paper": lambda old: Training(BCTLoss(task(), pseudo(old))),
        "unibct": lambda old: Training(
            UniBCTLoss(task(), old.centers, weights["unibct"], scale=weights["pseudo_scale"])
        ),
        "lce": lambda old: Training(LCELoss(task(), old.centers, weights["lce"])),
        "lce_paper": lambda old: Training(LCELoss(task(), old.centers)),
        "lce_backward": lce_backward,
        "cross_model": lambda old: added(cross_model(), "cross_model"),
        "ract": lambda old: added(RACTLoss(temperature=weights["ract_temperature"]), "ract"),
        "point_alignment": lambda old: added(PointAlignmentLoss(), "point_alignment"),
        "lwf": lambda old: added(LwFLoss(pseudo(old)), "lwf"),
        "focal_distillation": lambda old: added(FocalDistillationLoss(old.centers), "focal_distillation"),
        "nccl": nccl,
        "advbct": lambda old: added(AdvBCTLoss.from_embeddings(old.embeddings.cpu(), old.labels.cpu()), "advbct"),
        "mixbct": lambda old: Training(MixBCTLoss(task()), True),
        "bct_cross_model": lambda old: added(
            cross_model(), "cross_model", BCTLoss(task(), pseudo(old), weights["bct_beside_cross_model"])
        ),
        "lce_cross_model": lambda old: added(
            cross_model(), "cross_model", LCELoss(task(), old.centers, weights["lce"])
        ),
    }


MAPS = ("linear", "fct", "fct_side")  # of the old gallery, for the independent model
