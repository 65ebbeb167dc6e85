import math

import numpy as np
import pytest
import torch

from pml_compat.upgrade import compatibility_scores, update_gain

# The published table of AdvBCT (CVPR 2023): mAP in percent on RParis, ROxford and GLDv2.
# Each block: old self-test, independent self-test, and rows of (self-test, cross-test, P_up, P_comp, P_1).
# None: not printed, or (P_1 of LCE in the first block, 53.34) a misprint.
PUBLISHED = {
    "extended data, ResNet-18 to ResNet-18": (
        (75.45, 49.15, 10.03),
        (81.15, 63.85, 16.48),
        {
            "independent": ((81.15, 63.85, 16.48), (4.93, 1.20, 0.2), None, 7.19, None),
            "BCT": ((80.58, 56.34, 14.61), (77.37, 49.66, 11.30), 48.02, 54.71, 51.13),
            "LCE": ((81.57, 60.85, 16.48), (77.83, 51.35, 12.17), 49.65, 57.41, None),
            "UniBCT": ((80.93, 57.24, 16.06), (78.30, 50.97, 13.25), 48.90, 59.19, 53.52),
            "Hot-refresh": ((79.57, 58.15, 13.88), (76.53, 50.05, 10.35), 47.78, 52.50, 50.03),
            "AdvBCT": ((82.78, 62.13, 15.71), (78.55, 52.31, 11.49), 49.55, 58.09, 53.45),
        },
    ),
    "extended classes, ResNet-18 to ResNet-18": (
        (74.29, 54.34, 11.43),
        (81.15, 63.85, 16.48),
        {
            "independent": ((81.15, 63.85, 16.48), (4.93, 1.29, 0.2), None, 3.38, None),
            "BCT": ((79.45, 58.94, 14.79), (76.13, 53.43, 12.26), 48.33, 52.79, 50.41),
            "LCE": ((81.26, 60.49, 16.07), (76.78, 54.29, 12.04), 49.37, 53.95, 51.51),
            "UniBCT": ((76.92, 59.07, 14.80), (74.55, 57.82, 12.31), 48.09, 54.78, 51.17),
            "Hot-refresh": ((78.93, 60.31, 14.0), (75.33, 51.68, 10.41), 48.06, 47.26, 47.57),
            "AdvBCT": ((82.05, 64.51, 16.44), (77.16, 54.82, 12.05), 50.16, 54.87, 52.35),
        },
    ),
    "extended data, ResNet-18 to ResNet-50": (
        (75.45, 49.15, 10.03),
        (87.66, 76.56, 22.12),
        {
            "independent": ((87.66, 76.56, 22.12), (4.81, 2.26, 0.2), None, 15.44, None),
            "BCT": ((85.54, 68.66, 19.11), (78.95, 54.42, 12.78), 47.81, 55.86, 51.52),
            "LCE": ((87.49, 75.16, 21.85), (79.36, 57.18, 13.30), 49.73, 57.31, 53.25),
            "UniBCT": ((84.37, 67.42, 21.57), (78.91, 56.18, 13.42), 48.48, 56.80, 52.31),
            "Hot-refresh": ((86.78, 75.10, 20.61), (78.81, 57.84, 12.41), 49.19, 56.53, 52.60),
            "AdvBCT": ((86.79, 75.71, 20.77), (79.08, 59.03, 12.75), 49.31, 57.30, 53.01),
        },
    ),
}
ROWS = [(block, method) for block, (_, _, rows) in PUBLISHED.items() for method in rows]


@pytest.mark.parametrize("unit", ["percent", "fraction"])
@pytest.mark.parametrize(("block", "method"), ROWS)
def test_published_table(block, method, unit):
    old, independent, rows = PUBLISHED[block]
    new, cross, *printed = rows[method]
    scale = 1 if unit == "percent" else 100
    got = compatibility_scores(
        old_to_old=np.divide(old, scale),
        new_to_new=np.divide(new, scale),
        new_to_old=np.divide(cross, scale),
        independent=np.divide(independent, scale),
    )
    assert list(got) == ["p_up", "p_comp", "p_1"]
    for score, value in zip(got.values(), printed, strict=True):
        assert type(score) is float
        if value is not None:
            assert 100 * score == pytest.approx(value, abs=0.02)


def naive(old, new, cross, independent, squash):
    sigma = (lambda x: 1 / (1 + math.exp(-x))) if squash else (lambda x: x)
    ups, comps, both = [], [], []
    for o, n, c, i in zip(old, new, cross, independent, strict=True):
        ups.append(sigma((n - i) / i))
        comps.append(sigma((c - o) / (i - o)))
        both.append(2 / (1 / ups[-1] + 1 / comps[-1]))
    return {"p_up": sum(ups) / len(ups), "p_comp": sum(comps) / len(comps), "p_1": sum(both) / len(both)}


def sample(seed, sets=4):
    rng = np.random.default_rng(seed)
    old = rng.uniform(0.2, 0.5, sets)
    independent = old + rng.uniform(0.1, 0.4, sets)
    return old, rng.uniform(0.2, 1, sets), rng.uniform(0, 0.6, sets), independent


def scores(old, new, cross, independent, **kwargs):
    return compatibility_scores(old_to_old=old, new_to_new=new, new_to_old=cross, independent=independent, **kwargs)


@pytest.mark.parametrize("squash", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_naive_parity(seed, squash):
    data = sample(seed)
    assert scores(*data, squash=squash) == pytest.approx(naive(*data, squash), rel=1e-12)


@pytest.mark.parametrize("kind", [list, tuple, lambda values: torch.tensor(values, dtype=torch.float64)])
def test_any_sequence_in_any_order_of_the_test_sets(kind):
    data = sample(0)
    expected = pytest.approx(scores(*data), rel=1e-12)
    assert scores(*(kind(values.tolist()) for values in data)) == expected
    assert scores(*(kind(values[[2, 0, 3, 1]].tolist()) for values in data)) == expected


def test_by_hand():
    got = scores(0.4, 0.45, 0.5, 0.6)  # c = 1/2, u = -1/4
    comp, up = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.25))
    assert got == pytest.approx({"p_up": up, "p_comp": comp, "p_1": 2 * up * comp / (up + comp)})
    raw = scores(0.4, 0.75, 0.5, 0.6, squash=False)  # c = 1/2, u = 1/4
    assert raw == pytest.approx({"p_up": 0.25, "p_comp": 0.5, "p_1": 1 / 3})


def test_one_half_is_no_better_and_no_worse():
    assert scores(0.4, 0.6, 0.4, 0.6) == {"p_up": 0.5, "p_comp": 0.5, "p_1": 0.5}


@pytest.mark.parametrize("seed", range(3))
def test_raw_p_comp_is_the_mean_update_gain(seed):
    old, new, cross, independent = sample(seed)
    gains = [
        update_gain(old_to_old=o, new_to_old=c, independent=i) for o, c, i in zip(old, cross, independent, strict=True)
    ]
    assert scores(old, new, cross, independent, squash=False)["p_comp"] == pytest.approx(np.mean(gains))


@pytest.mark.parametrize("independent", [0.4, 0.3])
def test_no_room_for_a_gain(independent):
    message = r"no p_comp and p_1, for test set 1: independent must be above old_to_old"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        got = compatibility_scores(
            old_to_old=[0.3, 0.4], new_to_new=[0.5, 0.5], new_to_old=[0.4, 0.5], independent=[0.5, independent]
        )
    assert caught[0].filename == __file__
    assert math.isnan(got["p_comp"]) and math.isnan(got["p_1"])
    assert got["p_up"] > 0.5
    assert len(caught) == 1


def test_an_independent_model_that_finds_nothing():
    with pytest.warns(RuntimeWarning) as caught:
        got = scores(0.1, 0.5, 0.4, 0.0)
    assert all(math.isnan(score) for score in got.values())
    assert "no p_up and p_1, for test set 0: independent must be above 0" in [
        str(warning.message).removeprefix("compatibility_scores: ") for warning in caught
    ]


def test_a_harmonic_mean_of_opposite_ratios():
    with pytest.warns(RuntimeWarning, match="no p_1, for test set 0: its two ratios must not add up to 0"):
        got = scores(0.25, 0.25, 0.375, 0.5, squash=False)  # c = 1/2, u = -1/2
    assert (got["p_up"], got["p_comp"]) == (-0.5, 0.5)
    assert math.isnan(got["p_1"])


def test_a_tiny_room_does_not_overflow():
    assert scores(0.5, 0.6, 0.1, 0.5 + 1e-12)["p_comp"] == 0.0
    assert scores(0.5, 0.6, 0.9, 0.5 + 1e-12)["p_comp"] == 1.0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("old_to_old", -0.1, "old_to_old must be a fraction or a percentage, from 0 to 100, got -0.1"),
        ("independent", 100.5, "independent must be a fraction or a percentage, from 0 to 100, got 100.5"),
        ("new_to_old", math.nan, "new_to_old must be a fraction or a percentage, from 0 to 100, got nan"),
        ("new_to_new", math.inf, "new_to_new must not be infinite, entry 0 is"),
        ("new_to_new", "high", "new_to_new must be numbers, got 'high'"),
        (
            "new_to_old",
            [0.4, 0.5],
            "every argument must have one value a test set: "
            "got 1 in old_to_old, 1 in new_to_new, 2 in new_to_old, 1 in independent",
        ),
    ],
)
def test_unusable_values_are_named(name, value, message):
    values = {"old_to_old": 0.4, "new_to_new": 0.5, "new_to_old": 0.5, "independent": 0.6} | {name: value}
    with pytest.raises(ValueError, match=message):
        compatibility_scores(**values)


@pytest.mark.parametrize("name", ["old_to_old", "new_to_new", "new_to_old", "independent"])
def test_fractions_among_percents(name):
    values = {"old_to_old": 40.0, "new_to_new": 58.0, "new_to_old": 45.0, "independent": 60.0}
    values[name] /= 100
    largest = "new_to_new" if name == "independent" else "independent"
    message = (
        f"accuracies must be all fractions or all percents: {name} has {values[name]:g} "
        f"where {largest} has {values[largest]:g}; divide the percents by 100"
    )
    with pytest.raises(ValueError, match=message):
        compatibility_scores(**values)


def test_a_fraction_in_one_test_set_of_percents():
    with pytest.raises(ValueError, match=r"old_to_old has 0\.4 where independent has 60"):
        scores([40, 0.4], [58, 58], [45, 45], [60, 60])


def test_percents_may_be_0():
    assert scores(0.0, 58.0, 0.0, 60.0) == scores(0.0, 0.58, 0.0, 0.6)


def test_arguments_have_no_order():
    with pytest.raises(TypeError, match="positional argument"):
        compatibility_scores(0.4, 0.5, 0.5, 0.6)
