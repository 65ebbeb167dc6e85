import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import reducers

from pml_compat.frozen import ClassCenters, FrozenClassifier
from pml_compat.losses import CompatibleLoss, FocalDistillationLoss
from tests import reference
from tests.pairwise import pairwise

WIDTH, LABELS = 5, torch.tensor([7, 3, 3, 0, 7, 9, 0, 3, 7])  # no classifier here knows label 9
KNOWN = torch.tensor([3, 7, 0])


def centers(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return ClassCenters(torch.randn(3, WIDTH, generator=generator, dtype=dtype), KNOWN)


def linear(dtype=torch.float64):
    generator = torch.Generator().manual_seed(6)
    weight, bias = torch.randn(3, WIDTH + 1, generator=generator, dtype=dtype).split([WIDTH, 1], 1)
    return FrozenClassifier(weight, bias[:, 0], labels=KNOWN)


CASES = {
    "classifier": lambda **kwargs: FocalDistillationLoss(linear(), **kwargs),
    "centers": lambda **kwargs: FocalDistillationLoss(centers(), alpha=0.3, beta=0.7, **kwargs),
    "batch": lambda **kwargs: FocalDistillationLoss(alpha=2.0, **kwargs),
    "logits": lambda **kwargs: FocalDistillationLoss(linear(), kind="logits", temperature=2.0, **kwargs),
    "cosine logits": lambda **kwargs: FocalDistillationLoss(
        FrozenClassifier.from_centers(centers(), scale=5.0), kind="logits", beta=2.0, **kwargs
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


def triples(seed=0, width=WIDTH):
    """Return new embeddings, old embeddings that are about their class's centre, and labels."""
    generator = torch.Generator().manual_seed(seed)
    new_emb = torch.randn(len(LABELS), width, generator=generator, dtype=torch.float64)
    old_emb = torch.randn(len(LABELS), WIDTH, generator=generator, dtype=torch.float64)
    known = LABELS != 9
    old_emb[known] += (
        centers().centers[centers().index_of(LABELS[known])] + linear().rows[linear().index_of(LABELS[known])]
    )
    return new_emb.requires_grad_(), old_emb, LABELS.clone()


def naive_logits(loss_func, embeddings):
    """The old classifier's logits, or its centres' cosines."""
    classifier = loss_func.old_classifier
    rows = classifier.rows.numpy()
    fitted = [reference.fit_width(e, WIDTH) for e in embeddings.detach().numpy()]
    if classifier.bias is not None:
        return [[float(e @ w) + float(b) for w, b in zip(rows, classifier.bias, strict=True)] for e in fitted]
    scale = classifier.head.scale
    return [[scale * float(reference.unit(e) @ reference.unit(w)) for w in rows] for e in fitted]


def naive(loss_func, new_emb, old_emb, labels):
    """Return the losses, and where the old model is right."""
    labels = labels.tolist()
    if loss_func.old_classifier is None:
        right = reference.nearest_has_the_label(old_emb.numpy(), labels)
    else:
        known = loss_func.old_classifier.labels.tolist()
        answers = [known[int(np.argmax(row))] for row in naive_logits(loss_func, old_emb)]
        right = [answer == label for answer, label in zip(answers, labels, strict=True)]
    if loss_func.kind == "features":
        pairs = zip(new_emb.detach().numpy(), old_emb.numpy(), strict=True)
        distances = [sum((a - b) ** 2 for a, b in zip(f, o, strict=True)) / len(f) for f, o in pairs]
    else:
        new, old = (naive_logits(loss_func, rows) for rows in (new_emb, old_emb))
        temperature = loss_func.temperature
        distances = []
        for one, other in zip(old, new, strict=True):
            p, q = (reference.softmax([z / temperature for z in row]) for row in (one, other))
            distances.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return reference.focal_distillation_losses(distances, right, loss_func.alpha, loss_func.beta), right


@every_case
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_matches_naive_loop(case, seed):
    new_emb, old_emb, labels = triples(seed)
    loss_func = CASES[case](collect_stats=True)
    expected, right = naive(loss_func, new_emb, old_emb, labels)
    assert True in right and False in right and not right[5]
    loss = loss_func(new_emb, labels, ref_emb=old_emb)
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-9)
    assert loss_func.old_correct_fraction == pytest.approx(sum(right) / len(right))
    rows = CASES[case](reducer=reducers.DoNothingReducer())(new_emb, labels, ref_emb=old_emb)["loss"]
    torch.testing.assert_close(rows["losses"], torch.tensor(expected, dtype=torch.float64))
    assert rows["indices"].tolist() == list(range(len(labels))) and rows["reduction_type"] == "element"


def losses_of(loss_func, *arguments, **kwargs):
    loss_func.set_reducer(reducers.DoNothingReducer())
    return loss_func(*arguments, **kwargs)["loss"]["losses"].tolist()


OLD = torch.tensor([[3.0, 0.0], [2.0, 0.5], [0.0, 1.0]])  # by cosine: 0 and 1 are next to each other, 2 is next to 1
HAND_LABELS = torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("old", "right"),
    [
        (FrozenClassifier(torch.eye(2)), [True, False, True]),
        (FrozenClassifier(torch.eye(2), labels=[0, 4]), [True, False, False]),  # label 1 is unknown
        (FrozenClassifier(torch.eye(2), torch.tensor([0.0, 2.0])), [True, True, True]),  # the bias counts
        (ClassCenters(torch.eye(2), torch.tensor([0, 1])), [True, False, True]),
        (ClassCenters(torch.eye(2), torch.tensor([1, 0])), [False, True, False]),
        (None, [False, False, True]),
    ],
)
def test_by_hand(old, right):
    new_emb = OLD + torch.tensor([1.0, 3.0])  # a mean squared difference of 5
    found = losses_of(FocalDistillationLoss(old, alpha=1.0, beta=5.0), new_emb, HAND_LABELS, ref_emb=OLD)
    assert found == pytest.approx([30.0 if r else 5.0 for r in right])


def test_divergence_by_hand():
    # old answers (3/4, 1/4), right for label 0, new ones (1/2, 1/2); at T = 1/2 the old answers are (9/10, 1/10)
    old_emb, new_emb = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    old, labels = FrozenClassifier(torch.eye(2)), torch.tensor([0])
    found = FocalDistillationLoss(old, kind="logits")(new_emb, labels, ref_emb=old_emb)
    assert found.item() == pytest.approx(6 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))
    found = FocalDistillationLoss(old, kind="logits", temperature=0.5)(new_emb, labels, ref_emb=old_emb)
    assert found.item() == pytest.approx(6 * (0.9 * math.log(1.8) + 0.1 * math.log(0.2)))


def test_the_old_model_is_judged_and_not_the_new_one():
    classifier = FrozenClassifier(torch.eye(2))
    wrong_old, right_new = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    for old_emb, new_emb, weight in [(wrong_old, right_new, 1.0), (right_new, wrong_old, 6.0)]:
        assert FocalDistillationLoss(classifier)(new_emb, torch.tensor([0]), ref_emb=old_emb).item() == weight


@every_case
def test_a_given_mask(case):
    new_emb, old_emb, labels = triples()
    loss_func = CASES[case](collect_stats=True)
    distances = FocalDistillationLoss(loss_func.old_classifier, alpha=1.0, beta=0.0, kind=loss_func.kind)
    distances.temperature = loss_func.temperature
    distances = torch.tensor(losses_of(distances, new_emb, labels, ref_emb=old_emb), dtype=torch.float64)
    mask = torch.arange(len(labels)) % 2 == 0
    expected = (distances * (loss_func.alpha + loss_func.beta * mask)).mean()
    for given in (None, labels):
        found = loss_func(new_emb, given, ref_emb=old_emb, old_correct=mask)
        torch.testing.assert_close(found, expected)
    assert loss_func.old_correct_fraction == pytest.approx(5 / 9)


def test_nobody_is_next_to_a_sample_alone():
    new_emb, old_emb, labels = (rows[:1] for rows in triples())
    expected = (new_emb - old_emb).square().mean()
    torch.testing.assert_close(FocalDistillationLoss()(new_emb, labels, ref_emb=old_emb), expected)


@pytest.mark.parametrize(
    ("case", "width"),
    [(case, WIDTH) for case in CASES] + [(case, w) for case in CASES for w in (8, 3) if "logits" in case],
)
def test_gradcheck(case, width):
    new_emb, old_emb, labels = triples(width=width)
    loss_func = CASES[case]()
    assert torch.autograd.gradcheck(lambda e: loss_func(e, labels, ref_emb=old_emb), (new_emb,))
    expected, _ = naive(loss_func, new_emb, old_emb, labels)
    assert loss_func(new_emb, labels, ref_emb=old_emb).item() == pytest.approx(sum(expected) / len(expected))


@every_case
def test_only_the_new_embeddings_receive_a_gradient(case):
    new_emb, old_emb, labels = triples()
    old_emb.requires_grad_()
    loss_func = CASES[case]()
    before = [tensor.clone() for tensor in (old_emb, *loss_func.buffers())]
    loss_func(new_emb, labels, ref_emb=old_emb * 1.0).backward()
    assert old_emb.grad is None and list(loss_func.parameters()) == []
    assert all(one.equal(other) for one, other in zip([old_emb, *loss_func.buffers()], before, strict=True))
    assert (new_emb.grad != 0).any(1).all()


@every_case
def test_the_old_embedding_itself_is_a_zero_with_a_gradient(case):
    _, old_emb, labels = triples()
    new_emb = old_emb.clone().requires_grad_()
    loss = CASES[case]()(new_emb, labels, ref_emb=old_emb)
    loss.backward()
    assert loss.item() == 0
    torch.testing.assert_close(new_emb.grad, torch.zeros_like(new_emb), rtol=0, atol=1e-12)


@every_case
@pytest.mark.parametrize("zero", ["new", "old", "both"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_finite_gradient_at_zero_rows(case, zero, dtype):
    new_emb, old_emb, labels = triples()
    new_emb, old_emb = new_emb.detach().to(dtype), old_emb.to(dtype)
    new_emb[2] *= zero == "old"
    old_emb[2] *= zero == "new"
    loss = CASES[case]().to(torch.promote_types(dtype, torch.float32))(
        new_emb.requires_grad_(), labels, ref_emb=old_emb
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new_emb.grad).all()


@pairwise
@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
def test_dtypes(case, dtype, autocast):
    new_emb, old_emb, labels = triples()
    expected = CASES[case]()(new_emb, labels, ref_emb=old_emb)
    low = new_emb.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = CASES[case]().to(torch.promote_types(dtype, torch.float32))(low, labels, ref_emb=old_emb.float())
    loss.backward()
    assert low.grad.dtype == dtype and loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5 if dtype.itemsize > 2 else 0.03)
    assert torch.isfinite(low.grad).all()


def test_beside_a_task_loss():
    new_emb, old_emb, labels = triples()
    loss_func = CASES["centers"]()
    both = CompatibleLoss(pml_losses.ContrastiveLoss(), loss_func, weights=0.5)
    expected = pml_losses.ContrastiveLoss()(new_emb, labels) + 0.5 * loss_func(new_emb, labels, ref_emb=old_emb)
    torch.testing.assert_close(both(new_emb, labels, ref_emb=old_emb, ref_labels=labels), expected)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {"alpha": -1}, r"alpha must be a finite number of at least 0, got -1"),
        ((), {"beta": -0.5}, r"beta must be a finite number of at least 0, got -0.5"),
        ((), {"temperature": 0}, r"temperature must be a finite number above 0, got 0"),
        ((), {"kind": "both"}, r"kind must be 'features' or 'logits', got 'both'"),
        (
            (torch.nn.Linear(5, 3),),
            {},
            r"old_classifier must be a FrozenClassifier, got Linear; make one with",
        ),
        ((), {"kind": "logits"}, r"old_classifier must be given with kind='logits', got None"),
    ],
)
def test_bad_options(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        FocalDistillationLoss(*arguments, **options)


@pytest.mark.parametrize("case", ["centers", "batch", "logits"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, r, y: (e, None, y), r"ref_emb must be given: the old model's embeddings .* got None"),
        (lambda e, r, y: (e, r[:-1], y), r"ref_emb must be shaped like embeddings, row i of the same item"),
        (lambda e, r, y: (e[:0], r[:0], y[:0]), r"embeddings must not be empty, got shape \(0, 5\)"),
        (lambda e, r, y: (e * torch.nan, r, y), r"embeddings must be finite, row 0 has a NaN or an infinity"),
        (lambda e, r, y: (e, r / 0, y), r"ref_emb must be finite, row 0 has a NaN or an infinity"),
        (lambda e, r, y: (e, r.to("meta"), y), r"embeddings must be on the device of ref_emb: got cpu and meta"),
        (lambda e, r, y: (e, r, None), r"labels must be given, got None"),
        (lambda e, r, y: (e, r, y.float()), r"labels must be integers, got torch.float32"),
    ],
)
def test_bad_calls(case, change, message):
    new_emb, old_emb, labels = change(*triples())
    with pytest.raises(ValueError, match=message):
        CASES[case]()(new_emb, labels, ref_emb=old_emb)


def test_widths():
    new_emb, old_emb, labels = triples(width=8)
    loss = CASES["batch"]()(new_emb, labels, ref_emb=old_emb)
    torch.testing.assert_close(loss, CASES["batch"]()(new_emb[:, :5], labels, ref_emb=old_emb))
    for case in ("centers", "logits"):
        with pytest.raises(ValueError, match=r"ref_emb must be 5 wide, got width 8"):
            CASES[case]()(new_emb, labels, ref_emb=new_emb.detach().clone())


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(9), r"got torch.float32 \(9,\)"),
        (torch.ones(8, dtype=torch.bool), r"got torch.bool \(8,\)"),
        (torch.ones(9, 1, dtype=torch.bool), r"got torch.bool \(9, 1\)"),
        ([True] * 9, r"got list"),
    ],
)
def test_bad_masks(mask, got):
    new_emb, old_emb, labels = triples()
    with pytest.raises(ValueError, match=r"old_correct must be a bool tensor with one entry a row, \(9,\), " + got):
        CASES["batch"]()(new_emb, labels, ref_emb=old_emb, old_correct=mask)


def test_labels_of_other_rows_tuples_and_another_device_are_refused():
    new_emb, old_emb, labels = triples()
    with pytest.raises(ValueError, match=r"ref_labels must equal labels, as row i of ref_emb is the item of row i"):
        CASES["batch"]()(new_emb, labels, ref_emb=old_emb, ref_labels=labels.flip(0))
    with pytest.raises(ValueError, match=r"indices_tuple is not supported"):
        CASES["batch"]()(new_emb, labels, (torch.zeros(1).long(),) * 3, ref_emb=old_emb)
    with pytest.raises(ValueError, match=r"embeddings must be on the device of the loss: got cpu and meta"):
        CASES["centers"]().to("meta")(new_emb, labels, ref_emb=old_emb)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_case
def test_gpu_gives_what_the_cpu_gives(case):
    new_emb, old_emb, labels = triples()
    on_gpu = CASES[case]().cuda()(new_emb.cuda(), labels.cuda(), ref_emb=old_emb.cuda())
    torch.testing.assert_close(on_gpu.cpu(), CASES[case]()(new_emb, labels, ref_emb=old_emb))
