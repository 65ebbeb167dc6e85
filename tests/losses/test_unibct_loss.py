import copy
import io
import math

import pytest
import torch
from pytorch_metric_learning import losses, reducers

from pml_compat.frozen import ClassCenters
from pml_compat.frozen.prototypes import refine_prototypes
from pml_compat.losses import UniBCTLoss
from tests import reference
from tests.pairwise import pairwise

OLD, NEW, CLASSES = 5, 8, 6
every_form = pytest.mark.parametrize("weight", [None, 1.0])  # drawn onto directions, measured; the paper's


def task(width=NEW):
    torch.manual_seed(0)
    return losses.NormalizedSoftmaxLoss(CLASSES, width).double()


def batch(seed=0, n=12, width=NEW, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, width, generator=generator, dtype=dtype).requires_grad_()
    return embeddings, torch.randint(CLASSES, (n,), generator=generator)


def stored(seed=3, n=50, dtype=torch.float64):
    """Old and new embeddings of a training set, and labels."""
    generator = torch.Generator().manual_seed(seed)
    old, new = (torch.randn(n, width, generator=generator, dtype=torch.float64) for width in (OLD, NEW))
    return old.to(dtype), new.to(dtype), torch.arange(n) % CLASSES


def prototypes(labels=range(CLASSES), seed=7, dtype=torch.float64):
    rows = torch.randn(CLASSES, OLD, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    labels = list(labels)
    return ClassCenters(rows[: len(labels)], torch.tensor(labels))


def naive_influence(embeddings, labels, centers, scale, margin):
    """The mean loss of the samples with a prototype, written from the formula."""
    found = []
    rows = dict(zip(centers.labels.tolist(), centers.centers.numpy(), strict=True))
    for embedding, label in zip(embeddings.detach().numpy(), labels.tolist(), strict=True):
        if label not in rows:
            continue
        fitted = reference.fit_width(embedding, OLD)
        logits = [
            scale * math.cos(reference.angle(fitted, row) + margin * (other == label)) for other, row in rows.items()
        ]
        found.append(reference.cross_entropy(logits, list(rows).index(label)))
    return sum(found) / len(found)


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("width", [OLD, NEW, 3])
@pytest.mark.parametrize(("scale", "margin"), [(16.0, 0.0), (30.0, 0.3), (1.0, 0.1)])
@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_matches_naive_loop(seed, width, scale, margin, weight):
    embeddings, labels = batch(seed, width=width)
    centers = prototypes([4, 0, 2])
    loss_func = UniBCTLoss(task(width), centers, weight, scale=scale, margin=margin)
    loss = loss_func(embeddings, labels)
    expected = naive_influence(embeddings, labels, centers, scale, margin)
    assert loss_func.terms["influence_loss"].item() == pytest.approx(weight * expected, rel=1e-9)
    assert loss.item() == pytest.approx(loss_func.loss(embeddings, labels).item() + weight * expected, rel=1e-9)


def test_by_hand():
    centers = ClassCenters(torch.eye(2), torch.arange(2))
    for margin, value in ((0.0, math.log(1 + math.exp(-2))), (math.pi / 3, math.log(1 + math.exp(-1)))):
        loss_func = UniBCTLoss(losses.ArcFaceLoss(2, 2), centers, 1.0, scale=2.0, margin=margin)
        loss_func(torch.tensor([[3.0, 0.0]]), torch.tensor([0]))  # cosines 1 and 0; cos(pi / 3) = 1/2
        assert loss_func.terms["influence_loss"].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_gradcheck(margin):
    embeddings, labels = batch(n=4)
    loss_func = UniBCTLoss(task(), prototypes(), 0.7, margin=margin, reducer=reducers.DoNothingReducer())
    assert torch.autograd.gradcheck(lambda e: loss_func(e, labels)["influence_loss"]["losses"], (embeddings,))


@pytest.mark.parametrize("embeddings", [torch.zeros(4, OLD), prototypes(dtype=torch.float32).centers[:4]])
@pytest.mark.parametrize("margin", [0.0, 0.3])
@every_form
def test_gradient_is_finite_at_zero_rows_and_at_the_prototypes(embeddings, margin, weight):
    embeddings = embeddings.clone().requires_grad_()
    loss_func = UniBCTLoss(task(OLD).float(), prototypes(dtype=torch.float32), weight, margin=margin)
    loss_func(embeddings, torch.arange(4)).backward()
    assert torch.isfinite(embeddings.grad).all()


# Updates.


def test_an_update_puts_the_refined_prototypes_in_place():
    embeddings, labels = batch()
    loss_func = UniBCTLoss(task(), prototypes(), 1.0)
    old, new, stored_labels = stored()
    loss_func.update_prototypes(old, new, stored_labels)
    refined = refine_prototypes(old, new, stored_labels)
    torch.testing.assert_close(loss_func.old_classifier.rows, refined.centers)
    expected = naive_influence(embeddings, labels, refined, 16.0, 0.0)
    loss_func(embeddings, labels)
    assert loss_func.terms["influence_loss"].item() == pytest.approx(expected, rel=1e-9)


def test_an_update_takes_the_refinements_settings():
    old, new, labels = stored()
    loss_func = UniBCTLoss(task(), prototypes())
    settings = {"smoothing": 0.3, "temperature": 0.5, "max_class_size": 4}
    loss_func.update_prototypes(old, new, labels, **settings)
    expected = refine_prototypes(old, new, labels, **settings).centers
    torch.testing.assert_close(loss_func.old_classifier.rows, expected, rtol=0, atol=0)


def test_an_update_of_some_classes_in_any_order_leaves_the_others():
    loss_func = UniBCTLoss(task(), prototypes([5, 3, 1, 0]))
    before = loss_func.old_classifier.rows.clone()
    old, new, labels = stored()
    some = (labels == 0) | (labels == 3)
    loss_func.update_prototypes(old[some], new[some], labels[some])
    after, refined = loss_func.old_classifier.rows, refine_prototypes(old, new, labels)
    torch.testing.assert_close(after[[1, 3]], refined.centers[[3, 0]])
    assert after[[0, 2]].equal(before[[0, 2]])


@every_form
def test_an_update_between_a_loss_and_its_backward(weight):
    embeddings, labels = batch()
    first, second = (UniBCTLoss(task(), prototypes(), weight) for _ in range(2))
    held, before = first.old_classifier.rows, first.old_classifier.rows.clone()
    loss = first(embeddings, labels)
    first.update_prototypes(*stored())
    loss.backward()
    assert held.equal(before) and not first.old_classifier.rows.equal(before)
    other = embeddings.detach().requires_grad_()
    second(other, labels).backward()
    torch.testing.assert_close(embeddings.grad, other.grad)


def test_the_users_prototypes_stay_as_they_are():
    centers = prototypes()
    before = centers.centers.clone()
    UniBCTLoss(task(), centers).update_prototypes(*stored())
    assert centers.centers.equal(before)


def test_the_papers_schedule():
    embeddings, labels = batch()
    loss_func = UniBCTLoss(task(), prototypes(), influence_weight=0)
    plain = loss_func.loss(embeddings, labels)
    torch.testing.assert_close(loss_func(embeddings, labels), plain)
    assert loss_func.terms["influence_loss"] == 0
    loss_func.update_prototypes(*stored())
    torch.testing.assert_close(loss_func(embeddings, labels), plain)
    loss_func.influence_weight = 1.0
    loss_func(embeddings, labels).backward()
    assert loss_func.terms["influence_loss"] > 0


@pytest.mark.parametrize("updated", [False, True])
def test_state_dict_carries_the_prototypes(updated):
    embeddings, labels = batch()
    source, target = UniBCTLoss(task(), prototypes(), 1.0), UniBCTLoss(task(), prototypes(seed=8), 1.0)
    if updated:
        source.update_prototypes(*stored())
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    assert source(embeddings, labels) != target(embeddings, labels)
    shapes = {name: tensor.shape for name, tensor in target.state_dict().items()}
    target.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert source(embeddings, labels) == target(embeddings, labels)
    assert {name: tensor.shape for name, tensor in source.state_dict().items()} == shapes
    assert copy.deepcopy(source)(embeddings, labels) == target(embeddings, labels)


@every_form
def test_the_prototypes_are_no_parameters_and_get_no_gradient(weight):
    embeddings, labels = batch()
    loss_func = UniBCTLoss(task(), prototypes(), weight)
    old, new, stored_labels = stored()
    loss_func.update_prototypes(old.requires_grad_(), new.requires_grad_(), stored_labels)
    loss_func(embeddings, labels).backward()
    assert [name for name, _ in loss_func.named_parameters()] == ["loss.W"]
    assert old.grad is None and new.grad is None and not loss_func.old_classifier.rows.requires_grad


@pairwise
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
@every_form
def test_dtypes_stay_what_they_are(dtype, autocast, weight):
    embeddings, labels = batch(dtype=torch.float32)
    loss_func = UniBCTLoss(task().float(), prototypes(dtype=torch.float32), weight)
    low = embeddings.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss_func.update_prototypes(*stored(dtype=dtype))
        loss = loss_func(low, labels)
    loss.backward()
    assert (
        low.grad.dtype == dtype
        and loss.dtype == torch.promote_types(dtype, torch.float32)
        and torch.isfinite(low.grad).all()
    )
    assert loss_func.old_classifier.rows.dtype == torch.float32
    exact = refine_prototypes(*stored()).centers
    if dtype.itemsize > 2:
        torch.testing.assert_close(loss_func.old_classifier.rows.double(), exact, rtol=0, atol=1e-5)
    assert loss.item() == pytest.approx(float(loss_func(embeddings, labels)), rel=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniBCTLoss(task(), torch.ones(6, 5)), r"centers must be a ClassCenters, got Tensor"),
        (lambda: UniBCTLoss(task(), prototypes(), -1.0), r"influence_weight must be .* at least 0, got -1.0"),
        (lambda: UniBCTLoss(task(), prototypes(), scale=0.0), r"scale must be .* above 0, got 0.0"),
        (lambda: UniBCTLoss(task(), prototypes(), margin=-0.1), r"margin must be .* at least 0, got -0.1"),
        (lambda: UniBCTLoss(task(), prototypes(), margin=28.6), r"margin must be in radians, in \[0, pi\], got 28.6"),
        (lambda: UniBCTLoss(losses.ArcFaceLoss, prototypes()), r"loss must be a PML loss object"),
    ],
)
def test_bad_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o, n, y: (n, o, y), r"old_embeddings must be 5 wide, got width 8"),
        (lambda o, n, y: (o, n, y + 1), r"labels must be among those of the prototypes .* got 6"),
        (lambda o, n, y: (o, n[:-1], y), r"new_embeddings must have a row for each of old_embeddings"),
    ],
)
def test_bad_updates_change_nothing(change, message):
    loss_func = UniBCTLoss(task(), prototypes())
    before = loss_func.old_classifier.rows.clone()
    with pytest.raises(ValueError, match=message):
        loss_func.update_prototypes(*change(*stored()))
    assert loss_func.old_classifier.rows.equal(before)


def test_bad_calls():
    embeddings, labels = batch()
    with pytest.raises(ValueError, match=r"embeddings must be finite, row 0"):
        UniBCTLoss(task(), prototypes())(embeddings * torch.nan, labels)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\], the task loss's classes, got"):
        UniBCTLoss(task(), prototypes())(embeddings, labels + 6)
    with pytest.raises(ValueError, match=r"embeddings must be on the device of the loss: got cpu and meta"):
        UniBCTLoss(losses.ContrastiveLoss(), prototypes()).to("meta")(embeddings, labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_what_the_cpu_gives():
    embeddings, labels = batch(dtype=torch.float32)
    results = []
    for device in ("cpu", "cuda"):
        loss_func = UniBCTLoss(task().float(), prototypes(dtype=torch.float32), 1.0).to(device)
        old, new, stored_labels = stored(dtype=torch.float32)
        loss_func.update_prototypes(old, new.to(device), stored_labels)  # stored ones may stay on the CPU
        results.append(loss_func(embeddings.to(device), labels.to(device)).item())
    assert results[1] == pytest.approx(results[0], rel=1e-4)
