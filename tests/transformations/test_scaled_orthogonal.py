import numpy as np
import pytest
import torch

from pml_compat.transformations import LinearTransformation, OrthogonalTransformation, ScaledOrthogonalTransformation
from tests import reference
from tests.transformations.cases import build
from tests.transformations.test_orthogonal import pairs

all_widths = pytest.mark.parametrize("widths", [(4, 4), (5, 3), (3, 5)])


@pytest.mark.parametrize("seed", [0, 1, 2])
@all_widths
def test_fit_matches_the_formula(seed, widths):
    source, target = pairs(seed, *widths)
    rotated = (source + 2) @ reference.procrustes(source + 2, target)
    # a least-squares problem of one unknown for each coordinate
    scales = [np.linalg.lstsq(rotated[:, k : k + 1], target[:, k], rcond=None)[0][0] for k in range(widths[1])]
    fitted = ScaledOrthogonalTransformation(*widths).double().fit(source + 2, target)
    np.testing.assert_allclose(fitted(torch.tensor(source + 2)).detach(), rotated * scales, atol=1e-9)
    np.testing.assert_allclose(fitted.scale.detach(), scales, atol=1e-9)
    assert min(scales) >= 0


@all_widths
def test_the_rotation_is_that_of_the_orthogonal_map(widths):
    source, target = pairs(0, *widths)
    expected = OrthogonalTransformation(*widths).double().fit(source, target).matrix()
    torch.testing.assert_close(
        ScaledOrthogonalTransformation(*widths).double().fit(source, target).rotation.matrix(), expected
    )


def test_by_hand():
    source = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    quarter = torch.tensor([[0.0, 1.0], [-2.0, 0.0], [2.0, 0.0]])
    fitted = ScaledOrthogonalTransformation(2, 2).fit(source, quarter * torch.tensor([3.0, 0.5]))
    torch.testing.assert_close(fitted.scale, torch.tensor([3.0, 0.5]))
    torch.testing.assert_close(fitted(torch.tensor([[1.0, 1.0]])), torch.tensor([[-3.0, 0.5]]))


def test_folded_is_one_matrix():
    transformation = build("scaled_orthogonal_narrower")
    folded, embeddings = transformation.folded(), torch.randn(3, 6)
    assert isinstance(folded, LinearTransformation)
    torch.testing.assert_close(folded(embeddings), transformation(embeddings))


def test_untrained_is_fit_width():
    embeddings = torch.randn(3, 4)
    torch.testing.assert_close(ScaledOrthogonalTransformation(4, 2)(embeddings), embeddings[:, :2])


@pytest.mark.parametrize("n", [1, 3, 30])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_few_rows_and_constant_ones(n, value):
    source, target = torch.full((n, 5), value), torch.randn(n, 3)
    fitted = ScaledOrthogonalTransformation(5, 3).fit(source, target)
    assert torch.isfinite(fitted(source)).all()
    if value == 0:
        assert fitted.scale.equal(torch.ones(3))


def test_lengths_must_agree():
    source, target = pairs(0, 4, 4)
    with pytest.raises(ValueError, match=r"target must have one row for each row of source"):
        ScaledOrthogonalTransformation(4, 4).fit(source, target[1:])
    with pytest.raises(ValueError, match=r"target \(from row 0\) must be 3 wide, got width 4"):
        ScaledOrthogonalTransformation(4, 3).fit(source, target)
