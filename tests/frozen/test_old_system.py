"""What a user has of an old system, in every form, wherever a loss or a miner takes one of them."""

import pytest
import torch
from pytorch_metric_learning import losses

from pml_compat.frozen import ClassCenters, FrozenClassifier
from pml_compat.heads import BasisTransformation, CompatibleHead
from pml_compat.losses import (
    AdvBCTLoss,
    BCTLoss,
    BT2Loss,
    CompatibleHeadLoss,
    FastFillLoss,
    FocalDistillationLoss,
    LCELoss,
    LCETransformationLoss,
    LwFLoss,
    UniBCTLoss,
)
from pml_compat.miners import BoundaryViolationMiner
from pml_compat.transformations import LinearTransformation

N, D, C = 24, 6, 4
OLD = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N) % C
NEW = torch.randn(N, D, generator=torch.Generator().manual_seed(1))


def task(width=D):
    return losses.NormalizedSoftmaxLoss(C, width)


def basis():
    return BasisTransformation(D - 1, D, extra_features=1)


TAKERS = {
    "bct": lambda old: BCTLoss(task(), old)(NEW, LABELS),
    "bct_paper": lambda old: BCTLoss(task(), old, 1.0)(NEW, LABELS),
    "unibct": lambda old: UniBCTLoss(task(), old)(NEW, LABELS),
    "lwf": lambda old: LwFLoss(old)(NEW, ref_emb=OLD),
    "focal": lambda old: FocalDistillationLoss(old)(NEW, LABELS, ref_emb=OLD),
    "focal_logits": lambda old: FocalDistillationLoss(old, kind="logits")(NEW, LABELS, ref_emb=OLD),
    "fastfill": lambda old: FastFillLoss(old)(NEW, LABELS, ref_emb=OLD, log_var=torch.zeros(N)),
    "lce": lambda old: LCELoss(task(), old)(NEW, LABELS),
    "lce_map": lambda old: LCETransformationLoss(LinearTransformation(D, D), old, old, boundary_weight=0)(NEW, LABELS),
    "bt2": lambda old: BT2Loss(task(D - 1), basis(), old, match_weight=0)(NEW, LABELS, ref_emb=OLD),
    "head": lambda old: CompatibleHeadLoss(task(2), CompatibleHead(2, D), centers=old)(
        torch.cat([NEW, NEW[:, :2]], 1), LABELS, ref_emb=OLD
    ),
}


@pytest.fixture(scope="module")
def measured():
    return ClassCenters.from_embeddings(OLD, LABELS)


def value_of(name, old):
    torch.manual_seed(0)
    return TAKERS[name](old).detach()


@pytest.mark.parametrize("name", TAKERS)
def test_stored_embeddings_are_as_good_as_their_centres(name, measured):
    torch.testing.assert_close(value_of(name, (OLD.numpy(), LABELS)), value_of(name, measured))


@pytest.mark.parametrize("name", TAKERS)
def test_a_classifier_is_as_good_as_the_centres_that_it_was_made_of(name, measured):
    classifier = FrozenClassifier.from_centers(measured, 1.0 if name == "bt2" else None)
    torch.testing.assert_close(value_of(name, classifier), value_of(name, measured))


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize("other", [torch.nn.Linear(D, C), OLD, None, (OLD,)], ids=["module", "tensor", "none", "one"])
def test_other_things_are_refused(name, other):
    if other is None and name in ("focal", "fastfill", "head"):
        pytest.skip("None stands for no such term")
    with pytest.raises(ValueError, match=r"must be a (Frozen|Class)\w+, got .*pair|must be given with kind"):
        value_of(name, other)


def test_several_centres_a_class_are_one_direction():
    classifier = FrozenClassifier.from_loss(losses.SoftTripleLoss(C, D, centers_per_class=3))
    loss_func = LCELoss(task(), classifier, 1.0, 0.0)
    torch.testing.assert_close(loss_func.old_centers.centers, classifier.directions)
    with pytest.raises(ValueError, match="centers must have boundaries, got none"):
        LCELoss(task(), classifier, 1.0, 1.0)


def test_advbct_and_the_miner_of_boundaries_take_the_pair(measured):
    found = []
    for make in (lambda: AdvBCTLoss((OLD, LABELS)), lambda: AdvBCTLoss.from_embeddings(OLD, LABELS)):
        torch.manual_seed(0)
        found.append(make()(NEW, LABELS, ref_emb=OLD))
    assert found[0] == found[1]
    for other in (measured, OLD):
        with pytest.raises(ValueError, match="radii must be given"):
            AdvBCTLoss(other)
    mined = [BoundaryViolationMiner(old)(NEW, LABELS, OLD) for old in (measured, (OLD, LABELS))]
    assert all(map(torch.equal, *mined))


def test_the_old_name_of_centres_works_for_a_release(measured):
    with pytest.warns(DeprecationWarning, match="prototypes= is now centers=") as caught:
        loss_func = UniBCTLoss(task(), prototypes=measured)
    assert caught[0].filename == __file__
    assert loss_func.old_classifier.rows.equal(measured.centers)
    with pytest.raises(ValueError, match="prototypes must not be given beside centers"):
        UniBCTLoss(task(), measured, prototypes=measured)
