import numpy as np
import pytest
import torch

from pml_compat.transformations import LinearTransformation, LowRankTransformation
from pml_compat.transformations import pairs as pairs_module
from tests.transformations.test_linear import broken, pairs


def reduced_rank(source, target, ridge, rank):
    """Return the map of a rank by the singular vectors of what the full one gives, the penalty as rows of the data."""
    n, width = source.shape
    x = np.concatenate([source - source.mean(0), np.sqrt(ridge * n) * np.eye(width)])
    y = np.concatenate([target - target.mean(0), np.zeros((width, target.shape[1]))])
    weight = np.linalg.lstsq(x, y, rcond=None)[0]
    directions = np.linalg.svd(x @ weight, full_matrices=False)[2][:rank].T
    weight = weight @ directions @ directions.T
    return weight, target.mean(0) - source.mean(0) @ weight


def penalised_error(source, target, weight, ridge):
    x, y = source - source.mean(0), target - target.mean(0)
    return np.square(x @ weight - y).sum() + ridge * len(x) * np.square(weight).sum()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.3])
@pytest.mark.parametrize(("rank", "block"), [(1, 8192), (2, 7), (3, 8192)])
def test_fit_matches_the_formula(seed, ridge, rank, block, monkeypatch):
    monkeypatch.setattr(pairs_module, "_BLOCK_ROWS", block)
    source, target = pairs(seed)
    transformation = LowRankTransformation(5, 3, rank).double().fit(source, target, ridge)
    weight, offset = reduced_rank(source, target, ridge, rank)
    np.testing.assert_allclose(transformation(torch.tensor(source)).detach(), source @ weight + offset, atol=1e-8)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_map_of_the_rank_is_better(seed):
    """The definition itself: no map near the fitted one has a smaller penalised error."""
    source, target = pairs(seed)
    fitted = LowRankTransformation(5, 3, 2).double().fit(source, target, 0.3)
    down, up = (layer.weight.detach().numpy() for layer in (fitted.down, fitted.up))
    best, generator = penalised_error(source, target, down.T @ up.T, 0.3), np.random.default_rng(seed)
    for _ in range(50):
        near = [weight + 0.01 * generator.normal(size=weight.shape) for weight in (down, up)]
        assert penalised_error(source, target, near[0].T @ near[1].T, 0.3) > best


def test_by_hand():
    # y = (3 x_1, x_2): of two directions the first explains more, and the second falls to its mean
    source = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    target = source * torch.tensor([3.0, 1.0]) + torch.tensor([0.0, 5.0])
    mapped = LowRankTransformation(2, 2, rank=1).fit(source, target, ridge=0.0)(source)
    torch.testing.assert_close(mapped, torch.tensor([[3.0, 5.0], [-3.0, 5.0], [0.0, 5.0], [0.0, 5.0]]))


@pytest.mark.parametrize("widths", [(5, 3), (3, 5), (4, 4)])
def test_the_full_rank_is_the_linear_map(widths):
    source, target = pairs(0, d_in=widths[0], d_out=widths[1])
    linear = LinearTransformation(*widths).double().fit(source, target)
    full = LowRankTransformation(*widths, min(widths)).double().fit(source, target)
    torch.testing.assert_close(full(torch.tensor(source)), linear(torch.tensor(source)))


def test_untrained_passes_the_first_coordinates():
    embeddings = torch.randn(3, 4)
    expected = torch.nn.functional.pad(embeddings[:, :2], (0, 4))
    torch.testing.assert_close(LowRankTransformation(4, 6, 2)(embeddings), expected)


@pytest.mark.parametrize(("n", "constant"), [(1, False), (3, False), (7, True)])
def test_few_rows_and_constant_ones(n, constant):
    source, target = torch.randn(n, 5), torch.randn(n, 3)
    if constant:
        source, target = torch.ones(n, 5), torch.ones(n, 3)
    mapped = LowRankTransformation(5, 3, 2).fit(source, target)(source)
    assert torch.isfinite(mapped).all()
    if n == 1 or constant:
        torch.testing.assert_close(mapped, target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda s, t: (s[:-1], t), r"target must have one row for each row of source.*expected 39, got 40"),
        (lambda s, t: (s[:, :4], t), r"source \(from row 0\) must be 5 wide, got width 4"),
        (lambda s, t: (broken(np.nan), t), r"source \(from row 0\) must be finite, row 3"),
        (lambda s, t: (s, t, -1.0), r"ridge must be .* at least 0, got -1.0"),
        (lambda s, t: (s[:3], t[:3], 0.0), r"ridge must be above 0 here, got 0"),
    ],
)
def test_errors_leave_the_map_as_it_was(arguments, message):
    transformation = LowRankTransformation(5, 3, 2)
    before = {key: tensor.clone() for key, tensor in transformation.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        transformation.fit(*arguments(*pairs(0)))
    for key, tensor in transformation.state_dict().items():
        assert tensor.equal(before[key])


def test_ranks_that_are_none():
    with pytest.raises(ValueError, match=r"rank must be at most the narrower width, 3, got 4; see LinearTransf"):
        LowRankTransformation(5, 3, 4)
    with pytest.raises(ValueError, match=r"rank must be an integer of at least 1, got 0"):
        LowRankTransformation(5, 3, 0)
