import math

import pytest
import torch
from pytorch_metric_learning import distances, reducers

from pml_compat.losses import FCTLoss
from tests import reference
from tests.pairwise import pairwise

DISTANCES = {
    "squared": lambda: None,
    "unit": lambda: distances.LpDistance(p=2, power=2),
    "cosine": distances.CosineSimilarity,
}
every_distance = pytest.mark.parametrize("kind", DISTANCES)


def loss_of(kind, **kwargs):
    return FCTLoss(distance=DISTANCES[kind](), **kwargs)


def pairs(seed=0, n=7, width=5):
    """Return what a transformation gives, and the new embeddings."""
    generator = torch.Generator().manual_seed(seed)
    mapped, target = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
    return mapped.requires_grad_(), target * 3 - 1


@every_distance
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_matches_naive_loop(kind, seed):
    mapped, target = pairs(seed)
    expected = reference.fct_losses(mapped.detach().numpy(), target.numpy(), kind)
    assert loss_of(kind)(mapped, ref_emb=target).item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    rows = loss_of(kind, reducer=reducers.DoNothingReducer())(mapped, ref_emb=target)["loss"]
    torch.testing.assert_close(rows["losses"], torch.tensor(expected, dtype=torch.float64))
    assert rows["indices"].tolist() == list(range(7)) and rows["reduction_type"] == "element"


@pytest.mark.parametrize(("kind", "rows"), [("squared", [12.5, 4.0]), ("unit", [1.0, 2.0]), ("cosine", [1.0, 2.0])])
def test_by_hand(kind, rows):
    # a right angle at lengths 3 and 4, then the opposite direction, 2 sqrt(2) apart
    mapped, target = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 4.0], [-1.0, -1.0]])
    assert loss_of(kind)(mapped, ref_emb=target).item() == pytest.approx(sum(rows) / 2)
    assert loss_of(kind, reducer=reducers.SumReducer())(mapped, ref_emb=target).item() == pytest.approx(sum(rows))
    above = loss_of(kind, reducer=reducers.ThresholdReducer(low=1.5))(mapped, ref_emb=target)
    assert above.item() == pytest.approx(sum(row for row in rows if row > 1.5) / sum(row > 1.5 for row in rows))


LABELS = torch.tensor([3, 1, 3, 2, 1, 3, 0])


@pairwise
@every_distance
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("weight", "temperature"), [(0.1, 0.1), (2.0, 0.5)])
def test_contrast_matches_naive_loop(kind, seed, weight, temperature):
    mapped, target = pairs(seed)
    rows = mapped.detach().numpy(), target.numpy()
    aligned, contrast = reference.fct_losses(*rows, kind), reference.fct_contrast(*rows, LABELS.tolist(), temperature)
    expected = [a + weight * c for a, c in zip(aligned, contrast, strict=True)]
    loss_func = loss_of(kind, contrast_weight=weight, temperature=temperature, reducer=reducers.DoNothingReducer())
    found = loss_func(mapped, LABELS, ref_emb=target)["loss"]["losses"]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_contrast_of_rows_that_are_their_own_class():
    mapped, target = pairs()
    found = loss_of("cosine", contrast_weight=2.0, temperature=0.05)(mapped, torch.arange(7), ref_emb=target)
    cosines = torch.nn.functional.cosine_similarity(target[:, None], mapped[None], dim=2)
    expected = (1 - cosines.diag()).mean() + 2 * torch.nn.functional.cross_entropy(cosines / 0.05, torch.arange(7))
    torch.testing.assert_close(found, expected)


def test_contrast_by_hand():
    mapped, target = torch.tensor([[2.0, 0.0], [0.0, 5.0]]), torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    loss_func = FCTLoss(contrast_weight=0.5, temperature=0.5, distance=distances.CosineSimilarity())
    # both new ones are on the second mapped one, cosines 0 and 1 over 0.5: the first misses log(1 + e^2), the second
    # log(1 + e^-2), and the first is at a right angle to its own
    expected = 0.5 * (1 + 0) + 0.5 * 0.5 * (math.log(1 + math.exp(2)) + math.log(1 + math.exp(-2)))
    assert loss_func(mapped, torch.tensor([7, 8]), ref_emb=target).item() == pytest.approx(expected)
    one_class = loss_func(mapped, torch.tensor([7, 7]), ref_emb=target)  # each finds half of it
    assert one_class.item() == pytest.approx(0.5 + 0.5 * (math.log(1 + math.exp(2)) - 1))


@every_distance
def test_contrast_gradient(kind):
    mapped, target = pairs()
    loss_func = loss_of(kind, contrast_weight=0.7)
    assert torch.autograd.gradcheck(lambda e: loss_func(e, LABELS, ref_emb=target), (mapped,))
    target.requires_grad_()
    loss_func(mapped, LABELS, ref_emb=target * 1.0).backward()
    assert target.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_contrast_in_low_precision_and_at_rows_of_zero(dtype):
    mapped, target = (rows.detach().to(dtype) for rows in pairs())
    mapped[2], target[2], target[3] = 0, 0, 0
    mapped.requires_grad_()
    loss = FCTLoss(contrast_weight=1.0)(mapped, LABELS, ref_emb=target)
    loss.backward()
    assert (
        loss.dtype == torch.promote_types(dtype, torch.float32)
        and torch.isfinite(loss)
        and torch.isfinite(mapped.grad).all()
    )


def test_contrast_needs_labels():
    mapped, target = pairs()
    with pytest.raises(
        ValueError, match=r"labels must be given with a contrast_weight, got None; .* torch\.arange\(N\)"
    ):
        FCTLoss(contrast_weight=0.1)(mapped, ref_emb=target)
    for options, message in [
        ({"contrast_weight": -1.0}, r"contrast_weight must be a finite number of at least 0, got -1.0"),
        ({"temperature": 0.0}, r"temperature must be a finite number above 0, got 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            FCTLoss(**options)


def test_contrast_of_one_row_is_0():
    mapped, target = pairs(n=1)
    found = FCTLoss(contrast_weight=1.0)(mapped, torch.tensor([4]), ref_emb=target)
    torch.testing.assert_close(found, FCTLoss()(mapped, ref_emb=target))


def test_is_the_mean_squared_error_over_all_entries():
    mapped, target = pairs()
    torch.testing.assert_close(FCTLoss()(mapped, ref_emb=target), torch.nn.functional.mse_loss(mapped, target))


def test_cosine_does_not_see_lengths():
    mapped, target = pairs()
    loss_func, factor = loss_of("cosine"), torch.rand(7, 1) + 0.5
    torch.testing.assert_close(loss_func(mapped * factor, ref_emb=target), loss_func(mapped, ref_emb=target / factor))


@every_distance
def test_gradcheck(kind):
    mapped, target = pairs()
    assert torch.autograd.gradcheck(lambda e: loss_of(kind)(e, ref_emb=target), (mapped,))


@every_distance
def test_ref_emb_receives_no_gradient(kind):
    mapped, target = pairs()
    target.requires_grad_()
    before = target.detach().clone()
    loss_of(kind)(mapped, ref_emb=target * 1.0).backward()
    assert target.grad is None and target.equal(before) and mapped.grad.abs().sum() > 0


@every_distance
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["equal", "zero mapped", "zero target", "both zero"])
def test_finite_gradient_where_a_distance_has_a_corner(kind, dtype, case):
    mapped, target = (rows.detach().to(dtype) for rows in pairs())
    if case == "equal":
        mapped[2] = target[2]
    if "zero" in case:
        mapped[2] *= "target" not in case
        target[2] *= "mapped" not in case
    mapped.requires_grad_()
    loss = loss_of(kind)(mapped, ref_emb=target)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(mapped.grad).all()
    if case == "equal":
        torch.testing.assert_close(mapped.grad[2], torch.zeros_like(mapped.grad[2]), rtol=0, atol=1e-3)


@pairwise
@every_distance
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
def test_dtypes(kind, dtype, autocast):
    mapped, target = pairs()
    expected = loss_of(kind)(mapped, ref_emb=target)
    low = mapped.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = loss_of(kind)(low, ref_emb=target.float())
    loss.backward()
    assert low.grad.dtype == dtype and loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6 if dtype.itemsize > 2 else 0.02)
    assert torch.isfinite(low.grad).all()


def test_a_square_that_overflows_float16():
    mapped = torch.tensor([[400.0, 0.0, 0.0, 0.0]], dtype=torch.float16, requires_grad=True)
    loss = FCTLoss()(mapped, ref_emb=torch.zeros(1, 4, dtype=torch.float16))
    loss.backward()
    assert loss.item() == 40000  # a quarter of 160000, above the highest number, 65504
    assert mapped.grad.tolist() == [[200.0, 0.0, 0.0, 0.0]]


@every_distance
def test_labels_change_nothing(kind):
    mapped, target = pairs()
    labels, loss_func = torch.zeros(7, dtype=torch.long), loss_of(kind)
    expected = loss_func(mapped, ref_emb=target)
    assert loss_func(mapped, labels, ref_emb=target) == expected
    assert loss_func(mapped, labels, ref_emb=target, ref_labels=labels) == expected
    weighted = loss_of(kind, reducer=reducers.ClassWeightedReducer(torch.tensor([2.0])))
    torch.testing.assert_close(weighted(mapped, labels, ref_emb=target), 2 * expected)


@every_distance
def test_one_row(kind):
    mapped, target = pairs(n=1)
    expected = reference.fct_losses(mapped.detach().numpy(), target.numpy(), kind)
    assert loss_of(kind)(mapped, ref_emb=target).item() == pytest.approx(expected[0])


@pytest.mark.parametrize(
    ("distance", "got"),
    [
        (distances.LpDistance(), r"LpDistance\(p=2, power=1\)"),
        (distances.LpDistance(p=1, power=2), r"LpDistance\(p=1, power=2\)"),
        (distances.CosineSimilarity(power=2), r"CosineSimilarity\(p=2, power=2\)"),
        (distances.DotProductSimilarity(), r"DotProductSimilarity\(p=2, power=1\)"),
        (distances.SNRDistance(), r"SNRDistance\(p=2, power=1\)"),
    ],
)
def test_other_distances(distance, got):
    with pytest.raises(ValueError, match=rf"must be LpDistance\(p=2, power=2\) or CosineSimilarity\(\), got {got}"):
        FCTLoss(distance=distance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, r: (e, None), r"ref_emb must be given: the new model's embeddings .* got None"),
        (lambda e, r: (e, r[:-1]), r"ref_emb must be shaped like embeddings, .* expected \(7, 5\), got \(6, 5\)"),
        (lambda e, r: (e, r[:, :1]), r"ref_emb must be shaped like embeddings, .* expected \(7, 5\), got \(7, 1\)"),
        (lambda e, r: (e[:0], r[:0]), r"embeddings must not be empty, got shape \(0, 5\)"),
        (lambda e, r: (e * torch.nan, r), r"embeddings must be finite, row 0 has a NaN or an infinity"),
        (lambda e, r: (e, r / (torch.arange(7.0)[:, None] != 4)), r"ref_emb must be finite, row 4 has a NaN"),
        (lambda e, r: (e, r.long()), r"ref_emb must be floating point, got torch.int64"),
        (lambda e, r: (e, r.to("meta")), r"embeddings must be on the device of ref_emb: got cpu and meta"),
    ],
)
def test_bad_calls(change, message):
    mapped, target = change(*pairs())
    with pytest.raises(ValueError, match=message):
        FCTLoss()(mapped, ref_emb=target)


def test_pairs_and_triplets_are_refused():
    mapped, target = pairs()
    with pytest.raises(ValueError, match=r"indices_tuple is not supported"):
        FCTLoss()(mapped, torch.arange(7), (torch.zeros(1).long(),) * 3, ref_emb=target)


def test_labels_of_another_length():
    mapped, target = pairs()
    with pytest.raises(ValueError, match=r"labels must have one entry a row: expected 7, got 6"):
        FCTLoss()(mapped, torch.arange(6), ref_emb=target)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_distance
def test_gpu_gives_what_the_cpu_gives(kind):
    mapped, target = pairs()
    on_gpu = loss_of(kind)(mapped.cuda(), ref_emb=target.cuda())
    torch.testing.assert_close(on_gpu.cpu(), loss_of(kind)(mapped, ref_emb=target))
