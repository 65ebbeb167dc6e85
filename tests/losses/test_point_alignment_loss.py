import pytest
import torch
from pytorch_metric_learning import distances, reducers

from pml_compat.losses import PointAlignmentLoss
from tests import reference
from tests.pairwise import pairwise

FORMS = {
    "squared": {},
    "weakened": {"weight": 10.0, "threshold": 0.9, "squared": False},
    "distance": {"weight": 10.0, "squared": False},
    "squared beyond": {"weight": 0.5, "threshold": 0.7},
}
every_form = pytest.mark.parametrize("form", FORMS)
both_lengths = pytest.mark.parametrize("unit", [True, False])
AS_THEY_ARE = distances.LpDistance(p=2, normalize_embeddings=False)


def loss_of(form, unit=True, **kwargs):
    return PointAlignmentLoss(**FORMS[form], **({} if unit else {"distance": AS_THEY_ARE}), **kwargs)


def pairs(seed=0, n=7, width=5):
    """Return new and old embeddings; some rows are nearer than the thresholds, some are not."""
    generator = torch.Generator().manual_seed(seed)
    new_emb, noise = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
    old_emb = new_emb + noise * torch.linspace(0.1, 2, n, dtype=torch.float64)[:, None]
    return new_emb.requires_grad_(), old_emb


def naive(form, unit, new_emb, old_emb):
    options = {"weight": 1.0, "threshold": 0.0, "squared": True} | FORMS[form]
    return reference.point_alignment_losses(new_emb.detach().numpy(), old_emb.numpy(), **options, normalize=unit)


@pairwise
@every_form
@both_lengths
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_matches_naive_loop(form, unit, seed):
    new_emb, old_emb = pairs(seed)
    expected = naive(form, unit, new_emb, old_emb)
    assert ("weakened" in form or "beyond" in form) == (0.0 in expected) and max(expected) > 0
    loss = loss_of(form, unit)(new_emb, ref_emb=old_emb)
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    rows = loss_of(form, unit, reducer=reducers.DoNothingReducer())(new_emb, ref_emb=old_emb)["loss"]
    torch.testing.assert_close(rows["losses"], torch.tensor(expected, dtype=torch.float64))
    assert rows["indices"].tolist() == list(range(7)) and rows["reduction_type"] == "element"


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, [2.0, 0.0, 4.0]),
        ({"weight": 0.5}, [1.0, 0.0, 2.0]),
        ({"squared": False}, [2**0.5, 0.0, 2.0]),
        ({"weight": 10.0, "threshold": 0.2, "squared": False}, [10 * (2**0.5 - 0.2), 0.0, 18.0]),
        ({"weight": 3.0, "threshold": 1.5}, [0.0, 0.0, 0.75]),
    ],
)
def test_by_hand(options, rows):
    # a right angle, the same direction, the opposite direction
    new_emb = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    old_emb = torch.tensor([[0.0, 2.0], [0.0, 7.0], [-4.0, 0.0]])
    found = PointAlignmentLoss(**options, reducer=reducers.DoNothingReducer())(new_emb, ref_emb=old_emb)
    assert found["loss"]["losses"].tolist() == pytest.approx(rows)
    assert PointAlignmentLoss(**options)(new_emb, ref_emb=old_emb).item() == pytest.approx(sum(rows) / 3)


def test_mean_squared_error_is_this_divided_by_the_width():
    new_emb, old_emb = pairs()
    found = PointAlignmentLoss(1 / 5, distance=AS_THEY_ARE)(new_emb, ref_emb=old_emb)
    torch.testing.assert_close(found, torch.nn.functional.mse_loss(new_emb, old_emb))
    unit = [torch.nn.functional.normalize(rows, dim=1) for rows in (new_emb, old_emb)]
    torch.testing.assert_close(PointAlignmentLoss(1 / 5)(new_emb, ref_emb=old_emb), torch.nn.functional.mse_loss(*unit))


@every_form
@both_lengths
def test_gradcheck(form, unit):
    new_emb, old_emb = pairs()
    assert torch.autograd.gradcheck(lambda e: loss_of(form, unit)(e, ref_emb=old_emb), (new_emb,))


@every_form
@both_lengths
def test_ref_emb_receives_no_gradient(form, unit):
    new_emb, old_emb = pairs()
    old_emb.requires_grad_()
    before = old_emb.detach().clone()
    loss_of(form, unit)(new_emb, ref_emb=old_emb * 1.0).backward()
    assert old_emb.grad is None and old_emb.equal(before) and new_emb.grad.abs().sum() > 0


@every_form
@both_lengths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["equal", "zero new", "zero old", "both zero"])
def test_finite_gradient_where_the_distance_has_a_corner(form, unit, dtype, case):
    new_emb, old_emb = (rows.detach().to(dtype) for rows in pairs())
    if case == "equal":
        new_emb[2] = old_emb[2]
    if "zero" in case:
        new_emb[2] *= "old" not in case and "new" not in case and "both" not in case
        old_emb[2] *= "new" in case
    new_emb.requires_grad_()
    loss = loss_of(form, unit)(new_emb, ref_emb=old_emb)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new_emb.grad).all()
    if case in ("equal", "both zero"):
        assert new_emb.grad[2].abs().max() < 1e-3


@pairwise
@every_form
@both_lengths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
def test_dtypes(form, unit, dtype, autocast):
    new_emb, old_emb = pairs()
    expected = loss_of(form, unit)(new_emb, ref_emb=old_emb)
    low = new_emb.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = loss_of(form, unit)(low, ref_emb=old_emb.float())
    loss.backward()
    assert low.grad.dtype == dtype and loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5 if dtype.itemsize > 2 else 0.03)
    assert torch.isfinite(low.grad).all()


@every_form
def test_lengths_do_not_matter_to_unit_rows(form):
    new_emb, old_emb = pairs()
    factor = torch.rand(7, 1) + 0.5
    scaled = loss_of(form)(new_emb * factor, ref_emb=old_emb / factor)
    torch.testing.assert_close(scaled, loss_of(form)(new_emb, ref_emb=old_emb))


@every_form
def test_labels_change_nothing(form):
    new_emb, old_emb = pairs()
    labels, loss_func = torch.zeros(7, dtype=torch.long), loss_of(form)
    expected = loss_func(new_emb, ref_emb=old_emb)
    assert loss_func(new_emb, labels, ref_emb=old_emb, ref_labels=labels) == expected
    weighted = loss_of(form, reducer=reducers.ClassWeightedReducer(torch.tensor([2.0])))
    torch.testing.assert_close(weighted(new_emb, labels, ref_emb=old_emb), 2 * expected)


@every_form
def test_nothing_beyond_the_threshold_is_a_zero_with_a_gradient(form):
    new_emb, _ = pairs()
    loss = loss_of(form)(new_emb, ref_emb=new_emb.detach().clone())
    loss.backward()
    assert loss.item() == 0 and new_emb.grad.equal(torch.zeros_like(new_emb))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, r"weight must be a finite number of at least 0, got -1.0"),
        ({"threshold": -0.2}, r"threshold must be a finite number of at least 0, got -0.2"),
        ({"threshold": float("nan")}, r"threshold must be a finite number of at least 0, got nan"),
        ({"distance": distances.LpDistance(p=1)}, r"must be LpDistance\(p=2\), .* got LpDistance\(p=1, power=1\)"),
        (
            {"distance": distances.LpDistance(power=2)},
            r"squared by the argument squared, got LpDistance\(p=2, power=2\)",
        ),
        ({"distance": distances.CosineSimilarity()}, r"must be LpDistance\(p=2\), .* got CosineSimilarity"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PointAlignmentLoss(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, r: (e, None), r"ref_emb must be given: the old model's embeddings .* got None"),
        (lambda e, r: (e, r[:-1]), r"ref_emb must be shaped like embeddings, .* expected 7 rows, got 6"),
        (lambda e, r: (e[:0], r[:0]), r"embeddings must not be empty, got shape \(0, 5\)"),
        (lambda e, r: (e * torch.nan, r), r"embeddings must be finite, row 0 has a NaN or an infinity"),
        (lambda e, r: (e, r / 0), r"ref_emb must be finite, row 0 has a NaN or an infinity"),
        (lambda e, r: (e, r.long()), r"ref_emb must be floating point, got torch.int64"),
        (lambda e, r: (e, r.to("meta")), r"embeddings must be on the device of ref_emb: got cpu and meta"),
    ],
)
def test_bad_calls(change, message):
    new_emb, old_emb = change(*pairs())
    with pytest.raises(ValueError, match=message):
        PointAlignmentLoss()(new_emb, ref_emb=old_emb)


def test_pairs_and_triplets_are_refused():
    new_emb, old_emb = pairs()
    with pytest.raises(ValueError, match=r"indices_tuple is not supported"):
        PointAlignmentLoss()(new_emb, torch.arange(7), (torch.zeros(1).long(),) * 3, ref_emb=old_emb)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_form
def test_gpu_gives_what_the_cpu_gives(form):
    new_emb, old_emb = pairs()
    on_gpu = loss_of(form)(new_emb.cuda(), ref_emb=old_emb.cuda())
    torch.testing.assert_close(on_gpu.cpu(), loss_of(form)(new_emb, ref_emb=old_emb))
