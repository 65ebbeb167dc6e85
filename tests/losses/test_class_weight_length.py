"""Class weights start short, wherever a loss of the library holds the task loss."""

import copy

import pytest
import torch
from pytorch_metric_learning import distances, losses, regularizers
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

from pml_compat.frozen import ClassCenters, FrozenClassifier
from pml_compat.frozen.class_weights import all_centers, unwrap_loss
from pml_compat.heads import BasisTransformation, CompatibleHead
from pml_compat.losses import (
    BCTLoss,
    BT2Loss,
    CompatibleHeadLoss,
    CompatibleLoss,
    FCTLoss,
    LCELoss,
    MixBCTLoss,
    NCCLLoss,
    UniBCTLoss,
    shorten_class_weights,
)

C, D = 6, 5
DEFAULT = 1.0

OF_DIRECTIONS = {
    "arcface": lambda: losses.ArcFaceLoss(C, D),
    "cosface": lambda: losses.CosFaceLoss(C, D),
    "sphereface": lambda: losses.SphereFaceLoss(C, D),
    "normalized_softmax": lambda: losses.NormalizedSoftmaxLoss(C, D),
    "proxy_anchor": lambda: losses.ProxyAnchorLoss(C, D),
    "proxy_nca": lambda: losses.ProxyNCALoss(C, D),
    "proxy_nca_cosine": lambda: losses.ProxyNCALoss(C, D, distance=distances.CosineSimilarity()),
    "soft_triple": lambda: losses.SoftTripleLoss(C, D, centers_per_class=3),
    "sub_center_arcface": lambda: losses.SubCenterArcFaceLoss(num_classes=C, embedding_size=D, sub_centers=2),
    "p2s_grad": lambda: losses.P2SGradLoss(D, C),
}
plain = distances.LpDistance(power=2, normalize_embeddings=False)
OTHERS = {
    "large_margin": lambda: losses.LargeMarginSoftmaxLoss(C, D),  # lengths are in its logits
    "proxy_nca_plain": lambda: losses.ProxyNCALoss(C, D, distance=plain),  # and in these distances
    "proxy_anchor_lp": lambda: losses.ProxyAnchorLoss(C, D, distance=distances.LpDistance()),  # not known to us
    "regularised": lambda: losses.ArcFaceLoss(C, D, weight_regularizer=regularizers.LpRegularizer()),
    "contrastive": lambda: losses.ContrastiveLoss(),
    "triplet": lambda: losses.TripletMarginLoss(),
    "manifold": lambda: losses.ManifoldLoss(l=D),  # its parameters are no class weights
}

OLD = torch.randn(40, D, generator=torch.Generator().manual_seed(0))
CENTERS = ClassCenters(OLD[:C], torch.arange(C))
WRAPPERS = {
    "bct": lambda loss, **kwargs: BCTLoss(loss, FrozenClassifier(torch.eye(3, D)), **kwargs),
    "unibct": lambda loss, **kwargs: UniBCTLoss(loss, CENTERS, **kwargs),
    "lce": lambda loss, **kwargs: LCELoss(loss, CENTERS, **kwargs),
    "mixbct": lambda loss, **kwargs: MixBCTLoss(loss, **kwargs),
    "nccl": lambda loss, **kwargs: NCCLLoss(loss, 8, embedding_size=D, **kwargs),
    "compatible": lambda loss, **kwargs: CompatibleLoss(loss, FCTLoss(), **kwargs),
    "head": lambda loss, **kwargs: CompatibleHeadLoss(loss, CompatibleHead(D, D), **kwargs),
    "bt2": lambda loss, **kwargs: BT2Loss(loss, BasisTransformation(D, D, extra_features=2), CENTERS, **kwargs),
}
every_wrapper = pytest.mark.parametrize("name", WRAPPERS)


def lengths(loss):
    return all_centers(unwrap_loss(loss)).detach().norm(dim=1)


def state(loss):
    return copy.deepcopy(loss.state_dict())


def same(one, other):
    return all(tensor.equal(other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("name", OF_DIRECTIONS)
@pytest.mark.parametrize("length", [0.1, DEFAULT, 2.0])
def test_every_centre_takes_the_length_and_keeps_its_direction(name, length):
    torch.manual_seed(0)
    loss, embeddings, labels = OF_DIRECTIONS[name](), OLD[:8], torch.arange(8) % C
    before, value = all_centers(loss).detach().clone(), loss(embeddings, labels)
    parameters = list(loss.parameters())
    assert shorten_class_weights(loss, length) is loss
    after = all_centers(loss).detach()
    torch.testing.assert_close(lengths(loss), torch.full((len(before),), length))
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(before, after), torch.ones(len(before)))
    assert all(one is other for one, other in zip(parameters, loss.parameters(), strict=True))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in loss.parameters())
    # The loss reads directions alone, but for the small constant that P2SGrad adds to lengths.
    torch.testing.assert_close(loss(embeddings, labels), value, rtol=1e-3 if name == "p2s_grad" else 1e-5, atol=1e-5)


def test_by_hand():
    loss = losses.NormalizedSoftmaxLoss(3, 2)
    with torch.no_grad():
        loss.W.copy_(torch.tensor([[3.0, 0.0, 0.0], [4.0, -0.2, 0.0]]))  # the last class has no direction
    shorten_class_weights(loss, 0.1)
    torch.testing.assert_close(loss.W.detach(), torch.tensor([[0.06, 0.0, 0.0], [0.08, -0.1, 0.0]]))


@pytest.mark.parametrize("name", OTHERS)
def test_losses_whose_lengths_count_or_that_have_none_stay_as_they_are(name):
    loss = OTHERS[name]()
    before = state(loss)
    assert shorten_class_weights(loss) is loss
    assert same(before, loss.state_dict())


@pytest.mark.parametrize(
    "wrap", [DistributedLossWrapper, lambda loss: BCTLoss(loss, FrozenClassifier(torch.eye(3, D)), 0.5)]
)
def test_wrapped_losses_are_shortened_too(wrap):
    wrapped = wrap(losses.ArcFaceLoss(C, D))
    assert shorten_class_weights(wrapped, 3.0) is wrapped
    torch.testing.assert_close(lengths(wrapped), torch.full((C,), 3.0))
    torch.testing.assert_close(lengths(shorten_class_weights(wrapped)), torch.full((C,), DEFAULT))


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0.0, "class_weight_length must be .* above 0, got 0.0"),
        (-1, "class_weight_length must be .* above 0, got -1"),
        (torch.inf, "class_weight_length must be .* got inf"),
        (torch.nan, "class_weight_length must be .* got nan"),
        ("short", "class_weight_length must be .* got 'short'"),
        (None, "class_weight_length must be .* got None"),
    ],
)
def test_bad_lengths(length, message):
    loss = losses.ArcFaceLoss(C, D)
    before = state(loss)
    with pytest.raises(ValueError, match=message):
        shorten_class_weights(loss, length)
    assert same(before, loss.state_dict())


# In the losses that wrap one.


@every_wrapper
@pytest.mark.parametrize(("given", "expected"), [({}, DEFAULT), ({"class_weight_length": 0.3}, 0.3)])
def test_every_wrapper_shortens(name, given, expected):
    loss = losses.ArcFaceLoss(C, D)
    assert WRAPPERS[name](loss, **given).loss is loss
    torch.testing.assert_close(lengths(loss), torch.full((C,), expected))


@every_wrapper
def test_none_leaves_class_weights_as_they_are(name):
    loss = losses.ArcFaceLoss(C, D)
    before = state(loss)
    WRAPPERS[name](loss, class_weight_length=None)
    assert same(before, loss.state_dict())


@every_wrapper
def test_bad_lengths_are_refused_by_every_wrapper(name):
    with pytest.raises(ValueError, match=r"class_weight_length must be .* above 0, got 0"):
        WRAPPERS[name](losses.ArcFaceLoss(C, D), class_weight_length=0)


@every_wrapper
@pytest.mark.parametrize("other", ["large_margin", "regularised"])
def test_every_wrapper_leaves_lengths_that_count(name, other):
    loss = OTHERS[other]()
    before = state(loss)
    WRAPPERS[name](loss)
    assert same(before, loss.state_dict())


REFUSED = {
    "bct": lambda loss: BCTLoss(loss, torch.nn.Linear(D, C)),
    "bct_weight": lambda loss: BCTLoss(loss, FrozenClassifier(torch.eye(3, D)), -1.0),
    "unibct": lambda loss: UniBCTLoss(loss, CENTERS, -1.0),
    "lce": lambda loss: LCELoss(loss, ClassCenters(torch.eye(3, D + 1), torch.arange(3))),
    "mixbct": lambda loss: MixBCTLoss(loss, share=2),
    "nccl": lambda loss: NCCLLoss(loss, 0, embedding_size=D),
    "compatible": lambda loss: CompatibleLoss(loss, FCTLoss(), -1.0),
    "bt2": lambda loss: BT2Loss(loss, torch.nn.Linear(D, D), CENTERS),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_construction_leaves_the_task_loss_as_it_was(name):
    loss = losses.ArcFaceLoss(C, D)
    before = state(loss)
    with pytest.raises(ValueError, match=r"must be|width|wide"):
        REFUSED[name](loss)
    assert same(before, loss.state_dict())


def test_a_loss_of_ones_own_is_shortened_once_it_is_made():
    """Whatever its __init__ does after that of its base; what is refused leaves the loss as it was."""
    task, seen = losses.NormalizedSoftmaxLoss(C, D), []

    class Own(BCTLoss):
        def __init__(self, loss, old, refuse):
            super().__init__(loss, old)
            seen.append(lengths(loss))
            if refuse:
                raise ValueError("refused")

    before = lengths(task)
    with pytest.raises(ValueError, match="refused"):
        Own(task, CENTERS, True)
    assert lengths(task).equal(before) and seen[0].equal(before)
    Own(task, CENTERS, False)
    assert seen[1].equal(before)
    torch.testing.assert_close(lengths(task), torch.full_like(before, DEFAULT))
