import copy
import io
import math
import pickle

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers
from torch.nn.functional import normalize

from pml_compat.frozen import ClassCenters, FrozenClassifier, WithinClassWhitening
from pml_compat.heads import BasisTransformation, CompatibleHead
from pml_compat.losses import (
    CompatibleHeadLoss,
    CrossModelLoss,
    CSDLoss,
    D3StillLoss,
    FocalDistillationLoss,
    GatheredLoss,
    LwFLoss,
    PointAlignmentLoss,
    RAMLLoss,
    SSPLoss,
)
from pml_compat.trainers import CompatibleMetricLossOnly
from tests import reference
from tests.pairwise import pairwise

IN, OLD, FREE, CLASSES = 6, 5, 4, 6
TERMS = ["task_loss", "point_loss", "contrast_loss"]
WEIGHTS = (10.0, 5.0)  # by default
PARTS = slice(OLD), slice(OLD, 2 * OLD)  # of the two terms, in a head that has a part for each
every_space = pytest.mark.parametrize("whitened", [True, False])


def build_head(dtype=torch.float64, whitened=True, parts=2, **kwargs):
    torch.manual_seed(0)
    old = torch.randn(40, OLD) * torch.linspace(0.3, 1.5, OLD)
    whitening = WithinClassWhitening.from_embeddings(old, torch.arange(40) % 4) if whitened else None
    free = torch.nn.Linear(IN, FREE)
    head = CompatibleHead(IN, OLD, free, whitening=whitening, hidden_features=7, parts=parts, **kwargs)
    return head.to(dtype)


def task(dtype=torch.float64):
    torch.manual_seed(1)
    return losses.NormalizedSoftmaxLoss(CLASSES, FREE, temperature=0.5).to(dtype)


def build(weights=None, dtype=torch.float64, whitened=True, task_loss=None, parts=2, **kwargs):
    """Return the loss with the terms that it has by itself; ``weights`` in their order."""
    given = weights and dict(zip(TERMS[1:], weights, strict=True))
    head = build_head(dtype, whitened, parts=parts)
    return CompatibleHeadLoss(task_loss or task(dtype), head, weights=given, **kwargs)


def batch(seed=0, n=10, dtype=torch.float64, parts=2):
    """Return what the head gives, at any length, labels, and the old embeddings."""
    generator = torch.Generator().manual_seed(seed)
    widths = parts * OLD + FREE, OLD
    z, old = (torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype) for width in widths)
    return z.requires_grad_(), torch.arange(n) % CLASSES, old


def naive_targets(head, old):
    """Return where the compatible part should lie, written from the formula."""
    targets = [reference.unit(row) for row in old.double().numpy()]
    if head.whitening is None:
        return targets
    mean, matrix = (tensor.double().numpy() for tensor in head.whitening.buffers())
    return [reference.unit((row - mean) @ matrix) for row in targets]


def mean(values):
    return sum(values) / len(values)


# Values.


@pairwise
@every_space
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("weights", [None, (0.5, 0.0), (0.0, 3.0), (2.0, 0.7)])
@pytest.mark.parametrize(("n", "parts"), [(10, 2), (16, 2), (10, 1)])
def test_matches_naive_loop(whitened, seed, weights, n, parts):
    z, labels, old = batch(seed, n, parts=parts)
    loss_func = build(weights, whitened=whitened, parts=parts)
    loss = loss_func(z, labels, ref_emb=old)
    expected = loss_func.loss(z[:, parts * OLD :], labels).item()
    assert loss_func.terms["task_loss"].item() == pytest.approx(expected, rel=1e-9)
    rows, targets = z.detach().numpy(), naive_targets(loss_func.head, old)
    added = [
        reference.compatible_head_terms(rows[:, PARTS[m if parts == 2 else 0]], targets, labels.tolist(), 0.1)[m]
        for m in range(2)
    ]
    for name, weight, values in zip(TERMS[1:], weights or WEIGHTS, added, strict=True):
        assert loss_func.terms[name].item() == pytest.approx(weight * mean(values), rel=1e-6)
        expected += weight * mean(values)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "distance",
    [distances.LpDistance(), distances.CosineSimilarity(), distances.LpDistance(normalize_embeddings=False)],
)
def test_pair_losses_of_either_distance_direction_as_task(distance):
    z, labels, old = batch(n=16)
    positive, negative = (0.1, 0.8) if not distance.is_inverted else (0.8, 0.1)
    task_loss = losses.ContrastiveLoss(positive, negative, distance=distance)
    loss_func = build(task_loss=task_loss)
    loss_func(z, labels, ref_emb=old)
    torch.testing.assert_close(loss_func.terms["task_loss"], task_loss(z[:, 2 * OLD :], labels).detach())


def test_by_hand():
    head = CompatibleHead(2, 2, parts=1)
    task_loss = losses.NormalizedSoftmaxLoss(2, 2, temperature=1.0)
    torch.nn.init.eye_(task_loss.W)
    loss_func = CompatibleHeadLoss(task_loss, head, weights={"point_loss": 3.0, "contrast_loss": 2.0})
    # n(p) is (0, 1) and (1, 0), n(f) is (1, 0) twice
    z, labels = torch.tensor([[0.0, 7.0, 9.0, 0.0], [5.0, 0.0, 1.0, 0.0]]), torch.tensor([1, 0])
    old = torch.tensor([[3.0, 4.0], [0.0, 1.0]])  # t is (0.6, 0.8) and (0, 1)
    loss = loss_func(z, labels, ref_emb=old)
    found = [loss_func.terms[name].item() for name in TERMS]
    # The cosines are 0.8 with the own and 1 with the other, and 0 with the own and 0.6 with the other, over 0.1.
    assert found == pytest.approx(
        [
            (math.log(1 + math.e) + math.log(1 + math.exp(-1))) / 2,
            3 * (0.36 + 0.04 + 1 + 1) / 2,
            2 * (math.log(1 + math.exp(2)) + math.log(1 + math.exp(6))) / 2,
        ]
    )
    assert loss.item() == pytest.approx(sum(found))
    # Whitened: n(o) = (0.6, 0.8), less the mean (0, 0.3) is (0.6, 0.5), times the matrix (1.2, 0.5), at length 1 / 1.3.
    head.whitening = WithinClassWhitening(torch.tensor([0.0, 0.3]), torch.diag(torch.tensor([2.0, 1.0])))
    loss_func(z[:1], labels[:1], ref_emb=old[:1])
    assert loss_func.terms["point_loss"].item() == pytest.approx(3 * ((12 / 13) ** 2 + (8 / 13) ** 2))


@every_space
def test_lengths_of_old_embeddings_and_of_the_part_do_not_matter(whitened):
    z, labels, old = batch()
    loss_func = build(whitened=whitened)
    expected = loss_func(z, labels, ref_emb=old)
    longer = torch.cat([30 * z[:, :OLD], 7 * z[:, PARTS[1]], z[:, 2 * OLD :]], 1)
    torch.testing.assert_close(loss_func(longer, labels, ref_emb=0.01 * old), expected)


@every_space
def test_a_head_on_its_target_has_no_point_loss(whitened):
    z, labels, old = batch()
    loss_func = build(whitened=whitened)
    reached = torch.cat([loss_func.head.target(old), z[:, OLD:]], 1)  # its first part
    loss_func(reached, labels, ref_emb=old)
    assert loss_func.terms["point_loss"] < 1e-12


@pytest.mark.parametrize(
    "old_loss",
    [
        PointAlignmentLoss(3.0, threshold=0.1, squared=False),
        LwFLoss(FrozenClassifier(torch.randn(3, OLD, dtype=torch.float64), kind="cosine")),
        FocalDistillationLoss(),
        CrossModelLoss(losses.TripletMarginLoss(), symmetric=True),
    ],
)
@every_space
def test_other_old_losses_see_the_part_and_the_targets(old_loss, whitened):
    z, labels, old = batch(parts=1)
    head = build_head(whitened=whitened, parts=1)
    expected = old_loss(z[:, :OLD], labels, ref_emb=head.target(old))
    loss_func = CompatibleHeadLoss(task(), head, old_loss, 0.5)
    loss = loss_func(z, labels, ref_emb=old)
    torch.testing.assert_close(loss_func.terms["old_loss"], 0.5 * expected.detach())
    torch.testing.assert_close(loss, loss_func.loss(z[:, OLD:], labels) + 0.5 * expected)
    once = CompatibleHeadLoss(task(), head, {"a": old_loss})
    once(z, labels, ref_emb={"a": old})
    torch.testing.assert_close(once.terms["a"], expected.detach())


@every_space
def test_each_old_loss_has_a_part_of_its_own_in_their_order(whitened):
    z, labels, old = batch(parts=3)
    head = build_head(whitened=whitened, parts=3)
    old_losses = {"b": PointAlignmentLoss(2.0), "a": PointAlignmentLoss(3.0, 0.1), "c": FocalDistillationLoss()}
    loss_func = CompatibleHeadLoss(task(), head, old_losses)
    loss_func(z, labels, ref_emb=old)
    for (name, old_loss), start in zip(old_losses.items(), (0, OLD, 2 * OLD), strict=True):
        expected = old_loss(z[:, start : start + OLD], labels, ref_emb=head.target(old))
        torch.testing.assert_close(loss_func.terms[name], expected.detach())


def test_one_weight_for_both_terms():
    z, labels, old = batch()
    torch.testing.assert_close(
        CompatibleHeadLoss(task(), build_head(), weights=0.3)(z, labels, ref_emb=old),
        build((0.3, 0.3))(z, labels, ref_emb=old),
    )


@every_space
@pytest.mark.parametrize(("weights", "parts"), [(None, 2), ((0.3, 4.0), 1)])
def test_items_without_labels_have_the_point_loss_alone(whitened, weights, parts):
    z, labels, old = batch(parts=parts)
    loss_func = build(weights, whitened=whitened, parts=parts)
    loss = loss_func.without_labels(z, old)
    targets = naive_targets(loss_func.head, old)
    points, _ = reference.compatible_head_terms(z.detach().numpy()[:, :OLD], targets, labels.tolist(), 0.1)
    assert loss.item() == pytest.approx((weights or WEIGHTS)[0] * mean(points), rel=1e-6)
    loss_func(z, labels, ref_emb=old)
    torch.testing.assert_close(loss.detach(), loss_func.terms["point_loss"])
    assert torch.autograd.gradcheck(lambda rows: loss_func.without_labels(rows, old), (z,))
    loss.backward()
    assert (z.grad.abs().sum(0) > 0).tolist() == [column < OLD for column in range(z.shape[1])]


def test_without_labels_every_point_loss_counts_with_its_own_part():
    z, _, old = batch(parts=3)
    head = build_head(parts=3)
    old_losses = {"a": PointAlignmentLoss(), "b": CrossModelLoss(losses.SupConLoss()), "c": PointAlignmentLoss(2.0)}
    loss_func = CompatibleHeadLoss(task(), head, old_losses, {"a": 1.0, "b": 5.0, "c": 0.5})
    compared, target = head.compatible_parts(z), head.target(old)
    expected = PointAlignmentLoss()(compared[0], ref_emb=target) + PointAlignmentLoss()(compared[2], ref_emb=target)
    torch.testing.assert_close(loss_func.without_labels(z, old), expected)


@pytest.mark.parametrize(
    "old_loss", [RAMLLoss(), CSDLoss(), D3StillLoss(), SSPLoss(torch.eye(OLD))], ids=lambda loss: type(loss).__name__
)
def test_a_loss_without_labels_in_the_head(old_loss):
    z, labels, old = batch(parts=1)
    head = build_head(parts=1)
    loss_func = CompatibleHeadLoss(task(), head, old_loss, {"old_loss": None})
    compared, target = head.compatible_parts(z)[0], head.target(old)
    once = old_loss(compared, ref_emb=target)
    torch.testing.assert_close(loss_func.without_labels(z, old), once)  # nothing is measured yet
    loss_func(z, labels, ref_emb=old)
    measured = loss_func.terms["old_loss"]
    torch.testing.assert_close(loss_func.without_labels(z, old).detach(), measured)
    assert not torch.isclose(measured, once.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_without_labels_in_low_precision(dtype):
    z, _, old = batch(dtype=torch.float32)
    loss_func = build(dtype=torch.float32)
    low = z.detach().to(dtype).requires_grad_()
    loss = loss_func.without_labels(low, old.to(dtype).requires_grad_())
    loss.backward()
    assert (
        low.grad.dtype == dtype
        and loss.dtype == torch.promote_types(dtype, torch.float32)
        and torch.isfinite(low.grad).all()
    )
    assert loss.item() == pytest.approx(loss_func.without_labels(z, old).item(), rel=0.02)


def test_without_labels_needs_a_term_that_reads_none():
    z, _, old = batch(parts=1)
    loss_func = CompatibleHeadLoss(task(), build_head(parts=1), CrossModelLoss(losses.SupConLoss()))
    with pytest.raises(ValueError, match=r"old_losses must have one that reads no labels, .* got \['old_loss'\]"):
        loss_func.without_labels(z, old)
    for rows, references, message in [
        (z[:, :3], old, "embeddings must be 9 wide, got width 3"),
        (z / 0, old, "embeddings must be finite, row 0"),
        (z, old[:-1], "ref_emb must be shaped like embeddings"),
        (z, old / 0, "ref_emb must be finite, row 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(parts=1).without_labels(rows, references)


@every_space
@pytest.mark.parametrize("parts", [1, 3])
def test_with_centers_each_row_is_drawn_to_its_classs_direction(whitened, parts):
    z, labels, old = batch(parts=parts)
    stored, stored_labels = torch.randn(40, OLD, dtype=torch.float64), torch.arange(40) % (CLASSES - 1)
    centers = ClassCenters.from_embeddings(stored, stored_labels)  # of all classes but the last
    loss_func = build(whitened=whitened, parts=parts, centers=centers)
    loss_func(z, labels, ref_emb=old)
    aims = naive_targets(loss_func.head, centers.directions)
    place = list(loss_func.old_losses).index("class_loss") if parts > 1 else 0
    rows = z.detach().numpy()
    part = rows[:, place * OLD : (place + 1) * OLD]
    draws = reference.direction_losses(part, labels.tolist(), dict(enumerate(aims)))
    assert len(draws) == sum(labels < CLASSES - 1) < len(z)
    assert loss_func.terms["class_loss"].item() == pytest.approx(10 * mean(draws), rel=1e-5)
    shown = rows[:, :OLD], rows[:, OLD : 2 * OLD] if parts > 1 else part
    points, contrasts = (
        reference.compatible_head_terms(own, naive_targets(loss_func.head, old), labels.tolist(), 0.1)[kind]
        for kind, own in enumerate(shown)
    )
    assert loss_func.terms["point_loss"].item() == pytest.approx(10 * mean(points), rel=1e-6)
    assert loss_func.terms["contrast_loss"].item() == pytest.approx(3 * mean(contrasts), rel=1e-6)


@pytest.mark.parametrize("flat", [None, torch.diag(torch.arange(1.0, OLD + 1))])
def test_the_head_whitens_queries_as_the_centers_say(flat):
    z, _, _ = batch(parts=1, dtype=torch.float32)
    rows = torch.randn(CLASSES, OLD, generator=torch.Generator().manual_seed(0))
    centers = ClassCenters(rows, torch.arange(CLASSES), directions=rows, whitening=flat)
    head = build_head(torch.float32, whitened=False, parts=1)
    plain = head.old_part(z)
    CompatibleHeadLoss(task(torch.float32), head)  # without centres nobody knows
    assert head.old_part(z).equal(plain)
    CompatibleHeadLoss(task(torch.float32), head, centers=centers)
    asked = plain if flat is None else torch.nn.functional.normalize(plain @ flat, dim=1)
    torch.testing.assert_close(head.old_part(z), asked)
    own = build_head(torch.float32, whitened=True, parts=1)  # it whitens in its own way
    before = own.old_part(z)
    CompatibleHeadLoss(task(torch.float32), own, centers=centers)
    assert own.old_part(z).equal(before) and own.query_whitening is None


def test_classes_without_a_direction_draw_nothing():
    z, labels, old = batch(parts=1)
    loss_func = build(parts=1, centers=(old, labels + 50), dtype=torch.float64)
    loss_func(z, labels, ref_emb=old)
    assert loss_func.terms["class_loss"] == 0


# Gradients.


@every_space
@pytest.mark.parametrize("weights", [(0.7, 0.0), (0.0, 1.3), (0.0, 0.0)])
def test_gradcheck(whitened, weights):
    z, labels, old = batch(n=7)  # of 6 classes
    loss_func = build(weights, whitened=whitened)
    assert torch.autograd.gradcheck(lambda rows: loss_func(rows, labels, ref_emb=old), (z,))


def test_who_learns_and_who_does_not():
    _, labels, old = batch()
    u = torch.randn(10, IN, dtype=torch.float64, requires_grad=True)
    old.requires_grad_()
    loss_func = build()
    loss_func(loss_func.head(u), labels, ref_emb=old * 1.0).backward()
    assert old.grad is None and u.grad.abs().sum() > 0
    assert {name for name, _ in loss_func.named_parameters()} == {"loss.W"}
    for name, parameter in [*loss_func.named_parameters(), *loss_func.head.named_parameters()]:
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("old_losses", [None, losses.ContrastiveLoss(), CrossModelLoss(losses.SupConLoss())])
def test_old_embeddings_receive_nothing_whatever_the_old_loss(old_losses):
    z, labels, old = batch()
    head = build_head(parts=2 if old_losses is None else 1)
    z = torch.randn(len(z), head.out_features, dtype=torch.float64, requires_grad=True)
    CompatibleHeadLoss(task(), head, old_losses)(z, labels, ref_emb=old.requires_grad_()).backward()
    assert old.grad is None and z.grad.abs().sum() > 0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_at_0_the_trunks_gradient_is_bit_by_bit_that_without_the_head(share):
    _, labels, old = batch()
    trunk = torch.nn.Linear(3, IN).double()
    loss_func = CompatibleHeadLoss(task(), build_head(trunk_gradient=share))
    u = trunk(torch.randn(10, 3).double())
    with_head = torch.autograd.grad(loss_func(loss_func.head(u), labels, ref_emb=old), trunk.weight, retain_graph=True)
    without = torch.autograd.grad(loss_func.loss(loss_func.head.free(u), labels), trunk.weight)
    assert with_head[0].equal(without[0]) == (share == 0)


@pytest.mark.parametrize("name", TERMS)
def test_each_term_reaches_its_part_alone(name):
    z, labels, old = batch()
    found = build(reducer=reducers.DoNothingReducer())(z, labels, ref_emb=old)
    (grad,) = torch.autograd.grad(found[name]["losses"], z)
    reached = grad.abs().sum(0) > 0
    columns = {"task_loss": slice(2 * OLD, None), "point_loss": PARTS[0], "contrast_loss": PARTS[1]}[name]
    assert reached[columns].all() and reached.sum() == reached[columns].sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["zero part", "zero old", "equal"])
@every_space
def test_finite_gradient_at_zero_and_at_equal_rows(dtype, case, whitened):
    z, labels, old = batch(dtype=torch.float32)
    # In float16 PML's contrast loss has an infinite slope at a row of 0, which is 1 / 1e-12 in float32.
    weights = (10.0, 0.0) if case == "zero part" and dtype == torch.float16 else None
    loss_func = build(weights, dtype=torch.float32, whitened=whitened)
    z = z.detach().to(dtype)
    if case == "zero part":
        z[2, : 2 * OLD] = 0
    elif case == "zero old":
        old[2] = 0
    else:
        z[:, PARTS[0]] = z[:, PARTS[1]] = loss_func.head.target(old).to(dtype)
    z.requires_grad_()
    loss = loss_func(z, labels, ref_emb=old.to(dtype))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(z.grad).all()
    if weights is not None:
        assert z.grad[2, : 2 * OLD].abs().max() == 0
    if case == "equal":
        assert loss_func.terms["point_loss"] < 1e-2


# Dtypes, ownership, PML's machinery.


@pairwise
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@every_space
def test_dtypes(dtype, autocast, whitened):
    z, labels, old = batch(dtype=torch.float32)
    loss_func = build(dtype=torch.float32, whitened=whitened)
    expected = loss_func(z, labels, ref_emb=old)
    low = z.detach().to(dtype).requires_grad_()
    before = {name: tensor.dtype for name, tensor in loss_func.state_dict().items()}
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = loss_func(low, labels, ref_emb=old.half())
    loss.backward()
    assert (
        low.grad.dtype == dtype
        and loss.dtype == torch.promote_types(dtype, torch.float32)
        and torch.isfinite(low.grad).all()
    )
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    if dtype != torch.float64:  # PML itself turns its weights to float64 for float64 embeddings
        assert {name: tensor.dtype for name, tensor in loss_func.state_dict().items()} == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_space
def test_targets_of_low_old_embeddings_are_of_float32(dtype, whitened):
    z, labels, old = batch(dtype=torch.float32)
    loss_func, old = build(dtype=torch.float32, whitened=whitened), old.to(dtype)
    assert loss_func(z, labels, ref_emb=old).equal(loss_func(z, labels, ref_emb=old.float()))
    assert loss_func(z, labels, ref_emb=old).equal(loss_func(z, labels, ref_emb=old.float().numpy()))


def test_the_head_is_the_models_alone():
    loss_func = build()
    model = torch.nn.Sequential(torch.nn.Linear(3, IN).double(), loss_func.head)
    assert {name for name, _ in loss_func.named_parameters()} == {"loss.W"}
    assert set(loss_func.state_dict()) == {"loss.W"}
    assert loss_func.head not in set(loss_func.modules())
    parameters = [*model.parameters(), *loss_func.parameters()]
    assert len({id(parameter) for parameter in parameters}) == len(parameters)
    torch.optim.SGD([{"params": model.parameters()}, {"params": loss_func.parameters()}], lr=0.1)
    loss_func.eval().requires_grad_(False)
    loss_func.float()
    assert all(p.requires_grad and p.dtype == torch.float64 for p in model.parameters()) and model[1].training
    assert loss_func.loss.W.dtype == torch.float32
    model.float()
    assert loss_func.head is model[1] and loss_func.head.whitening.matrix.dtype == torch.float32


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_model_and_loss_belong_together(duplicate):
    z, labels, old = batch()
    loss_func = build()
    expected = loss_func(z, labels, ref_emb=old)
    model, copied = duplicate((torch.nn.Sequential(loss_func.head), loss_func))
    assert copied.head is model[0] and copied.head is not loss_func.head
    alone = duplicate(loss_func)
    assert alone.head is not loss_func.head and alone(z, labels, ref_emb=old).equal(expected)
    copied.head.whitening.matrix.copy_(torch.eye(OLD))
    assert not copied(z, labels, ref_emb=old).equal(expected)
    assert loss_func(z, labels, ref_emb=old).equal(expected)


def test_state_dict_round_trip():
    z, labels, old = batch()
    source, target = build(), build()
    with torch.no_grad():
        source.loss.W.mul_(-1)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    assert not target(z, labels, ref_emb=old).equal(source(z, labels, ref_emb=old))
    target.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert target(z, labels, ref_emb=old).equal(source(z, labels, ref_emb=old))


def test_rows_in_another_order_and_labels_of_any_integer_type():
    z, labels, old = given = batch()
    expected, order = build()(z, labels, ref_emb=old), torch.randperm(len(z))
    permuted = [part[order] for part in given]
    torch.testing.assert_close(build()(*permuted[:2], ref_emb=permuted[2]), expected)
    for other in (labels.clone(), labels.int(), labels.to(torch.uint8)):
        torch.testing.assert_close(build()(z, other, ref_emb=old, ref_labels=labels), expected)
        torch.testing.assert_close(build()(z, labels, ref_emb=old, ref_labels=other), expected)
        torch.testing.assert_close(GatheredLoss(build())(z, labels, ref_emb=old, ref_labels=other), expected)


def test_miner_tuples_reach_the_task_loss_alone():
    z, labels, old = batch(n=16)
    task_loss = losses.TripletMarginLoss()
    loss_func = build(task_loss=task_loss)
    tuples = miners.BatchHardMiner()(z[:, 2 * OLD :], labels)
    found = [
        loss_func(z, labels, indices, ref_emb=old) - task_loss(z[:, 2 * OLD :], labels, indices)
        for indices in (None, tuples)
    ]
    torch.testing.assert_close(*found)
    assert task_loss(z[:, 2 * OLD :], labels, tuples) != task_loss(z[:, 2 * OLD :], labels)


def test_other_labels_of_the_old_rows_reach_the_contrast_alone():
    z, labels, old = batch()
    loss_func = build()
    loss_func(z, labels, ref_emb=old)
    before = loss_func.terms
    loss_func(z, labels, ref_emb=old, ref_labels=labels.flip(0))
    assert [loss_func.terms[name] == before[name] for name in TERMS] == [True, True, False]


def test_no_pair_in_the_task_loss_gives_zero_with_a_gradient():
    z, _, old = batch(n=1)
    loss_func = build((0.0, 0.0), task_loss=losses.ContrastiveLoss())
    loss = loss_func(z, torch.tensor([0]), ref_emb=old)
    loss.backward()
    assert loss == 0 and z.grad.abs().max() == 0


@pytest.mark.parametrize("n", [1, 4])
def test_one_row_and_one_class(n):
    _, _, old = batch(n=n)
    loss_func = build()
    u = torch.randn(n, IN, dtype=torch.float64, requires_grad=True)
    loss = loss_func(loss_func.head.train()(u), torch.full((n,), 2), ref_emb=old)
    loss.backward()
    assert loss_func.terms["contrast_loss"] == 0  # PML's: there is no other class to be told apart from
    assert torch.isfinite(loss) and torch.isfinite(u.grad).all() and u.grad.abs().sum() > 0


def test_stats_are_the_terms():
    z, labels, old = batch()
    loss_func = build(collect_stats=True)
    loss_func(z, labels, ref_emb=old)
    for name in TERMS:
        assert getattr(loss_func, name) == loss_func.terms[name].item() > 0
    assert loss_func.sub_loss_names() == TERMS


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.randn(4, generator=torch.Generator().manual_seed(index)), index % CLASSES


def test_a_pml_trainer_with_the_head_as_embedder():
    head = build_head(torch.float32)
    loss_func = CompatibleHeadLoss(task(torch.float32), head)
    trunk = torch.nn.Linear(4, IN)
    before = copy.deepcopy({**trunk.state_dict(), **head.state_dict(), **loss_func.state_dict()})
    names = {"trunk_optimizer": trunk, "embedder_optimizer": head, "metric_loss_optimizer": loss_func}
    trainer = CompatibleMetricLossOnly(
        {"trunk": trunk, "embedder": head},
        {name: torch.optim.SGD(module.parameters(), lr=0.1) for name, module in names.items()},
        12,
        {"metric_loss": loss_func},
        Samples(),
        old_model=torch.nn.Linear(4, OLD),
        dataloader_num_workers=0,
    )
    trainer.train(num_epochs=1)
    for name, tensor in {**trunk.state_dict(), **head.state_dict(), **loss_func.state_dict()}.items():
        assert tensor.equal(before[name]) == name.startswith("whitening"), name


@every_space
def test_training_finds_the_old_space_beside_a_finished_model(whitened):
    """The old model sees one part of the inputs, in a basis of its own; the finished one sees all of them."""
    torch.manual_seed(0)
    inputs = torch.randn(60, 10)
    labels = inputs[:, 3 : 3 + CLASSES].argmax(1)
    old = inputs[:, :OLD] @ torch.nn.init.orthogonal_(torch.empty(OLD, OLD))
    finished = torch.nn.Linear(10, 16).requires_grad_(False)
    whitening = WithinClassWhitening.from_embeddings(old, labels) if whitened else None
    head = CompatibleHead(16, OLD, whitening=whitening, hidden_features=64, old_share=0)
    model = torch.nn.Sequential(finished, head)
    weights = {"point_loss": 10.0, "contrast_loss": 1.0}
    loss_func = CompatibleHeadLoss(losses.ContrastiveLoss(), head, weights=weights)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)

    def found():
        """Return how many new queries find their own item first by the first part, and their class by the mean."""
        with torch.no_grad():
            z = model.eval()(inputs)
            own = normalize(head.compatible_parts(z)[0], dim=1) @ head.target(old).t()
            scores = head.old_part(z) @ normalize(old, dim=1).t()
        right = own.argmax(1) == torch.arange(60), labels[scores.argmax(1)] == labels
        return torch.stack(right).float().mean(1)

    before = found()
    for _ in range(100):
        optimizer.zero_grad()
        loss_func(model.train()(inputs), labels, ref_emb=old).backward()
        optimizer.step()
    assert (before < 0.25).all() and found()[0] > 0.95 and found()[1] > 0.5
    assert head.whole(model(inputs)).equal(normalize(finished(inputs), dim=1))


# Errors.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": torch.nn.Linear(2, 2)}, r"head must be the model's CompatibleHead, got Linear"),
        ({"head": BasisTransformation(4, 4, 2)}, r"head must be the model's CompatibleHead, got BasisTransformation"),
        ({"loss": losses.TripletMarginLoss}, r"loss must be a PML loss object"),
        ({"loss": losses.NormalizedSoftmaxLoss(3, 7)}, r"loss must be made for the free part .* got one for width 7"),
        ({"weights": -1.0}, r"weights\['point_loss'\] must be a finite number of at least 0, got -1.0"),
        (
            {"weights": {"point_loss": 1.0}},
            r"weights must have the names of old_losses, \['contrast_loss', 'point_loss'\]",
        ),
        ({"weights": {"point_loss": 1.0, "contrast_loss": math.nan}}, r"weights\['contrast_loss'\] must be .* got nan"),
        (
            {"old_losses": PointAlignmentLoss()},
            r"head must have a part for each of the 1 old losses, or one for all, got 2; make it with parts=1",
        ),
        ({"old_losses": {}}, r"old_losses must have one loss or more, none of them named task_loss, got \[\]"),
        ({"old_losses": {"task_loss": PointAlignmentLoss()}}, r"none of them named task_loss, got \['task_loss'\]"),
        ({"old_losses": "point"}, r"old_losses must be PML loss objects, got 'point'"),
    ],
)
def test_bad_options(change, message):
    arguments = {"loss": task(), "head": build_head(whitened=False)}
    with pytest.raises(ValueError, match=message):
        CompatibleHeadLoss(**arguments | change)


Z, LABELS, ROWS = batch()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": Z[:, :FREE]}, r"embeddings must be 14 wide, got width 4"),
        ({"embeddings": Z * torch.nan}, r"embeddings must be finite, row 0"),
        ({"embeddings": Z / 0}, r"embeddings must be finite, row 0"),
        ({"embeddings": Z[:0]}, r"embeddings must not be empty"),
        ({"labels": None}, r"labels must be given, got None"),
        ({"labels": LABELS - 1}, r"labels must be in \[0, 5\], the task loss's classes, got -1"),
        ({"labels": LABELS + 1}, r"labels must be in \[0, 5\], the task loss's classes, got 6"),
        ({"labels": LABELS[:-1]}, r"labels must have one entry a row: expected 10, got 9"),
        ({"ref_labels": LABELS.float()}, r"ref_labels must be integers, got torch.float32"),
        ({"ref_emb": None}, r"ref_emb must be given: the old model's embeddings of the same items, row by row"),
        ({"ref_emb": {"point_loss": ROWS}}, r"ref_emb must have the names of old_losses, .* got \['point_loss'\]"),
        ({"ref_emb": ROWS[:-1]}, r"ref_emb must be shaped like embeddings, row i .* expected 10 rows, got 9"),
        ({"ref_emb": ROWS[:, :FREE]}, r"ref_emb must be 5 wide, got width 4"),
        ({"ref_emb": ROWS / 0}, r"ref_emb must be finite, row 0"),
        ({"ref_emb": ROWS.long()}, r"ref_emb must be floating point, got torch.int64"),
        ({"ref_emb": "rows"}, r"ref_emb must be a torch.Tensor or a numpy.ndarray, got str"),
    ],
)
def test_bad_calls(change, message):
    arguments = {"embeddings": Z, "labels": LABELS, "ref_emb": ROWS}
    with pytest.raises(ValueError, match=message):
        build()(**arguments | change)


def test_wrong_device():
    loss_func = build()
    loss_func.head.to("meta")
    with pytest.raises(ValueError, match=r"ref_emb must be on the device of the head: got cpu and meta"):
        loss_func(Z, LABELS, ref_emb=ROWS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_gives_what_the_cpu_gives(dtype):
    z, labels, old = batch(dtype=torch.float32)
    loss_func = build(dtype=torch.float32)
    expected = loss_func(z, labels, ref_emb=old)
    loss_func.head.cuda()
    loss_func.cuda()
    on_gpu = z.detach().cuda().requires_grad_()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = loss_func(on_gpu, labels, ref_emb=old.cuda())  # labels may stay, as in PML
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02) and torch.isfinite(on_gpu.grad).all()
