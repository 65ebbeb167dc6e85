import numpy as np
import pytest
import torch

from pml_compat.transformations import LinearTransformation
from pml_compat.transformations import pairs as pairs_module
from pml_compat.transformations.closed_form import measured_ridge, ridge_solution
from pml_compat.transformations.pairs import pair_moments
from tests import reference
from tests.pairwise import pairwise


def pairs(seed, n=40, d_in=5, d_out=3):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, d_in)) + 2.0, generator.normal(size=(n, d_out)) - 1.0


@pairwise
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block", [7, 8192])
def test_fit_matches_the_formula(seed, ridge, bias, block, monkeypatch):
    monkeypatch.setattr(pairs_module, "_BLOCK_ROWS", block)
    source, target = pairs(seed)
    transformation = LinearTransformation(5, 3, bias=bias).double().fit(source, target, ridge)
    weight, offset = reference.ridge_regression(source, target, ridge, bias)
    expected = source @ weight + offset
    np.testing.assert_allclose(transformation(torch.tensor(source)).detach(), expected, rtol=1e-8, atol=1e-8)


def test_by_hand():
    # y = 3 x - 1, and with a ridge of 1 half of the slope: sum of squares 2, n = 2
    source, target = torch.tensor([[-1.0], [1.0]]), torch.tensor([[-4.0], [2.0]])
    exact = LinearTransformation(1, 1).fit(source, target, ridge=0.0)
    assert exact.linear.weight.item() == pytest.approx(3) and exact.linear.bias.item() == pytest.approx(-1)
    half = LinearTransformation(1, 1).fit(source, target, ridge=1.0)
    assert half.linear.weight.item() == pytest.approx(1.5) and half.linear.bias.item() == pytest.approx(-1)


def test_far_from_the_origin():
    """Sums of squares of large numbers would lose the small differences."""
    source, target = pairs(0)
    far = LinearTransformation(5, 3).double().fit(source + 1e6, target, ridge=0.0)(torch.tensor(source + 1e6))
    near = LinearTransformation(5, 3).double().fit(source, target, ridge=0.0)(torch.tensor(source))
    torch.testing.assert_close(far, near, rtol=1e-5, atol=1e-5)


def test_memory_maps_and_tensors_give_the_same(tmp_path):
    source, target = (array.astype(np.float32) for array in pairs(0))
    np.save(tmp_path / "source.npy", source)
    mapped = np.load(tmp_path / "source.npy", mmap_mode="r")
    one = LinearTransformation(5, 3).fit(mapped, torch.tensor(target))
    other = LinearTransformation(5, 3).fit(torch.tensor(source), target)
    torch.testing.assert_close(one.linear.weight, other.linear.weight)


def test_untrained_is_fit_width():
    embeddings = torch.randn(3, 4)
    torch.testing.assert_close(LinearTransformation(4, 2)(embeddings), embeddings[:, :2])
    torch.testing.assert_close(LinearTransformation(4, 6)(embeddings), torch.nn.functional.pad(embeddings, (0, 2)))


def test_fewer_rows_than_dimensions():
    source, target = pairs(0, n=3)
    transformation = LinearTransformation(5, 3).fit(source, target)
    torch.testing.assert_close(transformation(torch.tensor(source)), torch.tensor(target), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match=r"ridge must be above 0 here, got 0: the 3 rows .* fewer than 5 dimensions"):
        LinearTransformation(5, 3).fit(source, target, ridge=0.0)


def broken(value):
    source, _ = pairs(0)
    source[3, 1] = value
    return source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda s, t: (s[:-1], t), r"target must have one row for each row of source.*expected 39, got 40"),
        (lambda s, t: (s[:, :4], t), r"source \(from row 0\) must be 5 wide, got width 4"),
        (lambda s, t: (s, t[:, :2]), r"target \(from row 0\) must be 3 wide, got width 2"),
        (lambda s, t: (broken(np.nan), t), r"source \(from row 0\) must be finite, row 3"),
        (lambda s, t: (s, t, -1.0), r"ridge must be .* at least 0, got -1.0"),
        (lambda s, t: (s[:0], t[:0]), r"source \(from row 0\) must not be empty"),
        (lambda s, t: (s.astype(int), t), r"source \(from row 0\) must be floating point"),
    ],
)
def test_errors_leave_the_map_as_it_was(arguments, message):
    transformation = LinearTransformation(5, 3)
    before = {key: tensor.clone() for key, tensor in transformation.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        transformation.fit(*arguments(*pairs(0)))
    for key, tensor in transformation.state_dict().items():
        assert tensor.equal(before[key])


def noisy_pairs(n, d, seed=0):
    """Return rows of a falling spectrum, and what a map with noise makes of them, training and fresh ones."""
    generator = np.random.default_rng(seed)
    source = generator.normal(size=(n + 400, d)) * np.linspace(1, 0.05, d) + 3
    target = source @ generator.normal(size=(d, 6)) + 2 * generator.normal(size=(n + 400, 6))
    return (source[:n], target[:n]), (source[n:], target[n:])


@pytest.mark.parametrize("unit", [1e-12, 1e-4, 1e3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_default_is_the_same_at_every_scale(unit, bias):
    (source, target), (fresh, _) = noisy_pairs(100, 30)
    expected = LinearTransformation(30, 6, bias).double().fit(source, target)(torch.tensor(fresh))
    scaled = LinearTransformation(30, 6, bias).double().fit(unit * source, target)(torch.tensor(unit * fresh))
    torch.testing.assert_close(scaled, expected, rtol=1e-7, atol=1e-7)
    scaled = LinearTransformation(30, 6, bias).double().fit(source, unit * target)(torch.tensor(fresh)) / unit
    torch.testing.assert_close(scaled, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("n", [20, 35, 60, 400])
def test_the_default_is_close_to_the_best_ridge_on_fresh_rows(n):
    (source, target), (fresh, wanted) = noisy_pairs(n, 30)

    def error(ridge):
        mapped = LinearTransformation(30, 6).double().fit(source, target, ridge)(torch.tensor(fresh)).detach()
        return float((mapped - torch.tensor(wanted)).square().mean())

    best = min(error(ridge) for ridge in 10.0 ** np.arange(-6, 3))
    assert error(None) < 1.1 * best + 1e-9


def measured_ridge_of(moments, centred):
    n, means = moments.rows, (moments.source_mean, moments.target_mean)
    gram, cross, energy = moments.source_source, moments.source_target, moments.target_energy
    if not centred:
        gram, cross = gram + n * torch.outer(means[0], means[0]), moments.raw_source_target()
        energy += n * float(means[1].square().sum())
    return measured_ridge(gram, cross, energy, n, centred=centred)[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("centred", [True, False])
def test_the_measured_ridge_is_that_of_leaving_rows_out(seed, centred):
    """Against a hat matrix of all rows: the same figure, tried at many more ridges."""
    (source, target), _ = noisy_pairs(50, 12, seed)
    moments = pair_moments(source, target, 12, 6, torch.device("cpu"))
    weight, offset = ridge_solution(moments, centred=centred)
    fitted = source @ weight.numpy() + offset.numpy()

    def score(ridge):
        return reference.generalised_cross_validation(source, target, ridge, centred)

    best = min(score(ridge) for ridge in 10.0 ** np.arange(-8, 2, 0.05))
    found = measured_ridge_of(moments, centred)
    assert score(found) < 1.02 * best
    expected, expected_offset = reference.ridge_regression(source, target, found, centred)
    np.testing.assert_allclose(fitted, source @ expected + expected_offset, rtol=1e-8, atol=1e-8)


def test_a_constant_source_is_mapped_to_the_mean():
    target = torch.randn(7, 3)
    mapped = LinearTransformation(2, 3).fit(torch.ones(7, 2), target)(torch.ones(1, 2))
    torch.testing.assert_close(mapped[0], target.mean(0))


@pytest.mark.parametrize(
    "form", [lambda a: a[::-1], lambda a: a[:, ::-1], lambda a: a.astype(">f4"), lambda a: a.astype(">f8")[::-1]]
)
def test_arrays_that_run_backwards_or_are_big_endian(form):
    source, target = (form(array) for array in pairs(0))
    found = LinearTransformation(5, 3).double().fit(source, target)
    source, target = (np.ascontiguousarray(array).astype(np.float64) for array in (source, target))
    expected = LinearTransformation(5, 3).double().fit(source, target)
    torch.testing.assert_close(found.linear.weight, expected.linear.weight)
    mapped = expected.apply_to(source, progress=False)
    given = form(pairs(0)[0])
    for writeable in (True, False):
        given.flags.writeable = writeable
        np.testing.assert_allclose(found.apply_to(given, progress=False), mapped)
