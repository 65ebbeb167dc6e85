import numpy as np
import pytest
import torch

from pml_compat.transformations import ResidualBottleneckTransformation
from tests import reference
from tests.pairwise import pairwise
from tests.transformations.cases import build


@pairwise
@pytest.mark.parametrize("name", ["residual_bottleneck", "residual_bottleneck_wider"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_matches_the_formula(name, seed, training):
    transformation = build(name, seed).double().train(training)
    embeddings = torch.randn(6, transformation.in_features, dtype=torch.double)
    state = {key: tensor.numpy().copy() for key, tensor in transformation.state_dict().items()}
    config = transformation.config()
    expected = reference.residual_bottleneck(embeddings.numpy(), state, config["blocks"], config["paths"], training)
    np.testing.assert_allclose(transformation(embeddings).detach(), expected, rtol=1e-9, atol=1e-9)


def test_untrained_is_its_skip():
    embeddings = torch.randn(5, 4)
    for transformation in (ResidualBottleneckTransformation(4, 4), ResidualBottleneckTransformation(4, 4).eval()):
        torch.testing.assert_close(transformation(embeddings), embeddings)
    torch.testing.assert_close(ResidualBottleneckTransformation(4, 3)(embeddings), embeddings[:, :3])


def test_parameters():
    """Four blocks of four paths at 32: 32*16 + 16*16 + 16*32 weights, 2 * 64 of the norms, 64 slopes, a path."""
    count = sum(p.numel() for p in ResidualBottleneckTransformation(32, 32).parameters())
    assert count == 4 * 4 * (32 * 16 + 16 * 16 + 16 * 32 + 2 * 64 + 64)


def test_learns_a_bend():
    """What a linear map cannot: the absolute value."""
    torch.manual_seed(0)
    embeddings = torch.randn(256, 4)
    transformation = ResidualBottleneckTransformation(4, 4)
    optimizer = torch.optim.Adam(transformation.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        error = (transformation(embeddings) - embeddings.abs()).square().mean()
        error.backward()
        optimizer.step()
    assert error < 0.05 < (embeddings - embeddings.abs()).square().mean()


@pytest.mark.parametrize("argument", ["hidden_features", "paths", "blocks"])
def test_sizes_below_one(argument):
    with pytest.raises(ValueError, match=rf"{argument} must be an integer of at least 1, got 0"):
        ResidualBottleneckTransformation(4, 4, **{argument: 0})
