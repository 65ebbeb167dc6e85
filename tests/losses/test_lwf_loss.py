import math

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import reducers

from pml_compat.frozen import FrozenClassifier
from pml_compat.losses import CompatibleLoss, LwFLoss
from tests import reference
from tests.pairwise import pairwise

OLD_WIDTH, CLASSES = 6, 4
KINDS = ["linear", "cosine"]
every_kind = pytest.mark.parametrize("kind", KINDS)
TEMPERATURES = [(1.0, None), (2.0, None), (0.5, 3.0)]


def classifier(kind, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(CLASSES, OLD_WIDTH, dtype=torch.float64)
    if kind == "linear":
        return FrozenClassifier(weight, torch.randn(CLASSES, dtype=torch.float64))
    return FrozenClassifier(weight, kind="cosine", scale=4.0)


def logits(old_classifier, kind, embeddings):
    rows = old_classifier.rows.numpy()
    fitted = [reference.fit_width(e, OLD_WIDTH) for e in embeddings.detach().numpy()]
    if kind == "linear":
        return [[float(e @ w) + float(b) for w, b in zip(rows, old_classifier.bias, strict=True)] for e in fitted]
    return [[4.0 * float(reference.unit(e) @ reference.unit(w)) for w in rows] for e in fitted]


def pairs(seed=0, n=7, width=OLD_WIDTH):
    """Return new and old embeddings."""
    generator = torch.Generator().manual_seed(seed)
    new_emb = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return new_emb.requires_grad_(), torch.randn(n, OLD_WIDTH, generator=generator, dtype=torch.float64)


@pairwise
@every_kind
@pytest.mark.parametrize("temperatures", TEMPERATURES)
@pytest.mark.parametrize("width", [OLD_WIDTH, 9, 3])
def test_matches_naive_loop(kind, temperatures, width):
    for seed in range(3):
        (new_emb, old_emb), old_classifier = pairs(seed, width=width), classifier(kind, seed)
        both = [logits(old_classifier, kind, rows) for rows in (new_emb, old_emb)]
        expected = reference.lwf_losses(*both, temperatures[0], temperatures[1] or temperatures[0])
        loss = LwFLoss(old_classifier, *temperatures)(new_emb, ref_emb=old_emb)
        assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-9)
        rows = LwFLoss(old_classifier, *temperatures, reducer=reducers.DoNothingReducer())(new_emb, ref_emb=old_emb)
        torch.testing.assert_close(rows["loss"]["losses"], torch.tensor(expected, dtype=torch.float64))
        assert rows["loss"]["indices"].tolist() == list(range(7)) and rows["loss"]["reduction_type"] == "element"


@pytest.mark.parametrize(
    ("temperatures", "expected"),
    [
        # old answers (3/4, 1/4), new answers (1/2, 1/2) whatever the temperature
        ((1.0, None), math.log(2)),
        ((5.0, 1.0), math.log(2)),
        # the new logits are (0, log 3), at T = 1/2 twice that; the old answers at T = 1/2 are (9/10, 1/10)
        ("moved", 0.75 * math.log(4) + 0.25 * math.log(4 / 3)),
        ("moved sharp", 0.9 * math.log(10) + 0.1 * math.log(10 / 9)),
        ("moved sharp old", 0.9 * math.log(4) + 0.1 * math.log(4 / 3)),
    ],
)
def test_by_hand(temperatures, expected):
    old_emb, new_emb = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    if isinstance(temperatures, str):
        new_emb = torch.tensor([[0.0, math.log(3)]])
        temperatures = {"moved": (1.0, None), "moved sharp": (0.5, None), "moved sharp old": (1.0, 0.5)}[temperatures]
    loss = LwFLoss(FrozenClassifier(torch.eye(2)), *temperatures)(new_emb, ref_emb=old_emb)
    assert loss.item() == pytest.approx(expected)


@every_kind
def test_is_least_at_the_old_embedding(kind):
    _, old_emb = pairs()
    old_classifier = classifier(kind)
    new_emb = old_emb.clone().requires_grad_()
    least = LwFLoss(old_classifier)(new_emb, ref_emb=old_emb)
    least.backward()
    p = torch.softmax(old_classifier.logits(old_emb), 1)
    torch.testing.assert_close(least, -(p * p.log()).sum(1).mean())
    torch.testing.assert_close(new_emb.grad, torch.zeros_like(new_emb), rtol=0, atol=1e-12)


@pairwise
@every_kind
@pytest.mark.parametrize("temperatures", TEMPERATURES)
@pytest.mark.parametrize("width", [OLD_WIDTH, 9, 3])
def test_gradcheck(kind, temperatures, width):
    (new_emb, old_emb), old_classifier = pairs(n=3, width=width), classifier(kind)
    loss_func = LwFLoss(old_classifier, *temperatures)
    assert torch.autograd.gradcheck(lambda e: loss_func(e, ref_emb=old_emb), (new_emb,))


@every_kind
def test_only_the_new_embeddings_receive_a_gradient(kind):
    new_emb, old_emb = pairs(width=9)
    old_emb.requires_grad_()
    loss_func = LwFLoss(classifier(kind))
    before = [tensor.clone() for tensor in (old_emb, *loss_func.buffers())]
    loss_func(new_emb, ref_emb=old_emb * 1.0).backward()
    assert old_emb.grad is None and list(loss_func.parameters()) == []
    assert all(one.equal(other) for one, other in zip([old_emb, *loss_func.buffers()], before, strict=True))
    assert (new_emb.grad[:, OLD_WIDTH:] == 0).all() and (new_emb.grad[:, :OLD_WIDTH] != 0).any(1).all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["equal", "zero new", "zero old", "certain"])
def test_finite_gradient(kind, dtype, case):
    new_emb, old_emb = (rows.detach().to(dtype) for rows in pairs())
    if case == "equal":
        new_emb[2] = old_emb[2]
    if case == "zero new":
        if kind == "cosine" and dtype == torch.float16:
            dtype = torch.bfloat16  # the slope of a cosine at length 0 is no float16 number
        new_emb[2] = 0
    if case == "zero old":
        old_emb[2] = 0
    if case == "certain":  # answers of 0 and 1, to opposite classes
        old_emb, new_emb = old_emb * 200, -old_emb * 200
    new_emb = new_emb.to(dtype).requires_grad_()
    loss = LwFLoss(classifier(kind).to(torch.promote_types(dtype, torch.float32)), temperature=0.1)(
        new_emb, ref_emb=old_emb
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new_emb.grad).all()


@pairwise
@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
def test_dtypes(kind, dtype, autocast):
    new_emb, old_emb = pairs()
    expected = LwFLoss(classifier(kind))(new_emb, ref_emb=old_emb)
    low = new_emb.detach().to(dtype).requires_grad_()
    loss_func = LwFLoss(classifier(kind).to(torch.promote_types(dtype, torch.float32)))
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = loss_func(low, ref_emb=old_emb.float())
    loss.backward()
    assert low.grad.dtype == dtype and loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5 if dtype.itemsize > 2 else 0.03)
    assert loss_func.old_classifier.rows.dtype == torch.promote_types(dtype, torch.float32)


@every_kind
def test_labels_change_nothing(kind):
    new_emb, old_emb = pairs()
    labels, loss_func = torch.full((7,), 1), LwFLoss(classifier(kind))
    expected = loss_func(new_emb, ref_emb=old_emb)
    assert loss_func(new_emb, labels, ref_emb=old_emb, ref_labels=labels) == expected
    both = CompatibleLoss(pml_losses.ContrastiveLoss(), loss_func, weights=2.0)
    task = pml_losses.ContrastiveLoss()(new_emb, labels)
    torch.testing.assert_close(both(new_emb, labels, ref_emb=old_emb), task + 2 * expected)


def test_the_margin_of_a_pml_loss_has_no_part_in_its_answers():
    old_loss = pml_losses.ArcFaceLoss(CLASSES, OLD_WIDTH, scale=5.0)
    new_emb, old_emb = pairs()
    expected = FrozenClassifier(old_loss.W.t(), kind="cosine", scale=5.0)
    found = LwFLoss(FrozenClassifier.from_loss(old_loss))(new_emb, ref_emb=old_emb)
    torch.testing.assert_close(found, LwFLoss(expected)(new_emb, ref_emb=old_emb))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.nn.Linear(6, 4),), r"old_classifier must be a FrozenClassifier, got Linear; make one with"),
        ((classifier("linear"), 0), r"temperature must be a finite number above 0, got 0"),
        ((classifier("linear"), 1.0, -1.0), r"old_temperature must be a finite number above 0, got -1.0"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        LwFLoss(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, r: (e, None), r"ref_emb must be given: the old model's embeddings .* got None"),
        (lambda e, r: (e, r[:-1]), r"ref_emb must be shaped like embeddings, .* expected 7 rows, got 6"),
        (lambda e, r: (e, r[:, :5]), r"ref_emb must be 6 wide, got width 5"),
        (lambda e, r: (e[:0], r[:0]), r"embeddings must not be empty, got shape \(0, 6\)"),
        (lambda e, r: (e * torch.nan, r), r"embeddings must be finite, row 0 has a NaN or an infinity"),
        (lambda e, r: (e, r / 0), r"ref_emb must be finite, row 0 has a NaN or an infinity"),
        (lambda e, r: (e, r.to("meta")), r"embeddings must be on the device of ref_emb: got cpu and meta"),
    ],
)
def test_bad_calls(change, message):
    new_emb, old_emb = change(*pairs())
    with pytest.raises(ValueError, match=message):
        LwFLoss(classifier("linear"))(new_emb, ref_emb=old_emb)


def test_another_device_and_tuples_are_refused():
    new_emb, old_emb = pairs()
    with pytest.raises(ValueError, match=r"embeddings must be on the device of the loss: got cpu and meta"):
        LwFLoss(classifier("linear")).to("meta")(new_emb, ref_emb=old_emb)
    with pytest.raises(ValueError, match=r"indices_tuple is not supported"):
        LwFLoss(classifier("linear"))(new_emb, None, (torch.zeros(1).long(),) * 3, ref_emb=old_emb)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_kind
def test_gpu_gives_what_the_cpu_gives(kind):
    new_emb, old_emb = pairs()
    on_gpu = LwFLoss(classifier(kind)).cuda()(new_emb.cuda(), ref_emb=old_emb.cuda())
    torch.testing.assert_close(on_gpu.cpu(), LwFLoss(classifier(kind))(new_emb, ref_emb=old_emb))
