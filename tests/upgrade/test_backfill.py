import itertools
import math

import numpy as np
import pytest
import torch

from pml_compat import fit_width
from pml_compat.accuracy import CrossModelAccuracyCalculator, compiled, mixed_accuracy
from pml_compat.accuracy.calculator import RANK_METRICS
from pml_compat.upgrade import backfill_curve
from pml_compat.upgrade.backfill import BackfillCurve
from tests.accuracy import naive_metrics

METRICS = ("precision_at_1", "mean_average_precision", "cmc_top_5")


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def engine(request, monkeypatch):
    """Everything by two products and compiled loops, and by a ranking at each step."""
    if request.param == "compiled" and compiled.kernels() is None:
        pytest.skip("needs numba (extra fast)")
    monkeypatch.setattr(compiled, "_WORTH_IT", 0 if request.param == "compiled" else 2**62)
    return request.param


@pytest.fixture
def calculator():
    return CrossModelAccuracyCalculator(include=METRICS, device="cpu", fit_width=True)


def sample(seed, n_query=12, n_gallery=25, old_width=5, new_width=5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n_gallery)
    labels[:4] = np.arange(4)
    query_labels = rng.integers(0, 4, n_query)

    def embed(labels, width, noise):
        rows = np.eye(4)[labels][:, np.arange(width) % 4] + noise * rng.normal(size=(len(labels), width))
        return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))

    query, new = embed(query_labels, new_width, 0.4), embed(labels, new_width, 0.4)
    return query, torch.from_numpy(query_labels), embed(labels, old_width, 0.9), new, torch.from_numpy(labels)


def same(got, expected):
    assert got.keys() == expected.keys()
    for metric in expected:
        assert got[metric] == pytest.approx(expected[metric]), metric


def naive(query, query_labels, old, new, labels, order, fractions, **options):
    """Rank a gallery built item by item, for every fraction; return the values of each metric."""
    values = []
    for fraction in fractions:
        replaced = set(order[: math.floor(round(fraction * len(old), 6))])
        rows = [(new if j in replaced else old)[j] for j in range(len(old))]
        data = query.numpy(), query_labels.numpy(), torch.stack(rows).numpy(), labels.numpy()
        values.append(naive_metrics.accuracy(*data, **options))
    return {metric: [found[metric] for found in values] for metric in METRICS}


@pytest.mark.parametrize("order", ["random", "class"])
@pytest.mark.parametrize("seed", range(2))
def test_naive_parity(seed, order, calculator):
    data = sample(seed)
    curve = backfill_curve(*data, order=order, calculator=calculator, seed=seed)
    assert curve.fractions == (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
    for metric, expected in naive(*data, curve.order.tolist(), curve.fractions).items():
        assert curve.values[metric] == pytest.approx(expected)
        middles = [(left + right) / 2 for left, right in itertools.pairwise(expected)]
        assert curve.area(metric) == pytest.approx(sum(middles) / 10)


def test_every_metric_of_the_calculator_and_no_other(calculator):
    data = sample(0)
    assert set(backfill_curve(*data, calculator=calculator).values) == set(METRICS)
    assert set(backfill_curve(*data).values) == {"precision_at_1", "mean_average_precision"}
    assert set(backfill_curve(*data, include=("precision_at_1",)).values) == {"precision_at_1"}


@pytest.mark.parametrize(("old_width", "new_width"), [(5, 5), (3, 6), (6, 3)])
def test_the_ends_are_the_cross_test_and_the_self_test(old_width, new_width, calculator):
    query, query_labels, old, new, labels = sample(1, old_width=old_width, new_width=new_width)
    curve = backfill_curve(query, query_labels, old, new, labels, calculator=calculator, fit_width=True)
    cross = calculator.get_accuracy(query, query_labels, old, labels)
    own = calculator.get_accuracy(query, query_labels, new, labels)
    assert {metric: values[0] for metric, values in curve.values.items()} == pytest.approx(cross)
    assert {metric: values[-1] for metric, values in curve.values.items()} == pytest.approx(own)
    assert cross["mean_average_precision"] < own["mean_average_precision"]


@pytest.mark.parametrize(("old_width", "new_width"), [(3, 6), (6, 3)])
def test_spaces_of_different_widths_meet_in_the_wider(old_width, new_width, calculator):
    query, query_labels, old, new, labels = sample(2, old_width=old_width, new_width=new_width)
    with pytest.raises(ValueError, match=f"new_gallery must be as wide as old_gallery, got widths {new_width} and"):
        backfill_curve(query, query_labels, old, new, labels, calculator=calculator)
    curve = backfill_curve(query, query_labels, old, new, labels, calculator=calculator, fit_width=True)
    padded = fit_width(query, 6), query_labels, fit_width(old, 6), fit_width(new, 6), labels
    expected = naive(*padded, curve.order.tolist(), curve.fractions)["mean_average_precision"]
    assert curve.values["mean_average_precision"] == pytest.approx(expected)


@pytest.mark.parametrize("n_gallery", [10, 25, 100])
def test_the_share_is_rounded_down(n_gallery):
    """Of two classes far apart: the nearest item tells how many were replaced."""
    old, new = torch.full((n_gallery, 1), 1000.0), torch.arange(n_gallery).float()[:, None]
    fractions = tuple(step / 100 for step in range(101))
    counted = []

    class Counting(CrossModelAccuracyCalculator):
        def get_accuracy(self, query, query_labels, reference, *args, **kwargs):
            counted.append(int((reference < 999).sum()))
            return {"precision_at_1": 0.0}

    labels = torch.zeros(n_gallery, dtype=torch.long)
    backfill_curve(new[:1], labels[:1], old, new, labels, fractions=fractions, calculator=Counting(device="cpu"))
    assert counted == [step * n_gallery // 100 for step in range(101)]


def test_by_hand():
    # One query at 0 of label 0. Old: its item is far. New: its item is near. The other item is at 1.
    query, labels = torch.zeros(1, 1), torch.tensor([0, 1])
    old, new = torch.tensor([[5.0], [1.0]]), torch.tensor([[0.5], [1.0]])
    kwargs = {"fractions": (0, 0.5, 1), "include": ("precision_at_1",)}
    right = backfill_curve(query, labels[:1], old, new, labels, order=torch.tensor([0, 1]), **kwargs)
    assert right.values == {"precision_at_1": (0.0, 1.0, 1.0)}
    assert right.area("precision_at_1") == 0.75
    wrong = backfill_curve(query, labels[:1], old, new, labels, order=torch.tensor([1, 0]), **kwargs)
    assert wrong.values == {"precision_at_1": (0.0, 0.0, 1.0)}
    assert wrong.area("precision_at_1") == 0.25


def test_the_area_of_an_uneven_grid():
    curve = BackfillCurve((0, 0.25, 1), {"precision_at_1": (0.2, 0.6, 0.8)}, torch.arange(4))
    assert curve.area("precision_at_1") == pytest.approx(0.25 * 0.4 + 0.75 * 0.7)
    assert BackfillCurve((0, 0.3, 1), {"m": (0.5, 0.5, 0.5)}, torch.arange(4)).area("m") == pytest.approx(0.5)


def test_random_order():
    data = sample(0)
    order = backfill_curve(*data, seed=3).order
    assert sorted(order.tolist()) == list(range(25))
    assert torch.equal(order, backfill_curve(*data, seed=3).order)
    assert not torch.equal(order, backfill_curve(*data, seed=4).order)
    assert order.tolist() != list(range(25))


def test_class_order_takes_whole_classes():
    *_, labels = data = sample(0)
    firsts, insides = set(), set()
    for seed in range(8):
        order = backfill_curve(*data, order="class", fractions=(0, 1), seed=seed).order
        assert sorted(order.tolist()) == list(range(25))
        classes = labels[order]
        assert int((classes.diff() != 0).sum()) == len(labels.unique()) - 1
        firsts.add(int(classes[0]))
        insides.add(tuple(order[classes == 0].tolist()))
    assert len(firsts) > 1
    assert len(insides) > 1


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_scores_highest_first_and_ties_by_row(kind):
    query, query_labels, old, new, labels = sample(0, n_gallery=5)
    scores = kind([0.5, -1.0, 2.0, 0.5, 0.5])
    assert backfill_curve(query, query_labels, old, new, labels, order=scores).order.tolist() == [2, 0, 3, 4, 1]


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_a_permutation_is_taken_as_it_is(kind):
    query, query_labels, old, new, labels = sample(0, n_gallery=5)
    assert backfill_curve(query, query_labels, old, new, labels, order=kind([3, 0, 4, 1, 2])).order.tolist() == [
        3,
        0,
        4,
        1,
        2,
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_gallerys_rows_does_not_matter(seed, calculator):
    query, query_labels, old, new, labels = sample(seed)
    scores = torch.randn(25, generator=torch.Generator().manual_seed(seed))
    rows = torch.randperm(25, generator=torch.Generator().manual_seed(seed + 1))
    curve = backfill_curve(query, query_labels, old, new, labels, order=scores, calculator=calculator)
    names = torch.tensor([7, 2**50, -1, 30])
    moved = backfill_curve(
        query, names[query_labels], old[rows], new[rows], names[labels[rows]], order=scores[rows], calculator=calculator
    )
    same(moved.values, curve.values)
    assert torch.equal(rows[moved.order], curve.order)


def test_each_item_is_left_out_of_its_own_ranking(calculator):
    _, _, old, new, labels = sample(0)
    data = new, labels, old, new, labels
    by_position = backfill_curve(*data, calculator=calculator, ref_includes_query=True)
    ids = torch.arange(25)
    by_id = backfill_curve(*data, calculator=calculator, query_ids=ids, reference_ids=ids)
    assert by_position.values == by_id.values
    expected = naive(*data, by_position.order.tolist(), by_position.fractions, same_items=True)
    assert by_position.values["mean_average_precision"] == pytest.approx(expected["mean_average_precision"])
    assert backfill_curve(*data, calculator=calculator).values["precision_at_1"][-1] == 1.0


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_galleries_of_different_precision(dtypes, calculator):
    query, query_labels, old, new, labels = sample(0)
    old, new = old.to(dtypes[0]), new.to(dtypes[1])
    curve = backfill_curve(query, query_labels, old, new, labels, calculator=calculator)
    expected = backfill_curve(query, query_labels, old.double(), new.double(), labels, calculator=calculator)
    same(curve.values, expected.values)


def test_arrays_pass_and_inputs_stay(calculator):
    data = sample(0)
    copies = [part.clone() for part in data]
    expected = backfill_curve(*data, calculator=calculator)
    assert all(torch.equal(part, copy) for part, copy in zip(data, copies, strict=True))
    assert backfill_curve(*(part.numpy() for part in data), calculator=calculator).values == expected.values
    old_is_new = backfill_curve(data[0], data[1], data[3], data[3], data[4], calculator=calculator)
    assert len(set(old_is_new.values["mean_average_precision"])) == 1


def test_unusable_arguments_are_named():
    query, query_labels, old, new, labels = sample(0)
    data = query, query_labels, old, new, labels
    with pytest.raises(ValueError, match="new_gallery must have the items of old_gallery: expected 25 rows, got 24"):
        backfill_curve(query, query_labels, old, new[1:], labels)
    message = "query must be as wide as new_gallery, both the new model's: expected width 5, got 3"
    with pytest.raises(ValueError, match=message):
        backfill_curve(query[:, :3], query_labels, old[:, :3], new, labels)
    with pytest.raises(ValueError, match="old_gallery must be finite, row 4 has a NaN"):
        broken = old.clone()
        broken[4, 0] = math.nan
        backfill_curve(query, query_labels, broken, new, labels)
    for fractions in ((0, 0.5), (0.1, 1), (0, 0.5, 0.5, 1), (0, 0.7, 0.3, 1), (0,), ()):
        with pytest.raises(ValueError, match=r"fractions must rise from 0 to 1, got \("):
            backfill_curve(*data, fractions=fractions)
    with pytest.raises(ValueError, match='order must be "random", "class", scores or a permutation, got \'fast\''):
        backfill_curve(*data, order="fast")
    with pytest.raises(
        ValueError, match=r"order must have one entry a gallery item: expected shape \(25,\), got \(24,\)"
    ):
        backfill_curve(*data, order=torch.rand(24))
    with pytest.raises(ValueError, match="order must be finite, row 3 has a NaN"):
        backfill_curve(*data, order=torch.where(torch.arange(25) == 3, math.nan, 0.5))
    with pytest.raises(
        ValueError, match="order must hold each row from 0 to 24 once where it is integers; give scores"
    ):
        backfill_curve(*data, order=torch.arange(25) % 5)
    with pytest.raises(ValueError, match="calculator must return one number a metric, got one with return_per_class"):
        backfill_curve(*data, calculator=CrossModelAccuracyCalculator(return_per_class=True))
    with pytest.raises(ValueError, match=r"metric must be one of .*precision_at_1.*, got 'recall'"):
        backfill_curve(*data).area("recall")


def test_compiled_loops_need_no_ranking_at_each_step(engine, monkeypatch, calculator):
    asked = []
    monkeypatch.setattr(calculator, "get_accuracy", lambda *_, **__: asked.append(1) or {"precision_at_1": 0.0})
    backfill_curve(*sample(0), calculator=calculator)
    assert len(asked) == (0 if engine == "compiled" else 11)


@pytest.mark.parametrize("engine", ["compiled"], indirect=True)  # it sets both itself
@pytest.mark.parametrize(
    ("options", "k", "whole"),
    [  # every pair of two
        ("nothing", None, False),
        ("nothing", 5, True),
        ("nothing", "max_bin_count", False),
        ("position", None, True),
        ("position", 5, False),
        ("position", "max_bin_count", True),
        ("ids", None, False),
        ("ids", 5, True),
        ("ids", "max_bin_count", False),
        ("cameras", None, True),
        ("cameras", 5, False),
        ("cameras", "max_bin_count", True),
    ],
)
def test_both_engines_give_the_same(k, options, whole, monkeypatch):
    rng = np.random.default_rng(3)
    labels = torch.from_numpy(rng.integers(0, 6, 300))
    new, old = (torch.from_numpy(rng.normal(size=(300, 6))).float() for _ in range(2))
    new = new + torch.eye(6)[labels]
    if whole:
        new, old = (side.round() for side in (new, old))
    given = {
        "nothing": {},
        "position": {"ref_includes_query": True},
        "ids": {"query_ids": np.arange(80).astype(str), "reference_ids": [*np.arange(250).astype(str), *[None] * 50]},
        "cameras": {"query_cameras": labels[:80] % 2, "reference_cameras": torch.from_numpy(rng.integers(0, 2, 300))},
    }[options]
    order = torch.from_numpy(rng.permutation(300))
    for per_query in (False, True):
        found = []
        for worth_it in (0, 2**62):
            monkeypatch.setattr(compiled, "_WORTH_IT", worth_it)
            metrics = CrossModelAccuracyCalculator(include=RANK_METRICS, k=k, device="cpu", avg_of_avgs=True)
            data = new[:80], labels[:80], old, new, labels, order, [0, 30, 31, 31, 200, 300]
            found.append(list(mixed_accuracy.mixed_accuracy(metrics, *data, per_query=per_query, **given)))
        for got, expected in zip(*found, strict=True):
            assert got.keys() == expected.keys()
            for name in expected:
                both = (torch.as_tensor(one[name], dtype=torch.float64) for one in (got, expected))
                torch.testing.assert_close(*both, rtol=1e-3 if per_query else 1e-5, atol=0, equal_nan=True)
