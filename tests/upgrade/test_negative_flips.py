import math

import numpy as np
import pytest
import torch

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.upgrade import negative_flips
from pml_compat.upgrade.negative_flips import ClassFlips, negative_flip_rate

nan = math.nan


def naive(old, new, labels):
    """Rates and ``{label: (flips, queries)}`` of the queries without NaN, one at a time."""
    lost = gained = right_before = wrong_after = count = 0
    classes = {}
    for before, after, label in zip(old, new, labels, strict=True):
        if math.isnan(before) or math.isnan(after):
            continue
        count += 1
        right_before += before == 1
        wrong_after += after == 0
        flips, queries = classes.get(label, (0, 0))
        flipped = before == 1 and after == 0
        classes[label] = flips + flipped, queries + 1
        lost += flipped
        gained += before == 0 and after == 1
    relative = (lost / count) / (right_before / count * wrong_after / count)
    return lost / count, gained / count, relative, count, classes


def sample(seed, n=200, missing=0.1):
    rng = np.random.default_rng(seed)
    old, new = (rng.random((2, n)) < [[0.6], [0.8]]).astype(float)
    old[rng.random(n) < missing] = nan
    new[rng.random(n) < missing] = nan
    return old, new, rng.integers(-3, 10, n)


@pytest.mark.parametrize("seed", range(5))
def test_naive_parity(seed):
    old, new, labels = sample(seed)
    rate, positive, relative, count, classes = naive(old, new, labels.tolist())
    got = negative_flips(old, new, labels)
    assert got.rate == pytest.approx(rate)
    assert negative_flip_rate(old, new) == pytest.approx(rate)
    assert got.positive_rate == pytest.approx(positive)
    assert got.relative_rate == pytest.approx(relative)
    assert (got.queries, got.left_out) == (count, 200 - count)
    assert got.left_out > 0
    assert got.labels.tolist() == sorted(classes)
    assert got.class_flips.tolist() == [classes[label][0] for label in sorted(classes)]
    assert got.class_queries.tolist() == [classes[label][1] for label in sorted(classes)]
    expected = [classes[label][0] / classes[label][1] for label in sorted(classes)]
    assert got.class_rates.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_identities(seed):
    old, new, labels = sample(seed, missing=0)
    got, back = negative_flips(old, new, labels), negative_flips(new, old, labels)
    assert new.mean() == pytest.approx(old.mean() - got.rate + got.positive_rate)
    assert (back.rate, back.positive_rate) == (got.positive_rate, got.rate)
    assert got.class_flips.sum() == pytest.approx(got.rate * got.queries)
    order = np.random.default_rng(seed).permutation(len(old))
    shuffled = negative_flips(old[order], new[order], labels[order])
    assert shuffled.rate == got.rate
    assert shuffled.worst() == got.worst()
    renamed = negative_flips(old, new, 2**60 + labels)
    assert [(flips, queries) for _, flips, queries in renamed.worst()] == [(f, q) for _, f, q in got.worst()]
    assert renamed.worst()[0].label == 2**60 + got.worst()[0].label


def test_by_hand():
    old = [1, 1, 1, 0, 0, 1, 0, 1]
    new = [0, 1, 1, 1, 0, 0, 0, 1]
    got = negative_flips(old, new, torch.tensor([3, 3, 3, 3, 8, 8, 8, 8]))
    assert (got.rate, got.positive_rate) == (0.25, 0.125)
    assert got.relative_rate == pytest.approx(0.25 / ((5 / 8) * (4 / 8)))
    assert got.class_rates.tolist() == [0.25, 0.25]
    assert type(got.rate) is type(got.relative_rate) is float


def test_unrelated_errors_have_a_relative_rate_of_1():
    old, new = np.meshgrid([1, 1, 1, 0], [1, 0])
    labels = np.zeros(8, dtype=int)
    assert negative_flips(old.ravel(), new.ravel(), labels).relative_rate == pytest.approx(1.0)
    assert negative_flips(old.ravel(), old.ravel(), labels).relative_rate == 0.0


@pytest.mark.parametrize(("old", "new"), [([0, 0], [0, 1]), ([1, 0], [1, 1])])
def test_no_flip_is_possible(old, new):
    got = negative_flips(old, new, torch.tensor([0, 0]))
    assert got.rate == 0.0
    assert math.isnan(got.relative_rate)
    assert got.worst() == []


@pytest.mark.parametrize(
    "kind",
    [
        list,
        lambda values: np.array(values, dtype=bool),
        lambda values: torch.tensor(values, dtype=torch.bool),
        lambda values: torch.tensor(values, dtype=torch.uint8),
        lambda values: torch.tensor(values, dtype=torch.float64),
    ],
)
def test_bools_and_numbers(kind):
    assert negative_flip_rate(kind([1, 1, 0, 1, 0]), kind([0, 1, 1, 0, 0])) == 0.4


def test_a_tie_counts_as_its_chance():
    got = negative_flips([1.0, 0.5, 0.5], [0.25, 0.5, 1.0], torch.tensor([0, 0, 1]))
    assert got.rate == pytest.approx((0.75 + 0.25) / 3)
    assert got.worst() == [ClassFlips(label=0, flips=1.0, queries=2)]


def test_the_worst_classes():
    labels = torch.tensor([5] * 4 + [8] * 2 + [7] * 2 + [9] + [1])
    old, new = torch.ones(10), torch.tensor([0, 0, 1, 1, 0, 0, 0, 1, 0, 1])
    got = negative_flips(old, new, labels)
    # two flips of two, two of four, then one of one, one of two; class 1 has none
    expected = [(8, 2.0, 2), (5, 2.0, 4), (9, 1.0, 1), (7, 1.0, 2)]
    assert got.worst() == expected
    assert got.worst(2) == expected[:2]
    assert negative_flips(torch.ones(2), torch.zeros(2), torch.tensor([4, 3])).worst() == [(3, 1.0, 1), (4, 1.0, 1)]
    assert [type(value) for value in got.worst(1)[0]] == [int, float, int]


def test_a_class_of_which_no_query_is_left():
    got = negative_flips([1, nan, 1], [0, 1, 1], torch.tensor([0, 1, 2]))
    assert got.labels.tolist() == [0, 2]
    assert (got.queries, got.left_out) == (2, 1)


def test_against_the_accuracy_it_explains():
    """Flips between old and new queries on the old gallery account for the change of precision at 1."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (80,), generator=generator)
    centers = torch.eye(6)[labels]
    old, new = (strength * centers + torch.randn(80, 6, generator=generator) for strength in (1.5, 2.5))
    calculator = CrossModelAccuracyCalculator(include=("precision_at_1",), device="cpu")
    correct = []
    for query in (old, new):
        distances = torch.cdist(query, old).fill_diagonal_(math.inf)
        correct.append(labels[distances.argmin(1)] == labels)
    got = negative_flips(*correct, labels)
    accuracies = [
        calculator.get_accuracy(query, labels, old, labels, ref_includes_query=True)["precision_at_1"]
        for query in (old, new)
    ]
    assert accuracies[1] - accuracies[0] == pytest.approx(got.positive_rate - got.rate)
    assert got.rate > 0


def test_unusable_arguments_are_named():
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"new_correct must be bools, or from 0 \(wrong\) to 1 \(right\), got 2"):
        negative_flip_rate([0, 1], [0, 2])
    with pytest.raises(ValueError, match=r"old_correct must be bools, or from 0 \(wrong\) to 1 \(right\), got -1"):
        negative_flips([0, -1], [0, 1], labels)
    with pytest.raises(ValueError, match="same queries: got 2 in old_correct, 3 in new_correct"):
        negative_flip_rate([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="must have a query with a value in each, got only NaN"):
        negative_flip_rate([nan, 1], [1, nan])
    with pytest.raises(ValueError, match="labels must have one entry a row: expected 2, got 3"):
        negative_flips([0, 1], [0, 1], torch.tensor([0, 1, 2]))
    flips = negative_flips([1, 1], [0, 1], ["cat", "dog"])
    assert flips.worst()[0] == ("cat", 1.0, 1)
