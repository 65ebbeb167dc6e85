import numpy as np
import pytest
import torch

from pml_compat.transformations import LinearTransformation, OrthogonalTransformation, fit_transformation
from pml_compat.transformations.lambda_orthogonal import distance_from_rotation
from tests import reference

all_widths = pytest.mark.parametrize("widths", [(5, 5), (6, 4), (4, 6)])


def pairs(widths, seed=0, n=60):
    """Return rows of length 1 about a mean, and what a bent rotation makes of them."""
    generator = np.random.default_rng(seed)
    source = generator.normal(size=(n, widths[0])) + 0.5
    target = source @ generator.normal(size=widths) + generator.normal(size=(n, widths[1])) + 1
    return [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (source, target)]


def distance(weight):
    gram = weight.T @ weight if len(weight) >= weight.shape[1] else weight @ weight.T
    return np.linalg.norm(gram - np.eye(len(gram)))


def objective(weight, source, target, deviation, bias):
    x, y = (source - source.mean(0), target - target.mean(0)) if bias else (source, target)
    gate = 1 / (1 + np.exp(-10 * (distance(weight) - deviation)))
    return np.square(x @ weight - y).sum() / np.square(y).sum() + gate * distance(weight)


@pytest.mark.parametrize("deviation", [0.5, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@all_widths
def test_no_map_near_it_is_better(widths, bias, deviation):
    """The definition itself, by a formula in NumPy."""
    source, target = pairs(widths)
    fitted = LinearTransformation(*widths, bias).double().fit(source, target, deviation=deviation)
    weight = fitted.linear.weight.detach().numpy().T
    best, generator = objective(weight, source, target, deviation, bias), np.random.default_rng(0)
    for size in (0.3, 0.03, 0.003):
        for _ in range(50):
            assert objective(weight + size * generator.normal(size=widths), source, target, deviation, bias) > best
    assert distance(weight) < deviation + 0.2
    if bias:
        mean = fitted(torch.tensor(source)).mean(0).detach()
        np.testing.assert_allclose(mean, target.mean(0), atol=1e-9)


@all_widths
def test_from_a_rotation_to_the_regression(widths):
    source, target = pairs(widths)
    strict, free = (
        LinearTransformation(*widths, bias=False).double().fit(source, target, deviation=deviation)
        for deviation in (0.0, 1e3)
    )
    assert distance(strict.linear.weight.detach().numpy().T) < 0.1
    if widths[0] <= widths[1]:  # a projection changes lengths, so that the smallest error is not Procrustes'
        expected = source @ reference.procrustes(source, target)
        np.testing.assert_allclose(strict(torch.tensor(source)).detach(), expected, atol=0.05)
    weight, _ = reference.ridge_regression(source, target, 0.0, False)
    np.testing.assert_allclose(free(torch.tensor(source)).detach(), source @ weight, atol=1e-4)


def test_distance_by_hand():
    weight = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert distance_from_rotation(weight).item() == pytest.approx(3)
    assert distance_from_rotation(weight.t()).item() == pytest.approx(3)
    rotation = torch.eye(3, dtype=torch.double).requires_grad_()
    assert torch.autograd.grad(distance_from_rotation(rotation), rotation)[0].equal(
        torch.zeros(3, 3, dtype=torch.double)
    )
    assert torch.autograd.gradcheck(distance_from_rotation, (torch.randn(4, 3, dtype=torch.double).requires_grad_(),))


@pytest.mark.parametrize("widths", [(5, 5), (4, 6)])
def test_the_strict_map_keeps_every_inner_product_in_training(widths):
    source, target = (torch.tensor(rows) for rows in pairs(widths))
    strict = OrthogonalTransformation(*widths).double()
    fit_transformation(strict, source, target, epochs=20, lr=0.02, progress=False)
    mapped = strict(source).detach()
    assert (mapped - torch.nn.functional.pad(source, (0, widths[1] - widths[0]))).abs().max() > 0.1
    torch.testing.assert_close(mapped @ mapped.t(), source @ source.t(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_few_rows_and_constant_ones(n, value):
    fitted = LinearTransformation(4, 3).fit(torch.full((n, 4), value), torch.full((n, 3), value), deviation=1.0)
    assert torch.isfinite(fitted.linear.weight).all()
    torch.testing.assert_close(fitted(torch.full((1, 4), value)), torch.full((1, 3), value))


def test_errors():
    source, target = pairs((5, 5))
    with pytest.raises(ValueError, match=r"deviation must be None where ridge is given, got 1 and ridge 0.5"):
        LinearTransformation(5, 5).fit(source, target, 0.5, deviation=1.0)
    with pytest.raises(ValueError, match=r"deviation must be .* at least 0, got -1"):
        LinearTransformation(5, 5).fit(source, target, deviation=-1)
