import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import reducers

from pml_compat.frozen import FrozenEmbeddings
from pml_compat.losses import CompatibleLoss, CSDLoss, old_neighbours
from tests import reference
from tests.pairwise import pairwise


def rows(seed=0, n=7, width=5):
    generator = torch.Generator().manual_seed(seed)
    new, old = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
    return new.requires_grad_(), old


def stored(seed=9, n=30, width=5):
    return 3 * torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("gallery", [None, stored(), stored(n=2)])
@pytest.mark.parametrize("top_k", [2, 4, 96])
@pytest.mark.parametrize("temperatures", [(0.1, None), (1.0, 0.2)])
def test_matches_naive_loop(seed, gallery, top_k, temperatures):
    new, old = rows(seed)
    loss_func = CSDLoss(gallery, top_k, *temperatures, reducer=reducers.DoNothingReducer())
    found = loss_func(new, ref_emb=old)["loss"]
    given = None if gallery is None else gallery.numpy()
    temperature, old_temperature = temperatures[0], temperatures[1] or temperatures[0]
    expected = reference.csd_losses(new.detach().numpy(), old.numpy(), given, top_k, temperature, old_temperature)
    torch.testing.assert_close(found["losses"], torch.tensor(expected, dtype=torch.float64))
    assert found["reduction_type"] == "element" and max(expected) > 0
    assert CSDLoss(gallery, top_k, *temperatures)(new, ref_emb=old).item() == pytest.approx(np.mean(expected))


def test_by_hand():
    """Old similarities 1 and 0, new ones 0 and 1: log 3 apart, with probabilities 3/4 and 1/4."""
    scale = 1 / np.log(3)
    loss_func = CSDLoss(torch.tensor([[0.0, 5.0], [-1.0, 0.0]]), 2, temperature=scale)
    loss = loss_func(torch.tensor([[0.0, 2.0]]), ref_emb=torch.tensor([[3.0, 0.0]]))
    assert loss.item() == pytest.approx(0.5 * np.log(3))


@pytest.mark.parametrize("at_once", [1, 4, 7, 1000])
@pytest.mark.parametrize("count", [1, 5, 12, 40])
def test_neighbours_are_the_same_however_the_gallery_is_read(at_once, count, monkeypatch):
    monkeypatch.setattr(old_neighbours, "_AT_ONCE", at_once)
    old, gallery = (torch.nn.functional.normalize(each, dim=1) for each in (rows()[1], stored()))
    order = (old @ gallery.t()).argsort(dim=1, descending=True)[:, :count]
    assert old_neighbours.nearest_old_rows(old, gallery, count).equal(gallery[order])


def test_a_gallery_is_read_in_parts():
    """No tensor of all similarities is made, nor of all rows for each of the batch."""
    seen = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            seen.extend(one.numel() for one in (found if isinstance(found, tuple) else [found]) if torch.is_tensor(one))
            return found

    loss_func = CSDLoss(torch.randn(50_000, 4))
    new, old = (each.detach().float() for each in rows(n=8, width=4))
    with Sizes():
        loss_func(new, ref_emb=old)
    assert max(seen) <= 8 * old_neighbours._AT_ONCE < 8 * 50_000


def test_an_item_is_no_neighbour_of_itself_in_its_batch_by_its_place_alone():
    """Another item with the same old embedding is one."""
    old = torch.eye(3, dtype=torch.float64)[[0, 0, 1]]
    found = old_neighbours.nearest_old_rows(old, None, 1)[:, 0]
    assert found[:2].equal(old[:2])


def test_a_gallery_may_be_half_a_map_or_frozen_embeddings(tmp_path):
    new, old = rows()
    gallery = stored().float()
    expected = CSDLoss(gallery)(new, ref_emb=old)
    np.save(tmp_path / "gallery.npy", gallery.numpy())
    frozen = FrozenEmbeddings.write(tmp_path / "frozen", [(gallery, torch.arange(30))])
    for given in (gallery.numpy(), np.load(tmp_path / "gallery.npy", mmap_mode="r"), frozen):
        torch.testing.assert_close(CSDLoss(given)(new, ref_emb=old), expected)
    half = CSDLoss(gallery.half())
    assert half.old_gallery.dtype == torch.float16 and not half.state_dict()
    torch.testing.assert_close(half(new, ref_emb=old), expected, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("gallery", [None, stored()])
def test_gradcheck_and_no_gradient_for_what_is_old(gallery):
    new, old = rows(n=4)
    old.requires_grad_()
    loss_func = CSDLoss(gallery, 4, 0.5)
    assert torch.autograd.gradcheck(lambda x: loss_func(x, ref_emb=old.detach()), new)
    loss_func(new, ref_emb=old).backward()
    assert old.grad is None and new.grad.abs().sum() > 0


@pytest.mark.parametrize("gallery", [None, stored()])
@pytest.mark.parametrize("n", [1, 3])
def test_where_new_is_old_there_is_nothing_to_learn(gallery, n):
    _, old = rows(n=n)
    new = (3 * old).requires_grad_()
    loss = CSDLoss(gallery)(new, ref_emb=old)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14) and new.grad.abs().max() < 1e-12


def test_the_temperatures_of_public_code_have_their_minimum_elsewhere():
    _, old = rows()
    new = old.clone().requires_grad_()
    CSDLoss(temperature=1.0, old_temperature=0.01)(new, ref_emb=old).backward()
    assert new.grad.abs().max() > 1e-3


def test_one_item_alone_is_a_zero_with_a_gradient():
    new, old = rows(n=1)
    loss = CSDLoss()(new, ref_emb=old)
    loss.backward()
    assert loss.item() == 0 and not new.grad.any()


@pytest.mark.parametrize("which", ["new", "old", "gallery"])
def test_rows_of_length_0(which):
    (new, old), gallery = rows(), stored()
    new = new.detach().clone()
    {"new": new, "old": old, "gallery": gallery}[which][2] = 0
    new.requires_grad_()
    CSDLoss(gallery)(new, ref_emb=old).backward()
    assert new.grad.isfinite().all() and (which != "new" or not new.grad[2].any())


@pytest.mark.parametrize("gallery", [None, stored()])
def test_order_and_lengths_do_not_matter(gallery):
    new, old = rows()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    expected = CSDLoss(gallery)(new, ref_emb=old)
    torch.testing.assert_close(CSDLoss(gallery)(new[order], ref_emb=old[order]), expected)
    torch.testing.assert_close(CSDLoss(gallery)(5 * new, ref_emb=0.1 * old), expected)
    if gallery is not None:
        torch.testing.assert_close(CSDLoss(gallery.flip(0) * 7)(new, ref_emb=old), expected)


def test_a_rotation_of_everything_changes_nothing():
    (new, old), gallery = rows(), stored()
    rotation = torch.linalg.qr(stored(n=5)).Q
    turned = CSDLoss(gallery @ rotation, 6)(new @ rotation, ref_emb=old @ rotation)
    torch.testing.assert_close(turned, CSDLoss(gallery, 6)(new, ref_emb=old))


@pytest.mark.parametrize("width", [3, 9])
def test_other_widths_are_fitted(width):
    new, old = rows(width=width)[0], rows(seed=1)[1]
    fitted = torch.nn.functional.pad(new, (0, max(0, 5 - width)))[:, :5]
    torch.testing.assert_close(CSDLoss()(new, ref_emb=old), CSDLoss()(fitted, ref_emb=old))


@pairwise
@pytest.mark.parametrize("gallery", [None, stored().float()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_low_precision_is_computed_in_float32(gallery, dtype, autocast):
    new, old = (one.detach().to(dtype) for one in rows())
    new.requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = CSDLoss(gallery)(new, ref_emb=old)
    loss.backward()
    assert loss.dtype == torch.float32 and new.grad.dtype == dtype
    torch.testing.assert_close(loss, CSDLoss(gallery)(new.detach().float(), ref_emb=old.float()))


def test_beside_a_task_loss():
    new, old = rows()
    labels = torch.arange(7) % 2
    both = CompatibleLoss(pml_losses.ContrastiveLoss(), CSDLoss(stored()), weights=2.0)
    expected = pml_losses.ContrastiveLoss()(new, labels) + 2 * CSDLoss(stored())(new, ref_emb=old)
    torch.testing.assert_close(both(new, labels, ref_emb=old), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gallery": torch.ones(5)}, r"gallery must be 2-dimensional, \(N, D\), got shape \(5,\)"),
        ({"gallery": torch.full((3, 5), torch.nan)}, r"gallery must be finite, row 0 has a NaN"),
        ({"gallery": torch.ones(0, 5)}, r"gallery must not be empty"),
        ({"top_k": 1}, r"top_k must be an integer of at least 2, got 1"),
        ({"temperature": 0}, r"temperature must be a finite number above 0, got 0"),
        ({"old_temperature": -1.0}, r"old_temperature must be a finite number above 0, got -1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        CSDLoss(**options)


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
        CSDLoss(stored())(new, ref_emb=old)


def test_pairs_and_triplets_are_refused():
    new, old = rows()
    with pytest.raises(ValueError, match=r"indices_tuple is not supported"):
        CSDLoss()(new, torch.arange(7), (torch.zeros(1).long(),) * 3, ref_emb=old)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("gallery", [None, stored()])
def test_gpu_gives_what_the_cpu_gives(gallery):
    new, old = rows()
    on_gpu = CSDLoss(gallery).cuda()(new.cuda(), ref_emb=old.cuda())
    torch.testing.assert_close(on_gpu.cpu(), CSDLoss(gallery)(new, ref_emb=old))
