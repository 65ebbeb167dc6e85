"""What every loss of the library is put through the shared suites with: a new loss joins by one line in ``LOSSES``.

A case builds a fresh loss for embeddings ``WIDTH`` wide and labels 0 to ``CLASSES - 1``; the same seed builds the
same loss. A loss that needs the other model's embeddings of the same rows, ``ref_emb``, and neither labels nor pairs,
joins by one line in ``ALIGNED``; one that needs both ``ref_emb`` and labels, by one line in ``PAIRED``.
"""

import functools
from collections.abc import Callable

import torch
from pytorch_metric_learning import distances, losses

from pml_compat._rows import at_least_float32
from pml_compat.frozen import ClassCenters, FrozenClassifier, WithinClassWhitening
from pml_compat.heads import BasisTransformation, CompatibleHead
from pml_compat.losses import (
    AdvBCTLoss,
    BCAlignerLoss,
    BCTLoss,
    BT2Loss,
    CompatibleHeadLoss,
    CompatibleLoss,
    CoReSLoss,
    CrossModelLoss,
    CSDLoss,
    D3StillLoss,
    FastFillLoss,
    FCTLoss,
    FocalDistillationLoss,
    HOCLoss,
    LCELoss,
    LwFLoss,
    MatryoshkaLoss,
    MixBCTLoss,
    NCCLLoss,
    PointAlignmentLoss,
    RACTLoss,
    RAMLLoss,
    SSPLoss,
    UniBCTLoss,
)
from pml_compat.miners import HardestCrossModelMiner
from pml_compat.transformations import LinearTransformation, TransformationChain

WIDTH, OLD_WIDTH, CLASSES = 8, 6, 5


def old_classifier() -> FrozenClassifier:
    """Knows labels 0, 2 and 4."""
    return FrozenClassifier(torch.randn(3, OLD_WIDTH), labels=[2, 0, 4], kind="cosine", scale=5.0)


def old_centers() -> ClassCenters:
    return ClassCenters(torch.randn(CLASSES, OLD_WIDTH), torch.arange(CLASSES))


def measured_centers(width: int = OLD_WIDTH) -> ClassCenters:
    return ClassCenters(torch.randn(CLASSES, width), torch.arange(CLASSES), torch.full((CLASSES,), 0.8))


@functools.cache
def centers_of_embeddings(width: int = OLD_WIDTH) -> ClassCenters:
    """The same for every seed: their directions are fitted, which takes a while, and losses copy them."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return ClassCenters.from_embeddings(torch.randn(40, width), torch.arange(40) % CLASSES)


def halfway(loss_func: AdvBCTLoss) -> AdvBCTLoss:
    loss_func.set_progress(0.5)
    return loss_func


class FastFillOfRows(FastFillLoss):
    """Called as PML calls a loss: the log variance is read off the embeddings."""

    def forward(self, embeddings: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return super().forward(embeddings, *args, log_var=at_least_float32(embeddings).mean(1), **kwargs)


class CompatibleHeadOfRows(CompatibleHeadLoss):
    """Called with old embeddings as wide as the new ones, of which the head's old part is as wide as the first."""

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        indices_tuple: object = None,
        ref_emb: torch.Tensor | None = None,
        ref_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        old = None if ref_emb is None else ref_emb[:, : self.head.old_features]
        return super().forward(embeddings, labels, indices_tuple, old, ref_labels)


def head(old_features: int, parts: int, whitened: bool = True) -> CompatibleHead:
    """The same for every seed: it is the model's, and in no loss's state."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        old = torch.randn(30, old_features)
        whitening = WithinClassWhitening.from_embeddings(old, torch.arange(30) % CLASSES) if whitened else None
        return CompatibleHead(
            WIDTH - parts * old_features, old_features, whitening=whitening, hidden_features=4, parts=parts
        )


def basis() -> BasisTransformation:
    """The same for every seed: it is the model's, and in no loss's state."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return BasisTransformation(WIDTH - 2, WIDTH, extra_features=2)


def gallery() -> torch.Tensor:
    """The same for every seed: it is the user's, and in no loss's state."""
    return torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0))


def classification() -> torch.nn.Module:
    return losses.NormalizedSoftmaxLoss(CLASSES, WIDTH)


def nccl(loss: torch.nn.Module, **kwargs: object) -> NCCLLoss:
    """A queue that a batch fills, and goes past the end of."""
    loss_func = NCCLLoss(loss, 40, embedding_size=WIDTH, **kwargs)
    loss_func.fill(torch.randn(30, WIDTH), torch.arange(30) % CLASSES)
    return loss_func


def random_map() -> LinearTransformation:
    """Another for each seed."""
    made = LinearTransformation(WIDTH, WIDTH, bias=False)
    torch.nn.init.orthogonal_(made.linear.weight)
    return made


LOSSES: dict[str, Callable[..., torch.nn.Module]] = {
    "bct": lambda **kwargs: BCTLoss(classification(), old_classifier(), 0.5, **kwargs),
    "bct_arcface": lambda **kwargs: BCTLoss(
        losses.ArcFaceLoss(CLASSES, WIDTH),
        FrozenClassifier.from_loss(losses.ArcFaceLoss(3, OLD_WIDTH)).extend(old_centers()),
        1.0,
        **kwargs,
    ),
    "bct_linear": lambda **kwargs: BCTLoss(
        classification(), FrozenClassifier.from_layer(torch.nn.Linear(OLD_WIDTH, 3)), 1.0, **kwargs
    ),
    "bct_pairs": lambda **kwargs: BCTLoss(losses.ContrastiveLoss(), old_classifier(), 1.0, **kwargs),
    "bct_proxy_anchor": lambda **kwargs: BCTLoss(
        losses.ProxyAnchorLoss(CLASSES, WIDTH), old_classifier(), 1.0, **kwargs
    ),
    "bct_default": lambda **kwargs: BCTLoss(classification(), old_classifier(), **kwargs),
    "cores": lambda **kwargs: CoReSLoss(WIDTH + 1, **kwargs),
    "matryoshka": lambda **kwargs: MatryoshkaLoss(
        {3: BCTLoss(losses.NormalizedSoftmaxLoss(CLASSES, 3), old_classifier(), 0.5), WIDTH: classification()}, **kwargs
    ),
    "lce": lambda **kwargs: LCELoss(classification(), measured_centers(WIDTH), 100.0, 1.0, **kwargs),
    "lce_cosine": lambda **kwargs: LCELoss(
        losses.CosFaceLoss(CLASSES, WIDTH), measured_centers(WIDTH), 10.0, 2.0, "cosine", **kwargs
    ),
    "lce_both_ways": lambda **kwargs: LCELoss(
        losses.SubCenterArcFaceLoss(num_classes=CLASSES, embedding_size=WIDTH),
        measured_centers(),
        100.0,
        1.0,
        forward_transformation=LinearTransformation(OLD_WIDTH, WIDTH),
        backward_transformation=LinearTransformation(WIDTH, OLD_WIDTH),
        **kwargs,
    ),
    "lce_pairs": lambda **kwargs: LCELoss(losses.ContrastiveLoss(), measured_centers(WIDTH), 0.0, 1.0, **kwargs),
    "lce_default": lambda **kwargs: LCELoss(classification(), centers_of_embeddings(WIDTH), **kwargs),
    "unibct": lambda **kwargs: UniBCTLoss(classification(), old_centers(), 0.5, **kwargs),
    "unibct_margin": lambda **kwargs: UniBCTLoss(
        losses.ArcFaceLoss(CLASSES, WIDTH), old_centers(), 1.0, scale=30.0, margin=0.3, **kwargs
    ),
    "unibct_default": lambda **kwargs: UniBCTLoss(classification(), centers_of_embeddings(), **kwargs),
}

ALIGNED: dict[str, Callable[..., torch.nn.Module]] = {
    "fct": FCTLoss,
    "fct_unit": lambda **kwargs: FCTLoss(distance=distances.LpDistance(p=2, power=2), **kwargs),
    "fct_contrast": lambda **kwargs: FCTLoss(0.3, distance=distances.CosineSimilarity(), **kwargs),
    "fct_cosine": lambda **kwargs: FCTLoss(distance=distances.CosineSimilarity(), **kwargs),
    "fastfill": FastFillOfRows,
    "fastfill_unit": lambda **kwargs: FastFillOfRows(distance=distances.LpDistance(p=2, power=2), **kwargs),
    "lwf": lambda **kwargs: LwFLoss(FrozenClassifier(torch.randn(3, WIDTH), kind="cosine"), **kwargs),
    "lwf_linear": lambda **kwargs: LwFLoss(
        FrozenClassifier.from_layer(torch.nn.Linear(WIDTH, 3)), temperature=2.0, old_temperature=0.5, **kwargs
    ),
    "point_alignment": PointAlignmentLoss,
    "raml": RAMLLoss,
    "csd": CSDLoss,
    "csd_gallery": lambda **kwargs: CSDLoss(gallery(), 7, temperature=0.2, old_temperature=0.3, **kwargs),
    "ssp": lambda **kwargs: SSPLoss(torch.randn(5, WIDTH), **kwargs),
    "ssp_codebooks": lambda **kwargs: SSPLoss(torch.randn(4, 6, WIDTH // 4), scale=2.0, **kwargs),
    "d3still": D3StillLoss,
    "d3still_gallery": lambda **kwargs: D3StillLoss(gallery(), 6, point_weight=1.0, **kwargs),
    "point_alignment_weakened": lambda **kwargs: PointAlignmentLoss(10.0, threshold=0.2, squared=False, **kwargs),
}

PAIRED: dict[str, Callable[..., torch.nn.Module]] = {
    "compatible": lambda **kwargs: CompatibleLoss(classification(), FCTLoss(), 0.5, **kwargs),
    "compatible_default": lambda **kwargs: CompatibleLoss(classification(), FCTLoss(), **kwargs),
    "bc_aligner": lambda **kwargs: BCAlignerLoss(
        classification(), random_map(), 16.0, TransformationChain(random_map(), random_map()), **kwargs
    ),
    "bc_aligner_default": lambda **kwargs: BCAlignerLoss(classification(), random_map(), **kwargs),
    "bc_aligner_pairs_default": lambda **kwargs: BCAlignerLoss(
        losses.ContrastiveLoss(), random_map(), previous_maps=random_map(), **kwargs
    ),
    "hoc": lambda **kwargs: HOCLoss(WIDTH + 1, **kwargs),
    "advbct": lambda **kwargs: halfway(
        AdvBCTLoss(torch.randn(3, WIDTH) / 8, torch.rand(3), [2, 0, 4], threshold=0.4, normalize=False, **kwargs)
    ),
    "advbct_unit": lambda **kwargs: halfway(AdvBCTLoss(torch.randn(CLASSES, WIDTH) / 8, torch.rand(CLASSES), **kwargs)),
    "advbct_boundary": lambda **kwargs: AdvBCTLoss(
        torch.randn(CLASSES, WIDTH) / 8, torch.rand(CLASSES), adversarial_weight=0.0, threshold=1.0, **kwargs
    ),
    "bt2": lambda **kwargs: BT2Loss(
        losses.NormalizedSoftmaxLoss(CLASSES, WIDTH - 2), basis(), measured_centers(WIDTH), match_weight=0.0, **kwargs
    ),
    "head": lambda **kwargs: CompatibleHeadOfRows(
        losses.NormalizedSoftmaxLoss(CLASSES, WIDTH - 4), head(2, 2), **kwargs
    ),
    "head_points": lambda **kwargs: CompatibleHeadOfRows(
        losses.ContrastiveLoss(), head(WIDTH - 3, 1, whitened=False), PointAlignmentLoss(), 0.5, **kwargs
    ),
    "mixbct": lambda **kwargs: MixBCTLoss(classification(), draw_weight=0.0, **kwargs),
    "mixbct_default": lambda **kwargs: MixBCTLoss(classification(), **kwargs),
    "nccl": lambda **kwargs: nccl(classification(), feature_weight=1.0, logit_weight=0.5, temperature=1.0, **kwargs),
    "nccl_pairs": lambda **kwargs: nccl(
        losses.ContrastiveLoss(), feature_weight=1.0, logit_weight=0.0, temperature=0.1, **kwargs
    ),
    "nccl_default": lambda **kwargs: nccl(classification(), **kwargs),
    "fastfill_classifier": lambda **kwargs: FastFillOfRows(
        FrozenClassifier(torch.randn(3, WIDTH), labels=[2, 0, 4]), 0.5, **kwargs
    ),
    "focal_distillation": lambda **kwargs: FocalDistillationLoss(measured_centers(WIDTH), **kwargs),
    "focal_distillation_batch": FocalDistillationLoss,
    "focal_distillation_logits": lambda **kwargs: FocalDistillationLoss(
        FrozenClassifier(torch.randn(3, WIDTH), labels=[2, 0, 4]), kind="logits", **kwargs
    ),
    "ract": lambda **kwargs: RACTLoss(temperature=0.1, **kwargs),
    "ract_hardest": lambda **kwargs: RACTLoss(temperature=0.01, top_k=3, **kwargs),
    "ract_triplet": lambda **kwargs: RACTLoss(form="triplet", top_k=4, **kwargs),
    "ract_old_negatives": lambda **kwargs: RACTLoss(temperature=0.1, regression=False, **kwargs),
    "cross_model": lambda **kwargs: CrossModelLoss(losses.ContrastiveLoss(), **kwargs),
    "cross_model_symmetric": lambda **kwargs: CrossModelLoss(losses.SupConLoss(), symmetric=True, **kwargs),
    "cross_model_mined": lambda **kwargs: CrossModelLoss(
        losses.TripletMarginLoss(), HardestCrossModelMiner(2), symmetric=True, **kwargs
    ),
}

# Losses that draw at random, in train mode: other rows at the next call, and of the same rows in another order.
RANDOM = {"mixbct", "mixbct_default"}
# Losses whose terms have multipliers that are measured, and move from call to call.
BALANCED = {name for name in LOSSES | PAIRED if name.endswith("_default")}


def build(name: str, seed: int = 0, **kwargs: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    return (LOSSES | ALIGNED | PAIRED)[name](**kwargs)


def batch(n: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings that ask for a gradient, and labels."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    return embeddings, torch.arange(n) % CLASSES


def references(name: str, n: int = 16, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return what the loss is called with besides embeddings and labels."""
    if name in LOSSES:
        return {}
    return {"ref_emb": torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))}
