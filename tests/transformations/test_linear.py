import numpy as np
import pytest
import torch

from pml_compat.transformations import LinearTransformation
from pml_compat.transformations import pairs as pairs_module
from tests import reference


def pairs(seed, n=40, d_in=5, d_out=3):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, d_in)) + 2.0, generator.normal(size=(n, d_out)) - 1.0


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
