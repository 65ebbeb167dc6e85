import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import reducers

from pml_compat.losses import CompatibleLoss, D3StillLoss
from tests import reference
from tests.pairwise import pairwise

TERMS = ["point_loss", "inconsistent_loss", "consistent_loss"]


def rows(seed=0, n=7, width=5):
    generator = torch.Generator().manual_seed(seed)
    new, old = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
    return (new + 0.5 * old).requires_grad_(), old


def stored(seed=9, n=30, width=5):
    return 3 * torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weighted(point, inconsistent, consistent):
    return {"point_weight": point, "inconsistent_weight": inconsistent, "consistent_weight": consistent}


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("gallery", [None, stored(), stored(n=2), stored(n=1)])
@pytest.mark.parametrize("top_k", [3, 5, 10])
@pytest.mark.parametrize("weights", [None, (1.0, 0.0, 3.0), (0.0, 4.0, 0.5)])
def test_matches_naive_loop(seed, gallery, top_k, weights):
    new, old = rows(seed)
    loss_func = D3StillLoss(gallery, top_k, **({} if weights is None else weighted(*weights)))
    loss = loss_func(new, ref_emb=old)
    given = None if gallery is None else gallery.numpy()
    expected = reference.d3still_terms(new.detach().numpy(), old.numpy(), given, top_k, weights or (50, 2, 1))
    assert [float(loss_func.terms[name]) for name in TERMS] == pytest.approx(expected, rel=1e-12)
    assert loss.item() == pytest.approx(sum(expected), rel=1e-12)


def test_by_hand():
    """From the old row the neighbours are at cosines 1 and 0.6, from the new one at 0.6 and 1."""
    gallery = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    loss_func = D3StillLoss(gallery, **weighted(1, 1, 1))
    loss_func(torch.tensor([[3.0, 4.0]]), ref_emb=torch.tensor([[2.0, 0.0]]))
    error = (0.4 + 0.4) / (0.1 + 0.4)  # of 2 of 4 pairs
    found = [float(loss_func.terms[name]) for name in TERMS]
    assert found == pytest.approx([0.4, error / 2**0.5, 0.0], abs=1e-6)
    loss_func(torch.tensor([[1.0, 0.0]]), ref_emb=torch.tensor([[8.0, 4.0]]))  # 0.894 and 0.894: equally near
    found = [float(loss_func.terms[name]) for name in TERMS]
    assert found == pytest.approx([1 - 0.8**0.5, 0.0, 0.4 / 0.1 / 2**0.5], abs=1e-4)


def test_pairs_that_are_equally_near_count_as_they_are():
    """In public code a difference of 0 becomes 1, also that of a neighbour to itself."""
    old, gallery = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.6, 0.8, 0.0], [0.6, 0.0, 0.8]])
    loss_func = D3StillLoss(gallery, **weighted(0, 1, 1))
    assert loss_func(old.clone(), ref_emb=old) == 0
    assert loss_func(torch.tensor([[0.0, 1.0, 0.0]]), ref_emb=old).item() == pytest.approx(0.8 / 0.1 / 2**0.5)


def test_the_point_term_does_not_depend_on_the_size_of_the_batch():
    new, old = rows()
    loss_func = D3StillLoss(stored())
    twice = loss_func(torch.cat([new, new]), ref_emb=torch.cat([old, old]))
    torch.testing.assert_close(twice, loss_func(new, ref_emb=old))


@pytest.mark.parametrize("gallery", [None, stored()])
def test_gradcheck_and_no_gradient_for_what_is_old(gallery):
    new, old = rows(n=5)
    old.requires_grad_()
    loss_func = D3StillLoss(gallery, 4)
    assert torch.autograd.gradcheck(lambda x: loss_func(x, ref_emb=old.detach()), new)
    loss_func(new, ref_emb=old).backward()
    assert old.grad is None and new.grad.abs().sum() > 0


@pytest.mark.parametrize("gallery", [None, stored()])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_where_new_is_old_there_is_nothing_to_learn(gallery, n):
    _, old = rows(n=n)
    new = old.clone().requires_grad_()
    loss = D3StillLoss(gallery)(new, ref_emb=old)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and new.grad.abs().max() < 1e-12


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_for_a_difference_leave_the_points(n):
    new, old = rows(n=n)
    loss_func = D3StillLoss()
    loss = loss_func(new, ref_emb=old)
    loss.backward()
    assert loss == loss_func.terms["point_loss"] > 0 and new.grad.isfinite().all()


@pytest.mark.parametrize("which", ["new", "old", "gallery"])
def test_rows_of_length_0(which):
    (new, old), gallery = rows(), stored()
    new = new.detach().clone()
    {"new": new, "old": old, "gallery": gallery}[which][2] = 0
    new.requires_grad_()
    D3StillLoss(gallery)(new, ref_emb=old).backward()
    assert new.grad.isfinite().all() and (which != "new" or not new.grad[2].any())


@pytest.mark.parametrize("gallery", [None, stored()])
def test_order_lengths_and_rotations_do_not_matter(gallery):
    new, old = rows()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    expected = D3StillLoss(gallery)(new, ref_emb=old)
    torch.testing.assert_close(D3StillLoss(gallery)(new[order], ref_emb=old[order]), expected)
    torch.testing.assert_close(D3StillLoss(gallery)(5 * new, ref_emb=0.1 * old), expected)
    rotation = torch.linalg.qr(stored(n=5)).Q
    turned = D3StillLoss(None if gallery is None else gallery @ rotation)
    torch.testing.assert_close(turned(new @ rotation, ref_emb=old @ rotation), expected)


@pytest.mark.parametrize("width", [3, 9])
def test_other_widths_are_fitted(width):
    new, old = rows(width=5)[0].detach(), rows(seed=1)[1]
    new = torch.nn.functional.pad(new, (0, width))[:, :width]
    fitted = torch.nn.functional.pad(new, (0, max(0, 5 - width)))[:, :5]
    torch.testing.assert_close(D3StillLoss()(new, ref_emb=old), D3StillLoss()(fitted, ref_emb=old))


@pairwise
@pytest.mark.parametrize("gallery", [None, stored().float()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_low_precision_is_computed_in_float32(gallery, dtype, autocast):
    new, old = (one.detach().to(dtype) for one in rows())
    new.requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = D3StillLoss(gallery)(new, ref_emb=old)
    loss.backward()
    assert loss.dtype == torch.float32 and new.grad.dtype == dtype
    torch.testing.assert_close(loss, D3StillLoss(gallery)(new.detach().float(), ref_emb=old.float()))


def test_each_term_has_one_loss_a_row():
    new, old = rows()
    found = D3StillLoss(reducer=reducers.DoNothingReducer())(new, ref_emb=old)
    assert list(found) == TERMS and all(term["losses"].shape == (7,) for term in found.values())


def test_beside_a_task_loss():
    new, old = rows()
    labels = torch.arange(7) % 2
    both = CompatibleLoss(pml_losses.ContrastiveLoss(), D3StillLoss(stored()), weights=2.0)
    expected = pml_losses.ContrastiveLoss()(new, labels) + 2 * D3StillLoss(stored())(new, ref_emb=old)
    torch.testing.assert_close(both(new, labels, ref_emb=old), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gallery": torch.ones(5)}, r"gallery must be 2-dimensional, \(N, D\), got shape \(5,\)"),
        ({"top_k": 2}, r"top_k must be an integer of at least 3, got 2"),
        ({"point_weight": -1.0}, r"point_weight must be a finite number of at least 0, got -1.0"),
        ({"inconsistent_weight": -1.0}, r"inconsistent_weight must be a finite number of at least 0, got -1.0"),
        ({"consistent_weight": -1.0}, r"consistent_weight must be a finite number of at least 0, got -1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        D3StillLoss(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, r: (e, None), r"ref_emb must be given: the old model's embeddings .* got None"),
        (lambda e, r: (e, r[:-1]), r"ref_emb must be shaped like embeddings, .* expected 7 rows, got 6"),
        (lambda e, r: (e, r[:, :4]), r"ref_emb must be 5 wide, got width 4"),
        (lambda e, r: (e * torch.nan, r), r"embeddings must be finite, row 0 has a NaN or an infinity"),
        (lambda e, r: (e, r / 0), r"ref_emb must be finite, row 0 has a NaN or an infinity"),
        (lambda e, r: (e.to("meta"), r.to("meta")), r"embeddings must be on the device of the loss: got meta and cpu"),
    ],
)
def test_bad_calls(change, message):
    new, old = change(*rows())
    with pytest.raises(ValueError, match=message):
        D3StillLoss(stored(), point_weight=0.0)(new, ref_emb=old)


def test_pairs_and_triplets_are_refused():
    new, old = rows()
    with pytest.raises(ValueError, match=r"indices_tuple is not supported"):
        D3StillLoss()(new, torch.arange(7), (torch.zeros(1).long(),) * 3, ref_emb=old)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("gallery", [None, stored()])
def test_gpu_gives_what_the_cpu_gives(gallery):
    new, old = rows()
    on_gpu = D3StillLoss(gallery).cuda()(new.cuda(), ref_emb=old.cuda())
    torch.testing.assert_close(on_gpu.cpu(), D3StillLoss(gallery)(new, ref_emb=old))
