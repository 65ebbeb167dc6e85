"""What is compared: how each method's loss is built from what is left of the old model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from networks import WIDTH, SecondHalf
from profiles import Profile
from pytorch_metric_learning.losses import SupConLoss
from training import task_loss

from pml_compat.frozen import ClassCenters, FrozenClassifier, WithinClassWhitening, fit_centers
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


class ClassTerm(torch.nn.Module):
    """The cross-entropy over old class centres, as a loss that is called like those that read old embeddings."""

    def __init__(self, centers: ClassCenters, scale: float) -> None:
        super().__init__()
        self.classifier = FrozenClassifier.from_centers(centers, scale=scale)

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return its mean over the batch."""
        return self.classifier.losses(embeddings, labels)[0].mean()


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


def networks_of(
    profile: Profile, weights: dict[str, float], classes: int
) -> dict[str, Callable[[OldSystem], Training]]:
    """Return what builds the loss of each method that trains a new model.

    ``weights`` are the multipliers chosen on images that are not tested; ``*_paper`` have those of the papers.
    """

    def task() -> torch.nn.Module:
        return task_loss(classes, WIDTH, profile)

    def added(old_loss: torch.nn.Module, name: str, task_and_more: torch.nn.Module | None = None) -> Training:
        return Training(CompatibleLoss(task_and_more or task(), old_loss, weights[name]), ("old",))

    def pseudo(old: OldSystem) -> FrozenClassifier:
        return FrozenClassifier.from_centers(old.centers, scale=weights["pseudo_scale"])

    def fitted(old: OldSystem) -> ClassCenters:
        return fit_centers(old.embeddings, old.labels, scale=weights["pseudo_scale"], progress=False)

    def fitted_classifier(old: OldSystem) -> FrozenClassifier:
        return FrozenClassifier.from_centers(fitted(old), scale=weights["pseudo_scale"])

    def cross_model() -> torch.nn.Module:
        return CrossModelLoss(SupConLoss(temperature=weights["supcon_temperature"]))

    def nccl(old: OldSystem) -> Training:
        loss = NCCLLoss(
            task(), embedding_size=WIDTH, feature_weight=weights["nccl"], temperature=weights["nccl_temperature"]
        )
        some = torch.randperm(len(old.labels))[:8192]
        loss.fill(old.embeddings.cpu()[some], old.labels.cpu()[some])
        return Training(loss, ("old",))

    def lce_backward(old: OldSystem) -> Training:
        to_old = OrthogonalTransformation(WIDTH, WIDTH)
        return Training(LCELoss(task(), old.centers, weights["lce_backward"], backward_transformation=to_old))

    def bt2(old: OldSystem) -> Training:
        basis = BasisTransformation(WIDTH, WIDTH)
        return Training(BT2Loss(task(), basis, old.centers), ("old", "independent"), basis)

    def head(
        old: OldSystem,
        whitened: bool = True,
        terms: dict[str, float] | None = None,
        asks: bool = True,
        **options: Any,
    ) -> Training:
        terms = terms or {"point": weights["head_point"], "contrast": weights["head_contrast"]}
        options = {"parts": len(terms), "trunk_gradient": weights["head_trunk_gradient"]} | options
        whitening = WithinClassWhitening.from_embeddings(
            old.embeddings, old.labels, shrinkage=weights["head_shrinkage"]
        )
        last = CompatibleHead(
            2 * WIDTH, WIDTH, SecondHalf(), WIDTH, whitening=whitening if whitened else None, **options
        ).to(old.embeddings.device)
        targets = last.target(old.embeddings).cpu()
        old_losses = {
            "point": PointAlignmentLoss(),
            "contrast": cross_model(),
            "class": ClassTerm(ClassCenters.from_embeddings(targets, old.labels.cpu()), weights["pseudo_scale"]),
        }
        chosen = {name: old_losses[name] for name in terms}
        return Training(CompatibleHeadLoss(task(), last, chosen, terms), () if asks else ("old",), last, asks)

    def stored_head(old: OldSystem, **options: Any) -> Training:
        return head(old, asks=False, trunk_gradient=0.3, **options)

    return {
        "independent": lambda old: Training(task()),
        "bct": lambda old: Training(BCTLoss(task(), pseudo(old), weights["bct"])),
        "bct_paper": lambda old: Training(BCTLoss(task(), pseudo(old))),
        "bct_fitted": lambda old: Training(BCTLoss(task(), fitted_classifier(old), weights["bct"])),
        "unibct": lambda old: Training(
            UniBCTLoss(task(), old.centers, weights["unibct"], scale=weights["pseudo_scale"])
        ),
        "lce": lambda old: Training(LCELoss(task(), old.centers, weights["lce"])),
        "lce_paper": lambda old: Training(LCELoss(task(), old.centers)),
        "lce_fitted": lambda old: Training(LCELoss(task(), fitted(old), weights["lce"])),
        "lce_backward": lce_backward,
        "cross_model": lambda old: added(cross_model(), "cross_model"),
        "ract": lambda old: added(RACTLoss(temperature=weights["ract_temperature"]), "ract"),
        "point_alignment": lambda old: added(PointAlignmentLoss(), "point_alignment"),
        "lwf": lambda old: added(LwFLoss(pseudo(old)), "lwf"),
        "focal_distillation": lambda old: added(FocalDistillationLoss(old.centers), "focal_distillation"),
        "nccl": nccl,
        "advbct": lambda old: added(AdvBCTLoss.from_embeddings(old.embeddings.cpu(), old.labels.cpu()), "advbct"),
        "mixbct": lambda old: Training(MixBCTLoss(task()), ("old",)),
        "bct_cross_model": lambda old: added(
            cross_model(), "cross_model", BCTLoss(task(), pseudo(old), weights["bct_beside_cross_model"])
        ),
        "bt2": bt2,
        "head": head,
        # What the head is made of, one by one; these read stored embeddings, as a cheaper training does.
        "head_stored": stored_head,
        "head_one_part": lambda old: stored_head(old, parts=1),
        "head_not_whitened": lambda old: stored_head(old, parts=1, whitened=False),
        "head_points": lambda old: stored_head(old, terms={"point": weights["head_point"]}),
        "head_contrast": lambda old: stored_head(old, terms={"contrast": weights["head_contrast"]}),
        "head_classes": lambda old: stored_head(old, terms={"class": 1.0}),
        "head_points_classes": lambda old: stored_head(old, terms={"point": weights["head_point"], "class": 1.0}),
        "head_detached": lambda old: head(old, asks=False, trunk_gradient=0.0),
        "lce_cross_model": lambda old: added(
            cross_model(), "cross_model", LCELoss(task(), old.centers, weights["lce_beside_cross_model"])
        ),
    }


MAPS = (  # of the old gallery
    "linear",
    "fct",
    "fct_side",
    "fct_contrast",
    "fct_contrast_side",
    "fct_instance",
    "fct_instance_side",
    "fct_mixtures",
    "fct_instance_mixtures",
    "fastfill",
    "fastfill_side",
    "fastfill_likelihood",
)
