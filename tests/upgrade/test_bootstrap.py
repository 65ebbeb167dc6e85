import dataclasses
import math

import numpy as np
import pytest
import torch

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.upgrade import bootstrap, bootstrap_update_gain, paired_bootstrap, update_gain

nan = math.nan


def sample(seed, n=60):
    rng = np.random.default_rng(seed)
    hard = rng.normal(size=n)
    return hard, hard + 0.1 + 0.3 * rng.normal(size=n)


def drawn(values, samples, seed):
    """Bootstrap means the plain way: draw queries with replacement, one resample at a time."""
    rng = np.random.default_rng(seed)
    return np.array([values[:, rng.integers(values.shape[1], size=values.shape[1])].mean(1) for _ in range(samples)])


@pytest.mark.parametrize("many", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_drawing_queries_one_by_one(seed, many, monkeypatch):
    monkeypatch.setattr(bootstrap, "_MANY", many)
    first, second = sample(seed)
    means = drawn((second - first)[None], 4000, seed)[:, 0]
    got = paired_bootstrap(first, second, samples=4000, level=0.9)
    low, high = np.quantile(means, [0.05, 0.95])
    assert got.estimate == pytest.approx((second - first).mean())
    assert (got.low, got.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert got.probability == pytest.approx((means > 0).mean(), abs=0.03)


@pytest.mark.parametrize("many", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_gain_agrees_with_drawing_queries_one_by_one(seed, many, monkeypatch):
    monkeypatch.setattr(bootstrap, "_MANY", many)
    rng = np.random.default_rng(seed)
    hard = rng.uniform(0, 0.5, 80)
    values = np.stack([hard, hard + rng.uniform(-0.1, 0.3, 80), hard + rng.uniform(0, 0.5, 80)])
    means = drawn(values, 4000, seed)
    gains = (means[:, 1] - means[:, 0]) / (means[:, 2] - means[:, 0])
    got = bootstrap_update_gain(old_to_old=values[0], new_to_old=values[1], independent=values[2], samples=4000)
    low, high = np.quantile(gains, [0.025, 0.975])
    assert (got.low, got.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    old, new, independent = values.mean(1)
    assert got.estimate == pytest.approx(update_gain(old_to_old=old, new_to_old=new, independent=independent))
    assert got.probability == 1.0
    assert got.undefined == 0


@pytest.mark.parametrize("many", [0, 1])
def test_the_distribution_of_a_difference_of_hits(many, monkeypatch):
    """1 query of 4 changed: the resampled mean is k / 4 with the binomial chance of k of 4."""
    monkeypatch.setattr(bootstrap, "_MANY", many)
    means = bootstrap._resampled_means(np.array([[0.0, 0.0, 1.0, 0.0]]), 40_000, 0)[:, 0]
    chances = [math.comb(4, k) * 0.25**k * 0.75 ** (4 - k) for k in range(5)]
    assert [(means == k / 4).mean() for k in range(5)] == pytest.approx(chances, abs=0.01)


def test_columns_are_resampled_together():
    columns = np.random.default_rng(0).normal(size=(1, 50))
    means = bootstrap._resampled_means(np.concatenate([columns, 2 * columns + 1]), 100, 0)
    assert means.shape == (100, 2)
    np.testing.assert_allclose(means[:, 1], 2 * means[:, 0] + 1)
    assert means[:, 0].std() > 0


def test_coverage_of_a_known_mean():
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(300):
        first = rng.normal(size=80)
        got = paired_bootstrap(first, first + rng.normal(0.2, 1.0, size=80), samples=400, level=0.9, seed=seed)
        inside += got.low <= 0.2 <= got.high
    assert 0.85 <= inside / 300 <= 0.95


def test_width_is_that_of_the_normal_theory():
    first, second = sample(0, n=400)
    got = paired_bootstrap(first, second, samples=4000)
    error = (second - first).std() / math.sqrt(400)
    assert (got.low, got.high) == pytest.approx(
        (got.estimate - 1.96 * error, got.estimate + 1.96 * error), abs=error / 5
    )
    narrow = paired_bootstrap(first, second, samples=4000, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.674 * error, rel=0.1)


def test_pairing_makes_the_interval_narrow():
    first, second = sample(1, n=200)
    paired = paired_bootstrap(first, second)
    unpaired = paired_bootstrap(first, np.random.default_rng(0).permutation(second))
    assert paired.estimate == pytest.approx(unpaired.estimate)
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 3


@pytest.mark.parametrize("seed", range(3))
def test_invariances(seed):
    first, second = sample(seed)
    got = paired_bootstrap(first, second, seed=seed)
    assert paired_bootstrap(first, second, seed=seed) == got
    assert paired_bootstrap(first, second, seed=seed + 1).low != got.low
    order = np.random.default_rng(seed).permutation(len(first))
    shuffled = paired_bootstrap(first[order], second[order], seed=seed)
    assert (shuffled.low, shuffled.high, shuffled.probability) == (got.low, got.high, got.probability)
    raised = paired_bootstrap(first, second + 1, seed=seed)
    assert (raised.estimate, raised.low, raised.high) == pytest.approx((got.estimate + 1, got.low + 1, got.high + 1))
    scaled = paired_bootstrap(3 * first, 3 * second, seed=seed)
    assert (scaled.low, scaled.high) == pytest.approx((3 * got.low, 3 * got.high))
    assert got.low < got.estimate < got.high


@pytest.mark.parametrize("elements", [1, 100, 1000])
def test_blocks_change_nothing(elements, monkeypatch):
    monkeypatch.setattr(bootstrap, "_MANY", 1)
    first, second = sample(0)
    expected = paired_bootstrap(first, second, samples=50)
    monkeypatch.setattr(bootstrap, "_BLOCK_ELEMENTS", elements)
    drawn, generator = [], np.random.default_rng

    class Generator:
        def __init__(self, seed):
            self.rng = generator(seed)

        def multinomial(self, *args, **kwargs):
            drawn.append(self.rng.multinomial(*args, **kwargs))
            return drawn[-1]

    monkeypatch.setattr(np.random, "default_rng", Generator)
    got = paired_bootstrap(first, second, samples=50)
    assert dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(expected), rel=1e-12)
    assert max(block.size for block in drawn) <= max(elements, 60)
    assert sum(len(block) for block in drawn) == 50


def test_equal_values_are_drawn_together():
    """A million queries of which each flips or not take no memory of a million a resample."""
    first = np.zeros(1_000_000)
    second = np.repeat([-1.0, 0.0, 1.0], [200_000, 500_000, 300_000])
    got = paired_bootstrap(first, second)
    assert got.estimate == pytest.approx(0.1)
    error = math.sqrt(0.5 - 0.01) / 1000
    assert (got.low, got.high) == pytest.approx((0.1 - 1.96 * error, 0.1 + 1.96 * error), abs=error / 5)


def test_queries_without_a_value_are_left_out_and_counted():
    first, second = sample(0)
    expected = paired_bootstrap(first, second)
    got = paired_bootstrap(
        torch.from_numpy(np.concatenate([first, [nan, 100, nan]])), np.concatenate([second, [100, nan, nan]])
    )
    assert (got.queries, got.left_out) == (60, 3)
    assert (got.estimate, got.low, got.high) == (expected.estimate, expected.low, expected.high)
    assert expected.left_out == 0


@pytest.mark.parametrize(("shift", "probability"), [(1.0, 1.0), (0.0, 0.0), (-1.0, 0.0)])
def test_a_difference_that_is_always_the_same(shift, probability):
    got = paired_bootstrap([0.0, 1.0, 2.0], [shift, 1 + shift, 2 + shift])
    assert (got.estimate, got.low, got.high, got.probability) == (shift, shift, shift, probability)


def test_it_reads_as_a_line():
    got = bootstrap.BootstrapInterval(0.01, -0.0023, 0.02, 0.931, 0.95, 1200, 3)
    assert str(got) == "+0.0100 [-0.0023, +0.0200] at 95%, above 0 in 93.1% of the resamples; 1200 queries, 3 left out"


def test_resamples_without_a_gain():
    rng = np.random.default_rng(0)
    old = rng.uniform(size=30)
    independent = old + rng.normal(0.05, 0.2, size=30)
    message = r"bootstrap_update_gain has no value in \d+ of 2000 resamples: independent must be above old_to_old"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        got = bootstrap_update_gain(old_to_old=old, new_to_old=old + 0.01, independent=independent)
    assert caught[0].filename == __file__
    assert 0 < got.undefined < 2000
    assert got.low > 0 and got.probability == 1.0  # a gain over no room is not among them


@pytest.mark.parametrize("independent", [0.5, 0.4])
def test_no_room_for_a_gain(independent):
    with pytest.warns(RuntimeWarning, match="bootstrap_update_gain has no value on these queries") as caught:
        got = bootstrap_update_gain(old_to_old=[0.25, 0.75], new_to_old=[1, 1], independent=[0.0, 2 * independent])
    assert len(caught) == 1
    assert all(math.isnan(value) for value in (got.estimate, got.low, got.high, got.probability))
    assert (got.queries, got.undefined) == (2, 2000)


def test_unusable_arguments_are_named():
    with pytest.raises(
        ValueError, match=r"first and second must have one entry a query.*: got 2 in first, 3 in second"
    ):
        paired_bootstrap([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="first and second must have a query with a value in each, got only NaN"):
        paired_bootstrap([nan, 1], [1, nan])
    with pytest.raises(ValueError, match="second must not be infinite, entry 1 is"):
        paired_bootstrap([0, 1], [0, math.inf])
    with pytest.raises(ValueError, match="samples must be an integer of at least 1, got 0"):
        paired_bootstrap([0, 1], [0, 1], samples=0)
    for level in (0, 1, 95, nan):
        with pytest.raises(ValueError, match=f"level must be between 0 and 1, both excluded, got {level!r}"):
            paired_bootstrap([0, 1], [0, 1], level=level)
    with pytest.raises(ValueError, match="old_to_old and new_to_old and independent must have one entry a query"):
        bootstrap_update_gain(old_to_old=[0, 1], new_to_old=[0, 1], independent=[1])


def test_of_what_the_calculator_measured():
    """Per-query metrics go straight in; a query without a positive is left out on its own."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 7
    labels[0] = 99  # in no gallery
    centers = torch.randn(7, 8, generator=generator)
    clean = centers[torch.arange(60) % 7]
    old, new = (clean + spread * torch.randn(60, 8, generator=generator) for spread in (2.0, 1.0))
    calculator = CrossModelAccuracyCalculator(include=("mean_average_precision",), device="cpu")
    found = [
        calculator.get_per_query_accuracy(query, labels, centers, torch.arange(7))["mean_average_precision"]
        for query in (old, new)
    ]
    means = [
        calculator.get_accuracy(query, labels, centers, torch.arange(7))["mean_average_precision"]
        for query in (old, new)
    ]
    got = paired_bootstrap(*found)
    assert (got.queries, got.left_out) == (59, 1)
    assert got.estimate == pytest.approx(means[1] - means[0])
    assert got.low > 0
