import copy
import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, reducers, regularizers

from pml_compat.frozen import ClassCenters, class_weights
from pml_compat.losses import LCELoss
from pml_compat.losses.boundaries import outside_boundary
from pml_compat.losses.direction_error import direction_error
from pml_compat.transformations import (
    LinearTransformation,
    OrthogonalTransformation,
    ResidualBottleneckTransformation,
    load_transformation,
)
from tests import reference
from tests.pairwise import pairwise

OLD, NEW, CLASSES = 5, 7, 6
every_form = pytest.mark.parametrize("weights", [(None, None), (100.0, 1.0)])  # drawn onto directions; the paper's

TASKS = {
    "arcface": lambda width: losses.ArcFaceLoss(CLASSES, width),
    "cosface": lambda width: losses.CosFaceLoss(CLASSES, width),
    "normalized_softmax": lambda width: losses.NormalizedSoftmaxLoss(CLASSES, width),
    "sphereface": lambda width: losses.SphereFaceLoss(CLASSES, width),
    "large_margin": lambda width: losses.LargeMarginSoftmaxLoss(CLASSES, width),
    "proxy_anchor": lambda width: losses.ProxyAnchorLoss(CLASSES, width),
    "proxy_nca": lambda width: losses.ProxyNCALoss(CLASSES, width),
    "soft_triple": lambda width: losses.SoftTripleLoss(CLASSES, width, centers_per_class=3),
    "sub_center_arcface": lambda width: losses.SubCenterArcFaceLoss(
        num_classes=CLASSES, embedding_size=width, sub_centers=2
    ),
    "p2s_grad": lambda width: losses.P2SGradLoss(width, CLASSES),
}


def task(name="arcface", width=NEW, seed=0):
    torch.manual_seed(seed)
    return TASKS[name](width).double()


def batch(seed=0, n=12, width=NEW, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, width, generator=generator, dtype=dtype).requires_grad_()
    return embeddings, torch.randint(CLASSES, (n,), generator=generator)


def centers(width=NEW, labels=range(CLASSES), seed=3, counts=None):
    generator = torch.Generator().manual_seed(seed)
    n = len(labels)
    directions = torch.randn(n, width, generator=generator, dtype=torch.float64)
    boundaries = torch.rand(n, generator=generator, dtype=torch.float64) * 1.5
    counts = torch.full((n,), 9) if counts is None else torch.tensor(counts)
    return ClassCenters(directions, torch.tensor(list(labels)), boundaries, counts)


MAPS = {
    "direct": (NEW, False, False),
    "forward": (OLD, True, False),
    "backward": (OLD, False, True),
    "both": (OLD, True, True),
}


def maps(mode, kind="linear"):
    """Return the old width and both transformations, none of them at its initial values."""
    width, forward, backward = MAPS[mode]
    torch.manual_seed(5)

    def build(d_in, d_out):
        if kind == "orthogonal":
            transformation = OrthogonalTransformation(d_in, d_out)
            torch.nn.init.normal_(transformation.generator)
        elif kind == "residual":
            transformation = ResidualBottleneckTransformation(d_in, d_out, 3, 2, 2).eval()
            for parameter in transformation.parameters():
                torch.nn.init.normal_(parameter)
        else:
            transformation = LinearTransformation(d_in, d_out)
            torch.nn.init.normal_(transformation.linear.weight)
            torch.nn.init.normal_(transformation.linear.bias)
        return transformation.double()

    return width, build(OLD, NEW) if forward else None, build(NEW, OLD) if backward else None


def naive_terms(embeddings, labels, weights, old, align, weight, kind, forward, backward):
    """Alignment and boundary term by single rows; classes of one sample have a centre and no boundary."""

    def apply(transformation):
        if transformation is None:
            return None
        return lambda row: transformation(torch.from_numpy(row)[None]).detach().numpy()[0]

    rows = {int(label): old.centers[i].numpy() for i, label in enumerate(old.labels)}
    directions = [reference.unit(weights[label].numpy()) for label in rows]
    alignment = reference.lce_alignment(directions, list(rows.values()), apply(forward), apply(backward))
    bounded = {
        int(label): float(boundary)
        for label, boundary, count in zip(old.labels, old.boundaries, old.counts, strict=True)
        if count > 1
    }
    points = [reference.unit(e) for e in embeddings.detach().numpy()]
    if backward is not None:
        points = [apply(backward)(p) for p in points]
    elif forward is not None:
        rows = {label: apply(forward)(center) for label, center in rows.items()}
    return align * alignment, weight * reference.lce_boundary(points, labels.tolist(), rows, bounded, kind)


def check_against_naive(mode, map_kind, name, kind, align, weight, seed, old_labels=range(CLASSES), counts=None):
    embeddings, labels = batch(seed)
    width, forward, backward = maps(mode, map_kind)
    task_loss, old = task(name, seed=seed), centers(width, old_labels, counts=counts)
    untouched = copy.deepcopy(task_loss)
    loss_func = LCELoss(task_loss, old, align, weight, kind, forward, backward)
    loss = loss_func(embeddings, labels)
    # what the user's loss was before we had it: no term may depend on what we did to its weights
    weights = class_weights(untouched).detach()
    terms = naive_terms(embeddings, labels, weights, old, align, weight, kind, forward, backward)
    expected = untouched(embeddings, labels).item(), *terms
    got = [loss_func.terms[name].item() for name in ("task_loss", "align_loss", "boundary_loss")]
    exact = 1e-5 if name == "p2s_grad" else 1e-9  # PML adds a small constant to its lengths
    assert got == pytest.approx(expected, rel=exact, abs=1e-12)
    assert loss.item() == pytest.approx(sum(expected), rel=exact)


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mode", MAPS)
@pytest.mark.parametrize("map_kind", ["linear", "orthogonal", "residual"])
@pytest.mark.parametrize("kind", ["angle", "cosine"])
def test_matches_naive_loop(seed, mode, map_kind, kind):
    check_against_naive(mode, map_kind, "arcface", kind, 100.0, 1.0, seed)


@pairwise
@pytest.mark.parametrize("align", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("weight", [0.0, 2.5])
@pytest.mark.parametrize("mode", MAPS)
def test_weights_of_the_terms(align, weight, mode):
    check_against_naive(mode, "linear", "arcface", "angle", align, weight, 0)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("mode", MAPS)
def test_class_weight_of_every_loss(name, mode):
    """Proxy losses: the proxy. Sub-centre losses: the mean of the class's unit sub-centres."""
    check_against_naive(mode, "linear", name, "angle", 100.0, 1.0, 0)


@pytest.mark.parametrize("mode", MAPS)
def test_classes_without_centre_or_of_one_sample(mode):
    with pytest.warns(UserWarning, match="LCELoss leaves out"):
        check_against_naive(mode, "linear", "arcface", "angle", 100.0, 1.0, 0, [4, 0, 3], [5, 1, 2])


def test_sub_centre_class_weight_by_hand():
    loss = losses.SubCenterArcFaceLoss(num_classes=2, embedding_size=2, sub_centers=2)
    with torch.no_grad():  # class 0: along x and along y, of lengths 5 and 1; class 1: twice along -x
        loss.W.copy_(torch.tensor([[5.0, 0.0, -1.0, -3.0], [0.0, 1.0, 0.0, 0.0]]))
    old = ClassCenters(torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), torch.arange(2))
    loss_func = LCELoss(loss, old, 100.0, boundary_weight=0.0)
    loss_func(torch.ones(1, 2), torch.tensor([0]))
    assert loss_func.terms["align_loss"].item() == pytest.approx(0.0, abs=1e-4)


def test_by_hand():
    loss = losses.NormalizedSoftmaxLoss(2, 2, temperature=1.0)
    with torch.no_grad():
        loss.W.copy_(3 * torch.eye(2))
    old = ClassCenters(torch.tensor([[0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 1]), torch.tensor([0.5, 0.0]))
    embeddings, labels = torch.tensor([[2.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 1])
    loss_func = LCELoss(loss, old, align_weight=8.0, boundary_weight=4.0)
    loss_func(embeddings, labels)
    # weights (1,0), (0,1) against centres (0,1), (0,1): squared differences 1, 1, 0, 0
    assert loss_func.terms["align_loss"].item() == pytest.approx(8.0 * 2 / 4)
    # the first is a right angle from its centre, 0.5 allowed; the second on its centre, but for the clamp at 1 - 1e-6
    clamp = math.acos(1 - 1e-6)
    assert loss_func.terms["boundary_loss"].item() == pytest.approx(4 * (math.pi / 2 - 0.5 + clamp) / 2, rel=1e-4)
    by_cosine = LCELoss(loss, old, align_weight=8.0, boundary_weight=4.0, boundary="cosine")
    by_cosine(embeddings, labels)
    assert by_cosine.terms["boundary_loss"].item() == pytest.approx(4 * math.cos(0.5) / 2, rel=1e-6)


@pytest.mark.parametrize("mode", MAPS)
@pytest.mark.parametrize("kind", ["angle", "cosine"])
def test_gradcheck_in_embeddings_and_weights(mode, kind):
    embeddings, labels = batch(n=5)
    width, forward, backward = maps(mode)
    loss_func = LCELoss(task(), centers(width), 3.0, 2.0, kind, forward, backward, reducer=reducers.DoNothingReducer())
    parameters = [p for p in loss_func.parameters()]

    def terms(e, *_):
        found = loss_func(e, labels)
        boundary = found["boundary_loss"]["losses"]
        return found["align_loss"]["losses"].sum() + boundary.sum()

    assert (terms(embeddings) > 0).all()
    assert torch.autograd.gradcheck(terms, (embeddings, *parameters))


@pytest.mark.parametrize("mode", MAPS)
def test_gradient_reaches_what_learns_and_nothing_old(mode):
    embeddings, labels = batch()
    width, forward, backward = maps(mode)
    loss_func = LCELoss(task(), centers(width), 100.0, 1.0, "angle", forward, backward)
    before = {name: buffer.clone() for name, buffer in loss_func.named_buffers()}
    optimizer = torch.optim.SGD(loss_func.parameters(), lr=1.0)
    loss_func(embeddings, labels).backward()
    optimizer.step()
    names = {name.split(".")[0] for name, _ in loss_func.named_parameters()}
    wanted = {"loss"} | ({"forward_transformation"} if forward else set())
    assert names == wanted | ({"backward_transformation"} if backward else set())
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss_func.parameters())
    assert embeddings.grad.abs().sum() > 0
    for name, buffer in loss_func.named_buffers():
        assert name.startswith("old_") and not buffer.requires_grad and buffer.equal(before[name])


@pytest.mark.parametrize("mode", MAPS)
@pytest.mark.parametrize("kind", ["angle", "cosine"])
def test_gradient_is_finite_at_the_centres_and_at_zero(mode, kind):
    width, forward, backward = maps(mode)
    old, task_loss = centers(width), task("normalized_softmax")
    loss_func = LCELoss(task_loss, old, 100.0, 1.0, kind, forward, backward)
    start = old.centers if mode == "direct" else torch.ones(CLASSES, NEW, dtype=torch.float64)
    with torch.no_grad():
        task_loss.W.copy_(start.t())
        task_loss.W[:, 0] = 0.0
    embeddings = torch.cat([start, -start, torch.zeros(CLASSES, NEW, dtype=torch.float64)]).requires_grad_()
    loss_func(embeddings, torch.arange(CLASSES).repeat(3)).backward()
    assert torch.isfinite(embeddings.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in loss_func.parameters())


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_direction_error_in_blocks(rows, layout, monkeypatch):
    monkeypatch.setattr("pml_compat.losses.direction_error._BLOCK_ELEMENTS", {"cpu": 4 * rows, "cuda": 4 * rows})
    torch.manual_seed(0)
    weights = torch.randn(10, 4) if layout == "rows" else torch.randn(4, 10).t()
    weights = weights.requires_grad_()
    directions = torch.nn.functional.normalize(torch.randn(10, 4), dim=1)
    error = direction_error(weights, directions)
    expected = (torch.nn.functional.normalize(weights, dim=1) - directions).square().mean()
    torch.testing.assert_close(error, expected)
    (gradient,) = torch.autograd.grad(3 * error, weights)
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * expected, weights)[0])


def test_a_weight_of_length_zero_counts_as_zero():
    weights = torch.tensor([[0.0, 0.0], [2.0, 0.0]], requires_grad=True)
    error = direction_error(weights, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert error.item() == pytest.approx(1 / 4)
    error.backward()
    assert weights.grad.equal(torch.zeros(2, 2))


def test_outside_boundary_by_hand():
    cosines = torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    boundaries = torch.tensor([1.0, 0.0, 4.0, 1.0], dtype=torch.float64)
    outside = outside_boundary(cosines, boundaries, "angle")
    expected = [math.pi / 2 - 1, math.acos(1 - 1e-6), 0.0, math.pi / 3 - 1]
    np.testing.assert_allclose(outside, expected, atol=1e-9)


# What is done to the task loss, and how.


def lengths(loss):
    return class_weights(loss).detach().norm(dim=1)


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("large_margin", "soft_triple")])
def test_class_weights_start_short(name):
    task_loss = task(name)
    parameters = list(task_loss.parameters())
    LCELoss(task_loss, centers())
    if name != "sub_center_arcface":
        torch.testing.assert_close(lengths(task_loss), torch.ones(CLASSES, dtype=torch.float64))
    assert all(one is other for one, other in zip(parameters, task_loss.parameters(), strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: task("large_margin"),  # the lengths are in its logits
        lambda: losses.ArcFaceLoss(CLASSES, NEW, weight_regularizer=regularizers.LpRegularizer()),
    ],
)
def test_lengths_that_matter_stay(make):
    task_loss = make()
    before = copy.deepcopy(task_loss.state_dict())
    LCELoss(task_loss, centers())
    assert task_loss.W.equal(before["W"])


def test_lengths_stay_where_the_user_says_so():
    task_loss = task()
    before = task_loss.W.detach().clone()
    LCELoss(task_loss, centers(), class_weight_length=None)
    assert task_loss.W.equal(before)


def test_short_weights_turn_to_the_centres():
    """Why the lengths are changed: what the docstring says."""

    def degrees_left(length):
        torch.manual_seed(0)
        embeddings, labels = batch(n=64, width=64, dtype=torch.float32)
        old = ClassCenters(torch.randn(CLASSES, 64), torch.arange(CLASSES))
        task_loss = losses.NormalizedSoftmaxLoss(CLASSES, 64, temperature=1.0)
        loss_func = LCELoss(task_loss, old, 100.0, boundary_weight=0.0, class_weight_length=length)
        optimizer = torch.optim.Adam(loss_func.parameters(), lr=2e-3)
        for _ in range(300):
            optimizer.zero_grad()
            loss_func(embeddings.detach(), labels).backward()
            optimizer.step()
        weights = torch.nn.functional.normalize(class_weights(task_loss).detach(), dim=1)
        return (weights * old.centers).sum(1).arccos().rad2deg().mean()

    assert degrees_left(0.1) < 15 < 60 < degrees_left(None)


# Reports.


def test_reports_what_is_left_out():
    message = (
        r"LCELoss leaves out, of 6 classes, 3 without a centre \(neither aligned nor bounded\): 1, 2, 5; "
        r"1 of one sample \(not bounded\): 0"
    )
    with pytest.warns(UserWarning, match=message):
        loss_func = LCELoss(task(), centers(labels=[4, 0, 3], counts=[5, 1, 2]))
    assert loss_func.classes_without_center == [1, 2, 5]
    assert loss_func.classes_without_boundary == [0]


def test_long_reports_are_cut():
    task_loss = losses.ArcFaceLoss(30, NEW)
    with pytest.warns(UserWarning, match=r"of 30 classes, 24 without .*: 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, \.\.\."):
        LCELoss(task_loss, centers())


def test_stats():
    embeddings, labels = batch(n=12)
    labels = torch.tensor([0, 1, 2, 3] * 3)
    with pytest.warns(UserWarning):
        loss_func = LCELoss(task(), centers(labels=[0, 1, 2], counts=[5, 1, 5]), 100.0, 1.0, collect_stats=True)
    loss_func(embeddings, labels)
    assert loss_func.bounded_fraction == pytest.approx(6 / 12)
    losses_outside = naive_outside(embeddings, labels, loss_func)
    assert loss_func.outside_fraction == pytest.approx(np.mean(losses_outside))
    assert {"bounded_fraction", "outside_fraction", "align_loss"} <= set(loss_func._record_these_stats)


def naive_outside(embeddings, labels, loss_func):
    old = loss_func.old_centers
    return [
        reference.angle(e.numpy(), old.centers[row].numpy()) > float(old.boundaries[row])
        for e, label in zip(embeddings.detach(), labels.tolist(), strict=True)
        for row in [old.labels.tolist().index(label) if label in (0, 2) else None]
        if row is not None
    ]


@every_form
def test_a_batch_without_a_bounded_class(weights):
    embeddings, _ = batch()
    with pytest.warns(UserWarning):
        loss_func = LCELoss(task(), centers(labels=[0, 1]), *weights)
    loss_func(embeddings, torch.full((12,), 5)).backward()
    assert loss_func.terms["boundary_loss"] == 0 and loss_func.terms["align_loss"] > 0
    assert torch.isfinite(embeddings.grad).all()


# Pair losses have no class weights: the boundary term alone.


def test_pair_losses_with_the_boundary_alone():
    embeddings, labels = batch()
    task_loss, old = losses.ContrastiveLoss(), centers(labels=range(100, 106))
    loss_func = LCELoss(task_loss, old, align_weight=0.0, boundary_weight=1.0)
    loss = loss_func(embeddings, labels + 100)
    boundaries = {int(label): float(b) for label, b in zip(old.labels, old.boundaries, strict=True)}
    rows = {int(label): old.centers[i].numpy() for i, label in enumerate(old.labels)}
    boundary = reference.lce_boundary(embeddings.detach().numpy(), (labels + 100).tolist(), rows, boundaries, "angle")
    assert loss.item() == pytest.approx(task_loss(embeddings, labels).item() + boundary, rel=1e-9)
    with pytest.raises(ValueError, match=r"loss must have class weights to align, ContrastiveLoss has none"):
        LCELoss(task_loss, old, 100.0)
    with pytest.raises(ValueError, match=r"centers must be 9 wide like the new embeddings, got width 7"):
        loss_func(torch.ones(2, 9), labels[:2] + 100)


# After the training: the transformations go elsewhere.


def test_a_trained_transformation_maps_the_gallery_elsewhere(tmp_path):
    _, forward, backward = maps("both")
    loss_func = LCELoss(task(), centers(OLD), forward_transformation=forward, backward_transformation=backward)
    gallery = torch.randn(4, OLD, dtype=torch.float64)
    loss_func.forward_transformation.save(tmp_path / "forward.safetensors")
    loaded = load_transformation(tmp_path / "forward.safetensors")
    torch.testing.assert_close(loaded(gallery), forward(gallery))
    assert loss_func.backward_transformation is backward


def test_transformations_follow_mode_device_and_state_dict():
    transformation = ResidualBottleneckTransformation(OLD, NEW)
    loss_func = LCELoss(task(), centers(OLD), forward_transformation=transformation)
    assert not loss_func.eval().forward_transformation.training and loss_func.train().forward_transformation.training
    assert any(key.startswith("forward_transformation.") for key in loss_func.state_dict())
    assert {p.device.type for p in loss_func.to("meta").forward_transformation.parameters()} == {"meta"}


@every_form
def test_batch_norm_in_a_transformation_trains_with_one_sample(weights):
    transformation = ResidualBottleneckTransformation(NEW, OLD)
    loss_func = LCELoss(task().float(), centers(OLD), *weights, backward_transformation=transformation)
    embeddings, labels = batch(n=1, dtype=torch.float32)
    loss_func.train()(embeddings, labels).backward()
    assert torch.isfinite(embeddings.grad).all()


def test_the_users_centres_stay_as_they_are():
    old = centers()
    before = old.centers.clone(), old.centers.stride()
    loss_func = LCELoss(task(), old)
    loss_func.to(torch.float32)
    assert old.centers.equal(before[0]) and old.centers.stride() == before[1]


@pairwise
@pytest.mark.parametrize("mode", MAPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_stay_what_they_are(mode, dtype, autocast):
    embeddings, labels = batch(dtype=torch.float32)
    width, forward, backward = maps(mode)
    loss_func = LCELoss(task(), centers(width), 100.0, 1.0, "angle", forward, backward).float()
    expected = loss_func(embeddings, labels)
    before = {name: tensor.dtype for name, tensor in loss_func.state_dict().items()}
    low = embeddings.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_func(low, labels)
    loss.backward()
    assert (
        low.grad.dtype == dtype
        and loss.dtype == torch.promote_types(dtype, torch.float32)
        and torch.isfinite(low.grad).all()
    )
    assert {name: tensor.dtype for name, tensor in loss_func.state_dict().items()} == before
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: ((task(), centers(), -1.0), {}), r"align_weight must be .* at least 0, got -1.0"),
        (lambda: ((task(), centers(), 1.0, float("nan")), {}), r"boundary_weight must be .* got nan"),
        (lambda: ((task(), centers()), {"class_weight_length": 0.0}), r"class_weight_length must be .* above 0, got 0"),
        (lambda: ((task(), centers(), 1.0, 1.0, "angel"), {}), r"boundary must be 'angle' or 'cosine', got 'angel'"),
        (lambda: ((task(), torch.ones(6, 7)), {}), r"centers must be a ClassCenters, got Tensor; make one with"),
        (lambda: ((losses.ArcFaceLoss, centers()), {}), r"loss must be a PML loss object"),
        (
            lambda: ((task(), ClassCenters(torch.randn(6, 7), torch.arange(6)), 100.0, 1.0), {}),
            r"centers must have boundaries, got none; measure them with boundary='max' or 'iqr', or pass bound",
        ),
        (
            lambda: ((task(), centers(labels=[0, 6])), {}),
            r"centers must have labels in \[0, 5\], the task loss's classes, got 6",
        ),
        (
            lambda: ((task(), centers(OLD)), {}),
            r"centers must be 7 wide like the new embeddings, got width 5; pass backward_transformation="
            r"LinearTransformation\(7, 5\), .* forward_transformation=LinearTransformation\(5, 7\)",
        ),
        (
            lambda: ((task(), centers(OLD)), {"forward_transformation": LinearTransformation(7, 5)}),
            r"forward_transformation must map width 5 to 7, got 7 to 5",
        ),
        (
            lambda: ((task(), centers(OLD)), {"backward_transformation": LinearTransformation(5, 7)}),
            r"backward_transformation must map width 7 to 5, got 5 to 7",
        ),
        (
            lambda: ((task(), centers(OLD)), {"forward_transformation": torch.nn.Linear(5, 7)}),
            r"forward_transformation must be one of pml_compat.transformations .*, got Linear",
        ),
    ],
)
def test_bad_construction(arguments, message):
    positional, named = arguments()
    with pytest.raises(ValueError, match=message):
        LCELoss(*positional, **named)


def test_a_refused_construction_leaves_the_task_loss_as_it_was():
    task_loss = task()
    before = task_loss.W.detach().clone()
    with pytest.raises(ValueError, match="centers must be 7 wide"):
        LCELoss(task_loss, centers(OLD))
    assert task_loss.W.equal(before)


ONES, LABELS = torch.ones(3, NEW, dtype=torch.float64), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (ONES * torch.nan, LABELS, r"embeddings must be finite, row 0"),
        (ONES[:0], LABELS[:0], r"embeddings must not be empty"),
        (ONES, None, r"labels must be given, got None"),
        (ONES, LABELS[:2], r"labels must have one entry a row: expected 3, got 2"),
        (ONES, LABELS + 4, r"labels must be in \[0, 5\], the task loss's classes, got 6"),
    ],
)
def test_bad_calls(embeddings, labels, message):
    with pytest.raises(ValueError, match=message):
        LCELoss(task(), centers())(embeddings, labels)


def test_wrong_device():
    with pytest.raises(ValueError, match=r"embeddings must be on the device of the loss: got cpu and meta"):
        loss_func = LCELoss(losses.ContrastiveLoss(), centers(), 0.0)
        loss_func.to("meta")(ONES, LABELS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", MAPS)
def test_gpu_gives_what_the_cpu_gives(mode):
    embeddings, labels = batch(dtype=torch.float32)
    width, forward, backward = maps(mode)
    loss_func = LCELoss(task(), centers(width), 100.0, 1.0, "angle", forward, backward).float()
    expected = loss_func(embeddings, labels)
    on_gpu = embeddings.detach().cuda().requires_grad_()
    loss = loss_func.cuda()(on_gpu, labels)  # labels may stay on the CPU, as in PML
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3) and torch.isfinite(on_gpu.grad).all()
