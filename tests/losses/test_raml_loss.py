import pytest
import torch
from pytorch_metric_learning import reducers

from pml_compat.losses import RAMLLoss
from tests import reference


def rows(seed=0, n=7, width=5):
    generator = torch.Generator().manual_seed(seed)
    new, old = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
    return new.requires_grad_(), old


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("weights", [{}, {"cross_weight": 2.0, "self_weight": 0.0}, {"cross_weight": 0.0}])
def test_matches_naive_loop(seed, weights):
    new, old = rows(seed)
    loss_func = RAMLLoss(**weights)
    loss = loss_func(new, ref_emb=old)
    given = {"cross_weight": 0.7482, "self_weight": 0.6778} | weights
    expected = reference.raml_terms(new.detach().numpy(), old.numpy(), **given)
    assert loss.item() == pytest.approx(sum(expected.values()), rel=1e-12)
    assert {name: float(term) for name, term in loss_func.terms.items()} == pytest.approx(expected, rel=1e-12)


def test_by_hand():
    """Old rows are alike, new ones at a right angle: each pair misses 1 of the new gallery, (0, 1) half of the old."""
    new, old = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [3.0, 0.0]])
    loss_func = RAMLLoss(cross_weight=1.0, self_weight=1.0)
    assert float(loss_func(new, ref_emb=old)) == pytest.approx(0.5 + 0.5 + 1.0)


def test_gradcheck_and_no_gradient_for_what_is_old():
    new, old = rows(n=4)
    old.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: RAMLLoss()(x, ref_emb=old.detach()), new)
    RAMLLoss()(new, ref_emb=old).backward()
    assert old.grad is None and new.grad.abs().sum() > 0


@pytest.mark.parametrize("n", [1, 3])
def test_where_new_is_old_there_is_nothing_to_learn(n):
    _, old = rows(n=n)
    new = (3 * old).requires_grad_()
    loss = RAMLLoss()(new, ref_emb=old)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15) and new.grad.abs().max() < 1e-12


def test_rows_of_length_0_get_no_gradient():
    new, old = rows()
    new = new.detach().clone()
    new[2] = 0
    new.requires_grad_()
    RAMLLoss()(new, ref_emb=old).backward()
    assert new.grad.isfinite().all() and not new.grad[2].any()


def test_order_and_lengths_do_not_matter():
    new, old = rows()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(RAMLLoss()(new[order], ref_emb=old[order]), RAMLLoss()(new, ref_emb=old))
    torch.testing.assert_close(RAMLLoss()(5 * new, ref_emb=0.1 * old), RAMLLoss()(new, ref_emb=old))


@pytest.mark.parametrize("width", [3, 9])
def test_other_widths_are_fitted(width):
    new, _ = rows(width=width)
    old = rows(seed=1)[1]
    fitted = torch.nn.functional.pad(new, (0, max(0, 5 - width)))[:, :5]
    torch.testing.assert_close(RAMLLoss()(new, ref_emb=old), RAMLLoss()(fitted, ref_emb=old))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype):
    new, old = (one.detach().to(dtype) for one in rows())
    new.requires_grad_()
    loss = RAMLLoss()(new, ref_emb=old)
    loss.backward()
    assert loss.dtype == torch.float32 and new.grad.dtype == dtype
    torch.testing.assert_close(loss, RAMLLoss()(new.detach().float(), ref_emb=old.float()))


def test_a_reducer_is_for_the_rows():
    new, old = rows()
    found = RAMLLoss(reducer=reducers.DoNothingReducer())(new, ref_emb=old)
    assert found["point_loss"]["losses"].shape == (7,) and found["self_loss"]["reduction_type"] == "already_reduced"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_emb": None}, "ref_emb must be given"),
        ({"ref_emb": torch.ones(3, 5, dtype=torch.float64)}, "ref_emb"),
        ({"ref_emb": torch.full((7, 5), torch.nan, dtype=torch.float64)}, "ref_emb"),
        ({"indices_tuple": (torch.zeros(1),) * 3}, "indices_tuple"),
    ],
)
def test_errors(change, message):
    new, old = rows()
    with pytest.raises(ValueError, match=message):
        RAMLLoss()(new, **({"ref_emb": old} | change))


def test_weights_below_0_are_refused():
    for name in ("cross_weight", "self_weight"):
        with pytest.raises(ValueError, match=name):
            RAMLLoss(**{name: -1.0})
