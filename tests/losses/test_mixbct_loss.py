import copy
import io
import pickle

import pytest
import torch
from pytorch_metric_learning import losses, reducers

from pml_compat.losses import MixBCTLoss
from tests import reference

WIDTH, CLASSES = 6, 4


def batch(seed=0, n=20, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    new, old = torch.randn(2, n, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return new.requires_grad_(), torch.arange(n) % CLASSES, old * 3 + 1


def loss_of(weights=0, dtype=torch.float64, draw_weight=0.0, **kwargs):
    torch.manual_seed(weights)
    task_loss = losses.NormalizedSoftmaxLoss(CLASSES, WIDTH, temperature=0.2).to(dtype)
    return MixBCTLoss(task_loss, draw_weight=draw_weight, **kwargs)


def mixed_rows(loss_func, n=20, **kwargs):
    """Return which rows a call replaces: those that get no gradient."""
    new, labels, old = batch(n=n)
    loss_func(new, labels, ref_emb=old, **kwargs).backward()
    return (new.grad == 0).all(1)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_matches_naive_loop(seed, share):
    loss_func = loss_of(seed, share=share, seed=seed)
    replaced = mixed_rows(copy.deepcopy(loss_func)).tolist()
    assert sum(replaced) == int(20 * share)
    new, labels, old = batch(seed)
    rows = [reference.unit(o) if r else e for e, o, r in zip(new.detach().numpy(), old.numpy(), replaced, strict=True)]
    expected = reference.cosine_losses(rows, loss_func.loss.W.detach().t().numpy(), 5.0, labels.tolist())
    loss = loss_func(new, labels, ref_emb=old)
    assert loss.item() == pytest.approx(sum(expected) / 20, rel=1e-12)
    assert loss_func.terms == {"task_loss": loss.detach(), "draw_loss": 0}
    loss.backward()
    assert loss_func.loss.W.grad.abs().sum() > 0


def test_by_hand():
    """All rows replaced: the new embeddings count for nothing, and the old ones at length 1."""
    loss_func = MixBCTLoss(losses.ContrastiveLoss(pos_margin=0, neg_margin=0), share=1, draw_weight=0.0)
    new = torch.tensor([[9.0, 1.0], [-7.0, 2.0]], requires_grad=True)
    loss = loss_func(new, torch.tensor([0, 0]), ref_emb=torch.tensor([[5.0, 0.0], [0.0, 0.1]]))
    loss.backward()
    assert loss.item() == pytest.approx(2**0.5) and new.grad.equal(torch.zeros_like(new))


def test_old_rows_come_in_at_length_one():
    class Lengths(torch.nn.Module):
        def forward(self, embeddings, labels, indices_tuple=None):
            return embeddings.norm(dim=1).sum()

    new, labels, old = batch()
    loss_func = MixBCTLoss(Lengths(), share=0.5, draw_weight=0.0)
    replaced = mixed_rows(copy.deepcopy(loss_func))
    expected = torch.where(replaced, torch.ones(20, dtype=torch.float64), new.norm(dim=1)).sum()
    torch.testing.assert_close(loss_func(new, labels, ref_emb=old), expected)


def test_every_row_is_drawn_equally_often():
    loss_func, counts = loss_of(share=0.3), torch.zeros(20)
    for _ in range(400):
        counts += mixed_rows(loss_func)
    assert counts.sum() == 400 * 6
    assert (counts - 120).abs().max() < 50  # 5.5 standard deviations


@pytest.mark.parametrize(
    ("n", "share", "expected"), [(3, 0.3, 0), (4, 0.3, 1), (100, 0.29, 29), (10, 0.3, 3), (1, 1, 1)]
)
def test_share_is_rounded_down(n, share, expected):
    assert mixed_rows(loss_of(share=share), n).sum() == expected


@pytest.mark.parametrize("through", ["credible", "ref_labels"])
def test_only_credible_rows_are_replaced(through):
    loss_func, labels = loss_of(share=0.3, collect_stats=True), batch()[1]
    for number in (0, 2, 6, 20):  # 6 are wanted: fewer are no error
        credible = torch.zeros(20, dtype=torch.bool).index_fill_(0, torch.randperm(20)[:number], True)
        how = {"credible": credible} if through == "credible" else {"ref_labels": torch.where(credible, labels, -1)}
        replaced = mixed_rows(loss_func, **how)
        assert replaced.sum() == min(number, 6) and not (replaced & ~credible).any()
        assert loss_func.mixed_fraction == pytest.approx(min(number, 6) / 20)
        assert loss_func.task_loss == loss_func.terms["task_loss"].item()


def test_both_ways_to_say_credible_must_agree_on_a_row():
    first, second = torch.arange(20) < 10, torch.arange(20) >= 5
    loss_func, labels = loss_of(share=1.0), batch()[1]
    replaced = mixed_rows(loss_func, credible=first, ref_labels=torch.where(second, labels, -1))
    assert replaced.equal(first & second)


def test_eval_mode_is_the_task_loss_and_draws_nothing():
    loss_func = loss_of().eval()
    new, labels, old = batch()
    state = loss_func.get_extra_state()
    assert loss_func(new, labels, ref_emb=old) == loss_func(new, labels) == loss_func.loss(new, labels)
    assert loss_func.get_extra_state().equal(state)


def test_pairs_go_to_the_task_loss():
    new, labels, old = batch()
    loss_func = MixBCTLoss(losses.TripletMarginLoss(), share=0.4, draw_weight=0.0)
    chosen = mixed_rows(copy.deepcopy(loss_func))
    triplets = torch.tensor([0, 1]), torch.tensor([4, 5]), torch.tensor([2, 3])
    mixed = torch.where(chosen[:, None], torch.nn.functional.normalize(old), new)
    loss = loss_func(new, labels, triplets, ref_emb=old)
    torch.testing.assert_close(loss, losses.TripletMarginLoss()(mixed, labels, triplets))


def test_the_draw_is_its_own():
    """Neither does it touch torch's generator, nor is it touched by it."""
    loss_func = loss_of()
    state = torch.get_rng_state()
    mixed_rows(loss_func)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(99)
    draws = [mixed_rows(MixBCTLoss(loss_func.loss, seed=seed, draw_weight=0.0)) for seed in (0, 0, 1)]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])


def test_a_resumed_training_draws_what_it_would_have():
    loss_func = loss_of()
    for _ in range(3):
        mixed_rows(loss_func)
    file = io.BytesIO()
    torch.save(loss_func.state_dict(), file)
    resumed = loss_of(1, seed=1)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    others = [resumed, copy.deepcopy(loss_func), pickle.loads(pickle.dumps(loss_func))]
    for _ in range(3):
        expected = mixed_rows(loss_func)
        assert all(mixed_rows(other).equal(expected) for other in others)


def test_a_copy_has_its_own_generator():
    loss_func = loss_of()
    duplicate = copy.deepcopy(loss_func)
    mixed_rows(duplicate)
    assert not duplicate.get_extra_state().equal(loss_func.get_extra_state())


def test_gradcheck():
    new, labels, old = batch(n=8)
    assert torch.autograd.gradcheck(lambda rows: loss_of(share=0.5)(rows, labels, ref_emb=old), (new,))


def test_inputs_stay_and_old_rows_get_no_gradient():
    new, labels, old = batch()
    before, old = (new.detach().clone(), old.clone()), old.requires_grad_()
    loss_of()(new * 1.0, labels, ref_emb=old * 1.0).backward()
    assert old.grad is None and new.equal(before[0]) and old.equal(before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_dtypes(dtype, autocast):
    new, labels, old = batch()
    expected = loss_of()(new, labels, ref_emb=old)
    loss_func = loss_of(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    before, low = loss_func.loss.W.dtype, new.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = loss_func(low, labels, ref_emb=old.float())
    loss.backward()
    assert (
        low.grad.dtype == dtype
        and loss.dtype == torch.promote_types(dtype, torch.float32)
        and loss_func.loss.W.dtype == before
    )
    assert ((low.grad == 0).all(1)).sum() == 6
    exact = dtype.itemsize > 2 and autocast is None  # autocast rules the task loss as it does without us
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5 if exact else 0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", ["equal", "zero old"])
def test_finite_gradient_at_corners(dtype, case):
    new, labels, old = batch(dtype=dtype)
    old = new.detach().clone() if case == "equal" else torch.zeros_like(old)
    loss_func = loss_of(dtype=torch.float32, share=0.5)
    loss = loss_func(new, labels, ref_emb=old)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all() and torch.isfinite(loss_func.loss.W.grad).all()


def test_order_of_rows_changes_nothing_where_all_credible_rows_are_taken():
    new, labels, old = batch()
    order, credible = torch.randperm(20), torch.arange(20) % 3 == 0
    loss_func = loss_of(share=0.5)
    expected = loss_func(new, labels, ref_emb=old, credible=credible)
    permuted = loss_func(new[order], labels[order], ref_emb=old[order], credible=credible[order])
    torch.testing.assert_close(permuted, expected)


@pytest.mark.parametrize("reducer", [None, reducers.MultipleReducers({"task_loss": reducers.SumReducer()})])
def test_the_term_is_kept_with_any_reducer(reducer):
    new, labels, old = batch()
    loss_func = loss_of(reducer=reducer)
    assert loss_func.terms == {}
    loss = loss_func(new, labels, ref_emb=old)
    assert loss_func.terms == {"task_loss": loss.detach(), "draw_loss": 0}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"share": -0.1}, "share must be a finite number of at least 0, got -0.1"),
        ({"share": 1.1}, "share must be at most 1, got 1.1"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": None}, "seed must be an integer of at least 0, got None"),
        ({"loss": "arcface"}, "loss must be a PML loss object, got 'arcface'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MixBCTLoss(**{"loss": losses.ContrastiveLoss(), **kwargs})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_emb": None}, "ref_emb must be given: the old model's embeddings"),
        ({"ref_emb": torch.ones(19, 6)}, r"ref_emb must be shaped like embeddings, .* 20 rows, got 19"),
        ({"ref_emb": torch.full((20, 6), torch.inf)}, "ref_emb must be finite, row 0"),
        ({"credible": torch.ones(20)}, r"credible must be a bool tensor .* \(20,\), got torch.float32 \(20,\)"),
        ({"credible": torch.ones(3).bool()}, r"credible must be a bool tensor .* \(20,\), got torch.bool \(3,\)"),
        ({"credible": 0.9}, r"credible must be a bool tensor .* got 0.9"),
        ({"ref_labels": torch.zeros(20).long()}, "ref_labels must equal labels"),
        ({"labels": None}, "labels must be given, got None"),
        ({"labels": torch.full((20,), 4)}, r"labels must be in \[0, 3\], the task loss's classes, got 4"),
        ({"embeddings": torch.ones(0, 6)}, "embeddings must not be empty"),
    ],
)
def test_bad_calls(change, message):
    new, labels, old = batch()
    with pytest.raises(ValueError, match=message):
        loss_of()(**{"embeddings": new, "labels": labels, "ref_emb": old, **change})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_draws_what_the_cpu_draws():
    new, labels, old = batch()
    on_gpu = loss_of().cuda()(new.cuda(), labels, ref_emb=old.cuda())
    torch.testing.assert_close(on_gpu.cpu(), loss_of()(new, labels, ref_emb=old))
