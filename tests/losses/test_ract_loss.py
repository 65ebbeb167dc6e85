import math

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import reducers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pml_compat.losses import CompatibleLoss, RACTLoss
from tests import reference
from tests.pairwise import pairwise

FORMS = {
    "contrastive": {"temperature": 0.1},
    "contrastive_hardest": {"temperature": 0.05, "top_k": 2},
    "contrastive_old": {"temperature": 0.2, "regression": False},
    "contrastive_old_hardest": {"temperature": 0.2, "regression": False, "top_k": 1},
    "triplet": {"form": "triplet"},
    "triplet_hardest": {"form": "triplet", "top_k": 3, "margin": 0.5},
    "triplet_old": {"form": "triplet", "regression": False, "margin": 1.5},
}
every_form = pytest.mark.parametrize("form", FORMS)
DEFAULTS = {"temperature": 0.01, "top_k": None, "regression": True, "form": "contrastive", "margin": 0.8}
LABELS = torch.tensor([4, 1, 1, 0, 4, 4, 4, 0, 4])  # label 1's samples have 7 negatives, label 4's only 4


def pairs(seed=0, labels=LABELS, width=5):
    """Return new embeddings, old embeddings and labels."""
    generator = torch.Generator().manual_seed(seed)
    new_emb, old_emb = torch.randn(2, len(labels), width, generator=generator, dtype=torch.float64)
    return (new_emb * 3).requires_grad_(), old_emb + 0.5 * new_emb, labels


def naive(new_emb, old_emb, labels, form):
    options = DEFAULTS | FORMS[form]
    return reference.ract_losses(new_emb.detach().numpy(), old_emb.numpy(), labels.tolist(), **options)


@pairwise
@every_form
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("labels", [LABELS, torch.arange(6), torch.tensor([0, 0, 0, 0, 9])])
def test_matches_naive_loop(form, seed, labels):
    new_emb, old_emb, labels = pairs(seed, labels)
    expected = naive(new_emb, old_emb, labels, form)
    loss = RACTLoss(**FORMS[form])(new_emb, labels, ref_emb=old_emb)
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-9)
    rows = RACTLoss(**FORMS[form], reducer=reducers.DoNothingReducer())(new_emb, labels, ref_emb=old_emb)["loss"]
    torch.testing.assert_close(rows["losses"], torch.tensor(expected, dtype=torch.float64))
    assert rows["indices"].tolist() == list(range(len(labels))) and rows["reduction_type"] == "element"


E = math.e


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"temperature": 1.0}, [math.log(1 + E**-2 + E**-1), math.log(3)]),
        ({"temperature": 0.5}, [math.log(1 + E**-4 + E**-2), math.log(3)]),
        ({"temperature": 1.0, "regression": False}, [math.log(1 + E**-2), math.log(2)]),
        ({"form": "triplet"}, [0.0, 0.8 + 0.8]),
        ({"form": "triplet", "margin": 2.0}, [0.0 + 2 - math.sqrt(2), 2.0 + 2.0]),
        ({"form": "triplet", "regression": False}, [0.0, 0.8]),
    ],
)
def test_by_hand(options, rows):
    # Sample 0 is on its old embedding, opposite to the old negative and at a right angle to the new one.
    # Sample 1 is at a right angle to its own old embedding and to both negatives.
    new_emb, old_emb = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [-1.0, 0.0]])
    loss_func = RACTLoss(**options, reducer=reducers.DoNothingReducer())
    found = loss_func(new_emb, torch.tensor([7, 3]), ref_emb=old_emb)["loss"]["losses"]
    assert found.tolist() == pytest.approx(rows, abs=1e-6)
    assert RACTLoss(**options)(new_emb, torch.tensor([7, 3]), ref_emb=old_emb).item() == pytest.approx(sum(rows) / 2)


def negative_pairs(labels):
    return (labels[:, None] != labels).nonzero(as_tuple=True)


def test_is_pml_ntxent_with_the_same_pairs():
    new_emb, old_emb, labels = pairs()
    i = torch.arange(len(labels))
    anchors, negatives = negative_pairs(labels)
    old_only = pml_losses.NTXentLoss(0.1)(new_emb, indices_tuple=(i, i, anchors, negatives), ref_emb=old_emb)
    found = RACTLoss(0.1, regression=False)(new_emb, labels, ref_emb=old_emb)
    torch.testing.assert_close(found, old_only)
    tuples = (i, i, anchors.repeat(2), torch.cat([negatives, negatives + len(labels)]))
    both = pml_losses.NTXentLoss(0.1)(new_emb, indices_tuple=tuples, ref_emb=torch.cat([old_emb, new_emb]))
    found = RACTLoss(0.1)(new_emb, labels, ref_emb=old_emb)
    torch.testing.assert_close(found, both)
    gradients = [torch.autograd.grad(loss, new_emb)[0] for loss in (found, both)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("form", ["contrastive", "triplet"])
def test_a_top_k_of_all_negatives_changes_nothing(form):
    new_emb, old_emb, labels = pairs()
    expected = RACTLoss(0.1, form=form)(new_emb, labels, ref_emb=old_emb)
    for top_k in (7, 8, 9, 1000):
        found = RACTLoss(0.1, form=form, top_k=top_k)(new_emb, labels, ref_emb=old_emb)
        torch.testing.assert_close(found, expected)


@every_form
def test_gradcheck(form):
    new_emb, old_emb, labels = pairs()
    assert torch.autograd.gradcheck(lambda e: RACTLoss(**FORMS[form])(e, labels, ref_emb=old_emb), (new_emb,))


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"form": "triplet", "margin": 2.0}, {"top_k": 8}])
@pytest.mark.parametrize("regression", [True, False])
def test_new_negatives_receive_a_gradient(options, regression):
    new_emb, old_emb, labels = pairs()
    loss_func = RACTLoss(**{"temperature": 0.5} | options, regression=regression, reducer=reducers.DoNothingReducer())
    loss_func(new_emb, labels, ref_emb=old_emb)["loss"]["losses"][0].backward()
    moved = new_emb.grad.abs().sum(1) > 0
    own, negative = torch.arange(len(labels)) == 0, labels != labels[0]
    assert moved.tolist() == (own | (negative & regression)).tolist()


@every_form
def test_ref_emb_receives_no_gradient(form):
    new_emb, old_emb, labels = pairs()
    old_emb.requires_grad_()
    before = old_emb.detach().clone()
    RACTLoss(**FORMS[form])(new_emb, labels, ref_emb=old_emb * 1.0).backward()
    assert old_emb.grad is None and old_emb.equal(before) and new_emb.grad.abs().sum() > 0


@every_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["on old", "all one", "zero new", "zero old", "both zero", "short"])
def test_finite_gradient_at_corners(form, dtype, case):
    new_emb, old_emb, labels = pairs()
    new_emb, old_emb = new_emb.detach().clone(), old_emb.clone()
    if case == "on old":
        new_emb = old_emb.clone()
    if case == "all one":  # every distance is 0
        new_emb[:], old_emb[:] = new_emb[0], new_emb[0]
    if case in ("zero new", "both zero"):
        new_emb[2] = 0
    if case in ("zero old", "both zero"):
        old_emb[2] = 0
    if case == "short":
        new_emb[2] *= 1e-6
    new_emb = new_emb.to(dtype).requires_grad_()
    loss = RACTLoss(**FORMS[form] | {"temperature": 0.01})(new_emb, labels, ref_emb=old_emb.to(dtype))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new_emb.grad).all()


@every_form
def test_lengths_do_not_matter(form):
    new_emb, old_emb, labels = pairs()
    factor, loss_func = torch.rand(len(labels), 1) + 0.5, RACTLoss(**FORMS[form])
    scaled = loss_func(new_emb * factor, labels, ref_emb=old_emb / factor)
    torch.testing.assert_close(scaled, loss_func(new_emb, labels, ref_emb=old_emb))


@every_form
@pytest.mark.parametrize("labels", [torch.zeros(4, dtype=torch.long), torch.tensor([5])])
def test_nothing_to_tell_apart_is_a_zero_with_a_gradient(form, labels):
    new_emb, old_emb, _ = pairs(labels=labels)
    loss = RACTLoss(**FORMS[form])(new_emb, labels, ref_emb=old_emb)
    loss.backward()
    assert loss.item() == 0 and new_emb.grad.equal(torch.zeros_like(new_emb))


@pairwise
@every_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
def test_dtypes(form, dtype, autocast):
    new_emb, old_emb, labels = pairs()
    expected = RACTLoss(**FORMS[form])(new_emb, labels, ref_emb=old_emb)
    low = new_emb.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = RACTLoss(**FORMS[form])(low, labels, ref_emb=old_emb.float())
    loss.backward()
    assert low.grad.dtype == dtype and loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5 if dtype.itemsize > 2 else 0.05)
    assert torch.isfinite(low.grad).all()


class LargestTensor(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.size = max([self.size, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@every_form
def test_no_tensor_is_larger_than_the_logits(form):
    labels = torch.arange(20) // 2
    new_emb, old_emb, _ = pairs(labels=labels, width=4)
    with LargestTensor() as largest:
        RACTLoss(**FORMS[form])(new_emb, labels, ref_emb=old_emb).backward()
    assert largest.size <= 20 * (1 + 2 * 20)


def test_beside_a_task_loss():
    new_emb, old_emb, labels = pairs()
    both = CompatibleLoss(pml_losses.ContrastiveLoss(), RACTLoss(0.1), weights=0.5)
    expected = pml_losses.ContrastiveLoss()(new_emb, labels) + 0.5 * RACTLoss(0.1)(new_emb, labels, ref_emb=old_emb)
    torch.testing.assert_close(both(new_emb, labels, ref_emb=old_emb, ref_labels=labels), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, r"temperature must be a finite number above 0, got 0"),
        ({"temperature": -1.0}, r"temperature must be a finite number above 0, got -1.0"),
        ({"top_k": 0}, r"top_k must be an integer of at least 1, got 0"),
        ({"top_k": -1}, r"top_k must be an integer of at least 1, got -1"),
        ({"top_k": 2.5}, r"top_k must be an integer of at least 1, got 2.5"),
        ({"margin": -0.1}, r"margin must be a finite number of at least 0, got -0.1"),
        ({"form": "quadruplet"}, r"form must be 'contrastive' or 'triplet', got 'quadruplet'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RACTLoss(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, r, y: (e, None, y), r"ref_emb must be given: the old model's embeddings .* got None"),
        (lambda e, r, y: (e, r[:-1], y), r"ref_emb must be shaped like embeddings, .* expected 9 rows, got 8"),
        (lambda e, r, y: (e[:0], r[:0], y[:0]), r"embeddings must not be empty, got shape \(0, 5\)"),
        (lambda e, r, y: (e * torch.nan, r, y), r"embeddings must be finite, row 0 has a NaN or an infinity"),
        (lambda e, r, y: (e, r / 0, y), r"ref_emb must be finite, row 0 has a NaN or an infinity"),
        (lambda e, r, y: (e, r.to("meta"), y), r"embeddings must be on the device of ref_emb: got cpu and meta"),
        (lambda e, r, y: (e, r, None), r"labels must be given, got None"),
        (lambda e, r, y: (e, r, y.float()), r"labels must be integers, got torch.float32"),
        (lambda e, r, y: (e, r, y[:-1]), r"labels must have one entry a row: expected 9, got 8"),
    ],
)
def test_bad_calls(change, message):
    new_emb, old_emb, labels = change(*pairs())
    with pytest.raises(ValueError, match=message):
        RACTLoss()(new_emb, labels, ref_emb=old_emb)


def test_labels_of_other_rows_and_tuples_are_refused():
    new_emb, old_emb, labels = pairs()
    with pytest.raises(ValueError, match=r"ref_labels must equal labels, as row i of ref_emb is the item of row i"):
        RACTLoss()(new_emb, labels, ref_emb=old_emb, ref_labels=labels.flip(0))
    with pytest.raises(ValueError, match=r"indices_tuple is not supported"):
        RACTLoss()(new_emb, labels, (torch.zeros(1).long(),) * 3, ref_emb=old_emb)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_form
def test_gpu_gives_what_the_cpu_gives(form):
    new_emb, old_emb, labels = pairs()
    on_gpu = RACTLoss(**FORMS[form])(new_emb.cuda(), labels.cuda(), ref_emb=old_emb.cuda())
    torch.testing.assert_close(on_gpu.cpu(), RACTLoss(**FORMS[form])(new_emb, labels, ref_emb=old_emb))
