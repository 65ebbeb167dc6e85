import math

import numpy as np
import pytest
import torch

from pml_compat.accuracy import CrossModelAccuracyCalculator
from pml_compat.upgrade import average_multimodel_accuracy, compatibility_matrix, is_compatible
from pml_compat.upgrade.chain import average_compatibility

MATRIX = [[0.3, 0, 0], [0.3, 0.5, 0], [0.4, 0.45, 0.6]]  # equal, better, worse


def test_by_hand():
    assert average_compatibility(MATRIX) == pytest.approx(1 / 3)
    assert average_compatibility(MATRIX, strict=False) == pytest.approx(2 / 3)
    assert average_multimodel_accuracy(MATRIX) == pytest.approx((0.3 + 0.3 + 0.5 + 0.4 + 0.45 + 0.6) / 6)


@pytest.mark.parametrize("models", [2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_naive_parity(seed, models):
    matrix = np.random.default_rng(seed).uniform(size=(models, models)).round(1)
    upgrades = [(matrix[t, k], matrix[k, k]) for t in range(models) for k in range(t)]
    entries = [matrix[t, k] for t in range(models) for k in range(t + 1)]
    strict = [is_compatible(old_to_old=own, new_to_old=cross) for cross, own in upgrades]
    assert average_compatibility(matrix) == pytest.approx(sum(strict) / len(strict))
    loose = [cross >= own for cross, own in upgrades]
    assert average_compatibility(matrix, strict=False) == pytest.approx(sum(loose) / len(loose))
    assert average_multimodel_accuracy(matrix) == pytest.approx(sum(entries) / len(entries))


@pytest.mark.parametrize("function", [average_compatibility, average_multimodel_accuracy])
def test_only_the_lower_triangle_is_read(function):
    expected = function(MATRIX)
    ragged = [row[: t + 1] for t, row in enumerate(MATRIX)]
    filled = np.where(np.tri(3), MATRIX, np.nan)
    for matrix in (ragged, filled, torch.tensor(filled), filled.tolist(), tuple(map(tuple, ragged))):
        got = function(matrix)
        assert type(got) is float
        assert got == pytest.approx(expected)


def test_a_single_model_has_an_accuracy_but_no_upgrade():
    assert average_multimodel_accuracy([[0.3]]) == 0.3
    with pytest.raises(ValueError, match="matrix must hold at least 2 models for an upgrade, got 1"):
        average_compatibility([[0.3]])


@pytest.fixture
def measured():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (40,), generator=generator)
    models = {
        name: torch.randn(40, 4, generator=generator) + strength * torch.eye(4)[labels]
        for name, strength in (("v1", 1.0), ("v2", 2.0), ("v3", 3.0))
    }
    return compatibility_matrix(models, labels, calculator=CrossModelAccuracyCalculator(k=None, device="cpu"))


@pytest.mark.parametrize("metric", ["precision_at_1", "mean_average_precision"])
def test_a_measured_matrix(measured, metric):
    rows = [[measured[t][k][metric] for k in measured] for t in measured]
    assert average_compatibility(measured, metric=metric) == average_compatibility(rows)
    assert average_multimodel_accuracy(measured, metric=metric) == average_multimodel_accuracy(rows)


def test_the_order_of_the_models_is_that_of_the_queries(measured):
    shuffled = {
        t: {k: measured[t][k] for k in ("v3", "v1", "v2")} for t in ("v1", "v2", "v3")
    }  # the galleries' order says nothing
    assert average_multimodel_accuracy(shuffled, metric="precision_at_1") == average_multimodel_accuracy(
        measured, metric="precision_at_1"
    )


@pytest.mark.parametrize("function", [average_compatibility, average_multimodel_accuracy])
def test_unusable_matrices_are_named(function, measured):
    with pytest.raises(ValueError, match="matrix must hold at least 1 model, got none"):
        function([])
    with pytest.raises(ValueError, match="matrix must hold at least 1 model, got none"):
        function({}, metric="precision_at_1")
    with pytest.raises(ValueError, match=r"one gallery a model up to its own: row 1 is \[0.4\]"):
        function([[0.3], [0.4]])
    with pytest.raises(ValueError, match=r"one gallery a model up to its own: row 0 is 0.3"):
        function([0.3, 0.4])
    with pytest.raises(ValueError, match=r"matrix must be finite up to the diagonal, row 1 is \[0.4, nan\]"):
        function([[0.3], [0.4, math.nan]])
    with pytest.raises(ValueError, match="metric is for what compatibility_matrix returns, got 'recall' with plain"):
        function(MATRIX, metric="recall")
    for metric in (None, "recall"):
        with pytest.raises(
            ValueError, match=rf"metric must be one of the matrix's, .*precision_at_1.*, got {metric!r}"
        ):
            function(measured, metric=metric)
    del measured["v3"]["v2"]
    with pytest.raises(ValueError, match="matrix must have precision_at_1 of v3 on the gallery of v2"):
        function(measured, metric="precision_at_1")
