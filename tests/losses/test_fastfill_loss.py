import math

import pytest
import torch
from pytorch_metric_learning import distances, losses, reducers

from pml_compat.frozen import FrozenClassifier
from pml_compat.losses import FastFillLoss, FCTLoss
from tests import reference
from tests.pairwise import pairwise

DISTANCES = {"given": lambda: None, "unit": lambda: distances.LpDistance(p=2, power=2)}
every_distance = pytest.mark.parametrize("kind", DISTANCES)
LABELS = torch.tensor([0, 4, 3, 0, 9, 4, 1])
KNOWN = [4, 0, 1]  # the label of each row of the new classifier


def classifier(kind="linear", dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(3, 5, generator=generator, dtype=dtype)
    return FrozenClassifier(weight, labels=KNOWN, kind=kind, scale=4.0 if kind == "cosine" else None)


def loss_of(kind, new_classifier=None, weight=1.0, **kwargs):
    return FastFillLoss(new_classifier, weight, distance=DISTANCES[kind](), **kwargs)


def rows(seed=0, n=7, width=5):
    """Return what a transformation gives, the new embeddings and the predicted log variances."""
    generator = torch.Generator().manual_seed(seed)
    mapped, target = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
    log_var = 2 * torch.randn(n, generator=generator, dtype=torch.float64)
    return mapped.requires_grad_(), target * 3 - 1, log_var.requires_grad_()


def numbers(*tensors):
    return [tensor.detach().numpy() for tensor in tensors]


# --- values


@every_distance
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_matches_naive_loop(kind, seed):
    mapped, target, log_var = rows(seed)
    expected = reference.fastfill_losses(*numbers(mapped, target, log_var), kind)
    loss_func = loss_of(kind)
    loss = loss_func(mapped, ref_emb=target, log_var=log_var)
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    assert loss_func.terms == {"likelihood_loss": loss.detach()}
    found = loss_of(kind, reducer=reducers.DoNothingReducer())(mapped, ref_emb=target, log_var=log_var)
    assert list(found) == ["likelihood_loss"]
    torch.testing.assert_close(found["likelihood_loss"]["losses"], torch.tensor(expected, dtype=torch.float64))


@pairwise
@every_distance
@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_classification_matches_naive_loop(kind, weight, head):
    mapped, target, log_var = rows()
    new_classifier = classifier(head)
    index = [i for i, label in enumerate(LABELS.tolist()) if label in KNOWN]
    targets = [KNOWN.index(LABELS[i]) for i in index]
    weights = new_classifier.rows.numpy()
    chosen = mapped.detach().numpy()[index]
    of_classes = (
        reference.linear_losses(chosen, weights, [0.0] * 3, targets)
        if head == "linear"
        else reference.cosine_losses(chosen, weights, 4.0, targets)
    )
    of_rows = reference.fastfill_losses(*numbers(mapped, target, log_var), kind)
    loss_func = loss_of(kind, new_classifier, weight)
    loss = loss_func(mapped, LABELS, ref_emb=target, log_var=log_var)
    likelihood, classification = sum(of_rows) / len(of_rows), weight * sum(of_classes) / len(of_classes)
    assert loss.item() == pytest.approx(likelihood + classification, rel=1e-6)
    assert list(loss_func.terms) == ["likelihood_loss", "classification_loss"]
    assert loss_func.terms["classification_loss"].item() == pytest.approx(classification, rel=1e-6)


def test_by_hand():
    """(25 / 2 / 2 + log 2) / 2 for errors of 3 and 4 at variance 2; log(1 + e^3) for logits 3 and 0, class 1."""
    mapped, target = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    log_var, labels = torch.tensor([math.log(2.0)]), torch.tensor([1])
    loss_func = FastFillLoss(FrozenClassifier(torch.eye(2)), 0.5)
    loss_func(mapped, labels, ref_emb=target, log_var=log_var)
    assert loss_func.terms["likelihood_loss"].item() == pytest.approx((6.25 + math.log(2.0)) / 2)
    assert loss_func.terms["classification_loss"].item() == pytest.approx(0.5 * math.log(1 + math.exp(3.0)))
    # unit rows at a right angle: a squared distance of 2
    unit = loss_of("unit")(mapped, ref_emb=target, log_var=log_var)
    assert unit.item() == pytest.approx((0.5 + math.log(2.0)) / 2)


def test_at_variance_1_it_is_half_of_fct():
    mapped, target, log_var = rows()
    loss = FastFillLoss()(mapped, ref_emb=target, log_var=torch.zeros_like(log_var))
    torch.testing.assert_close(loss, FCTLoss()(mapped, ref_emb=target) / 2)


def test_its_size_does_not_grow_with_the_width():
    mapped, target, log_var = rows()
    wide = FastFillLoss()(torch.cat([mapped] * 3, 1), ref_emb=torch.cat([target] * 3, 1), log_var=log_var)
    torch.testing.assert_close(wide, FastFillLoss()(mapped, ref_emb=target, log_var=log_var))


def test_the_classifier_keeps_the_margin_of_the_new_task_loss():
    torch.manual_seed(0)
    task_loss = losses.ArcFaceLoss(10, 5)
    mapped, target, log_var = (tensor.float() for tensor in rows())
    loss_func = FastFillLoss(FrozenClassifier.from_loss(task_loss))
    loss_func(mapped, LABELS, ref_emb=target, log_var=log_var)
    torch.testing.assert_close(loss_func.terms["classification_loss"], task_loss(mapped, LABELS).detach())


def test_no_label_is_known():
    mapped, target, log_var = rows()
    unknown = torch.full((7,), 3)
    loss = loss_of("given", classifier())(mapped, unknown, ref_emb=target, log_var=log_var)
    loss.backward()
    torch.testing.assert_close(loss, loss_of("given")(mapped, ref_emb=target, log_var=log_var))
    assert torch.isfinite(mapped.grad).all()


def test_labels_are_for_the_classifier_alone():
    mapped, target, log_var = rows()
    expected = FastFillLoss()(mapped, ref_emb=target, log_var=log_var)
    assert FastFillLoss()(mapped, LABELS, ref_emb=target, log_var=log_var) == expected
    with_classifier = FastFillLoss(classifier())
    loss = with_classifier(mapped, LABELS, ref_emb=target, log_var=log_var)
    assert with_classifier(mapped, LABELS.int(), ref_emb=target, ref_labels=LABELS.clone(), log_var=log_var) == loss


def test_stats_are_the_terms():
    mapped, target, log_var = rows()
    loss_func = loss_of("given", classifier(), collect_stats=True)
    loss_func(mapped, LABELS, ref_emb=target, log_var=log_var)
    for name, value in loss_func.terms.items():
        assert getattr(loss_func, name) == value.item()


# --- gradients


@every_distance
@pytest.mark.parametrize("with_classifier", [False, True])
def test_gradcheck(kind, with_classifier):
    mapped, target, log_var = rows()
    loss_func = loss_of(kind, classifier() if with_classifier else None)
    assert torch.autograd.gradcheck(lambda h, s: loss_func(h, LABELS, ref_emb=target, log_var=s), (mapped, log_var))


@every_distance
def test_who_receives_a_gradient(kind):
    mapped, target, log_var = rows()
    target.requires_grad_()
    loss_func = loss_of(kind, classifier())
    before = {key: value.clone() for key, value in loss_func.state_dict().items()}
    loss_func(mapped, LABELS, ref_emb=target * 1.0, log_var=log_var).backward()
    assert target.grad is None and list(loss_func.parameters()) == []
    assert (mapped.grad.abs().sum(1) > 0).all() and (log_var.grad != 0).all()
    assert all(value.equal(before[key]) for key, value in loss_func.state_dict().items())


@every_distance
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["equal", "zero mapped", "zero target", "both zero"])
@pytest.mark.parametrize("bound", [-10.0, 10.0])
def test_finite_gradient_where_a_distance_has_a_corner(kind, dtype, case, bound):
    mapped, target, _ = (tensor.detach().to(dtype) for tensor in rows())
    if case == "equal":
        target = mapped.clone()  # an error of size 1 at the lower bound is past float16
    if "zero" in case:
        mapped[2] *= "target" not in case
        target[2] *= "mapped" not in case
        bound /= 10
    mapped.requires_grad_()
    log_var = torch.full((7,), bound, dtype=dtype, requires_grad=True)
    loss = loss_of(kind)(mapped, ref_emb=target, log_var=log_var)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(mapped.grad).all() and torch.isfinite(log_var.grad).all()


# --- inputs


@pairwise
@every_distance
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
def test_dtypes(kind, dtype, autocast):
    mapped, target, log_var = rows()
    loss_func = loss_of(kind, classifier(dtype=torch.float32))
    expected = loss_func(mapped, LABELS, ref_emb=target, log_var=log_var)
    low, low_var = (tensor.detach().to(dtype).requires_grad_() for tensor in (mapped, log_var))
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = loss_func(low, LABELS, ref_emb=target.float(), log_var=low_var)
    loss.backward()
    assert low.grad.dtype == low_var.grad.dtype == dtype and loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5 if dtype.itemsize > 2 else 0.02)
    assert torch.isfinite(low.grad).all()
    assert {value.dtype for value in loss_func.state_dict().values() if value.is_floating_point()} == {torch.float32}


def test_log_variances_of_another_dtype():
    mapped, target, log_var = (tensor.detach() for tensor in rows())
    expected = FastFillLoss()(mapped, ref_emb=target, log_var=log_var)
    loss = FastFillLoss()(mapped, ref_emb=target, log_var=log_var.float())
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(expected.item(), rel=1e-6)


@every_distance
def test_permuted_rows_and_one_row(kind):
    mapped, target, log_var = (tensor.detach() for tensor in rows())
    loss_func, order = loss_of(kind, classifier()), torch.randperm(7)
    expected = loss_func(mapped, LABELS, ref_emb=target, log_var=log_var)
    permuted = loss_func(mapped[order], LABELS[order], ref_emb=target[order], log_var=log_var[order])
    torch.testing.assert_close(permuted, expected)
    one = loss_of(kind)(mapped[:1], ref_emb=target[:1], log_var=log_var[:1])
    assert one.item() == pytest.approx(reference.fastfill_losses(*numbers(mapped, target, log_var), kind)[0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"new_classifier": torch.nn.Linear(5, 3)}, r"new_classifier must be a FrozenClassifier, got Linear"),
        ({"classifier_weight": -1.0}, r"classifier_weight must be a finite number of at least 0, got -1.0"),
        ({"distance": distances.LpDistance()}, r"distance must be LpDistance\(p=2, power=2\), .*\(p=2, power=1\)"),
        ({"distance": distances.LpDistance(p=1, power=2)}, r"distance must be LpDistance\(p=2, power=2\), .*\(p=1, "),
        ({"distance": distances.CosineSimilarity()}, r"with normalize_embeddings=True for cosines, got Cosine"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FastFillLoss(**kwargs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, r, s: (h, None, s), r"ref_emb must be given: the new model's embeddings .* got None"),
        (lambda h, r, s: (h, r[:-1], s), r"ref_emb must be shaped like embeddings, .* expected \(7, 5\), got \(6, 5\)"),
        (lambda h, r, s: (h, r[:, :1], s), r"ref_emb must be shaped like embeddings, .* got \(7, 1\)"),
        (lambda h, r, s: (h[:0], r[:0], s), r"embeddings must not be empty, got shape \(0, 5\)"),
        (lambda h, r, s: (h * torch.nan, r, s), r"embeddings must be finite, row 0 has a NaN or an infinity"),
        (
            lambda h, r, s: (h, r, None),
            r"log_var must be given: .* FastFillTransformation.with_log_variance .* got None",
        ),
        (
            lambda h, r, s: (h, r, 0.5),
            r"log_var must be a floating point tensor with one entry a row, \(7,\), got float",
        ),
        (lambda h, r, s: (h, r, s[:-1]), r"log_var must .* one entry a row, \(7,\), got torch.float64 \(6,\)"),
        (lambda h, r, s: (h, r, s[:, None]), r"log_var must .* one entry a row, \(7,\), got torch.float64 \(7, 1\)"),
        (lambda h, r, s: (h, r, s.long()), r"log_var must .* one entry a row, \(7,\), got torch.int64 \(7,\)"),
        (lambda h, r, s: (h, r, s / (torch.arange(7) != 4)), r"log_var must be finite, row 4 has a NaN or an infinity"),
        (lambda h, r, s: (h, r, s.to("meta")), r"embeddings must be on the device of log_var: got cpu and meta"),
    ],
)
def test_bad_calls(change, message):
    mapped, target, log_var = change(*rows())
    with pytest.raises(ValueError, match=message):
        FastFillLoss()(mapped, ref_emb=target, log_var=log_var)


@pytest.mark.parametrize(
    ("labels", "kwargs", "message"),
    [
        (None, {}, r"labels must be given, got None"),
        (LABELS.float(), {}, r"labels must be integers, got torch.float32"),
        (LABELS, {"ref_labels": LABELS.flip(0)}, r"ref_labels must equal labels"),
        (LABELS, {"indices_tuple": (torch.zeros(1).long(),) * 3}, r"indices_tuple is not supported"),
    ],
)
def test_bad_labels_and_tuples(labels, kwargs, message):
    mapped, target, log_var = rows()
    with pytest.raises(ValueError, match=message):
        FastFillLoss(classifier())(mapped, labels, ref_emb=target, log_var=log_var, **kwargs)


def test_a_classifier_of_another_width_or_device():
    mapped, target, log_var = rows()
    narrow = FastFillLoss(FrozenClassifier(torch.ones(2, 4)))
    with pytest.raises(ValueError, match=r"embeddings must be 4 wide, got width 5"):
        narrow(mapped, LABELS, ref_emb=target, log_var=log_var)
    with pytest.raises(ValueError, match=r"embeddings must be on the device of the loss: got cpu and meta"):
        FastFillLoss(classifier().to("meta"))(mapped, LABELS, ref_emb=target, log_var=log_var)


@every_distance
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_what_the_cpu_gives(kind):
    tensors, loss_func = rows(), loss_of(kind, classifier())
    mapped, target, log_var = tensors
    expected = loss_func(mapped, LABELS, ref_emb=target, log_var=log_var)
    mapped, target, log_var = (tensor.cuda() for tensor in tensors)
    on_gpu = loss_func.cuda()(mapped, LABELS.cuda(), ref_emb=target, log_var=log_var)
    torch.testing.assert_close(on_gpu.cpu(), expected)
