import numpy as np
import pytest
import torch

from pml_compat.transformations import OrthogonalTransformation
from tests import reference
from tests.transformations.cases import build


def pairs(seed, d_in, d_out, n=30):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, d_in)), generator.normal(size=(n, d_out))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("widths", [(4, 4), (5, 3), (3, 5)])
def test_fit_matches_the_formula(seed, widths):
    source, target = pairs(seed, *widths)
    transformation = OrthogonalTransformation(*widths).double().fit(source, target)
    expected = source @ reference.procrustes(source, target)
    np.testing.assert_allclose(transformation(torch.tensor(source)).detach(), expected, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_small_turn_is_better(seed):
    """The definition itself: no rotation near the fitted one comes closer to the targets."""
    source, target = pairs(seed, 4, 4)
    fitted = OrthogonalTransformation(4, 4).double().fit(source, target)

    def distance(transformation):
        return (transformation(torch.tensor(source)) - torch.tensor(target)).square().sum().item()

    for trial in range(20):
        turned = OrthogonalTransformation(4, 4).double().fit(source, target)
        with torch.no_grad():
            turned.generator.normal_(std=0.1, generator=torch.Generator().manual_seed(trial))
        assert distance(turned) > distance(fitted)


def test_by_hand():
    source = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    quarter = source @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    fitted = OrthogonalTransformation(2, 2).fit(source, 5 * quarter)  # a change of length is not its business
    torch.testing.assert_close(fitted(source), quarter)
    torch.testing.assert_close(fitted.matrix(), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))


@pytest.mark.parametrize("name", ["orthogonal", "orthogonal_narrower", "orthogonal_wider"])
def test_stays_orthogonal_in_training(name):
    transformation = build(name).double()
    torch.nn.init.orthogonal_(transformation.base)
    optimizer = torch.optim.Adam(transformation.parameters(), lr=0.1)
    before = transformation.matrix().detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        transformation(torch.randn(8, transformation.in_features, dtype=torch.double)).sum().backward()
        optimizer.step()
    matrix = transformation.matrix().detach()
    assert (matrix - before).norm() > 0.1
    gram = matrix @ matrix.t() if len(matrix) <= matrix.shape[1] else matrix.t() @ matrix
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.double))


def test_equal_widths_change_no_distance():
    transformation = build("orthogonal").double()
    torch.nn.init.orthogonal_(transformation.base)
    embeddings = torch.randn(6, 5, dtype=torch.double)
    torch.testing.assert_close(
        torch.cdist(transformation(embeddings), transformation(embeddings)), torch.cdist(embeddings, embeddings)
    )


def test_untrained_is_fit_width():
    embeddings = torch.randn(3, 4)
    torch.testing.assert_close(OrthogonalTransformation(4, 2)(embeddings), embeddings[:, :2])
    torch.testing.assert_close(OrthogonalTransformation(4, 6)(embeddings), torch.nn.functional.pad(embeddings, (0, 2)))


def test_lengths_must_agree():
    source, target = pairs(0, 4, 4)
    with pytest.raises(ValueError, match=r"target must have one row for each row of source"):
        OrthogonalTransformation(4, 4).fit(source, target[1:])
