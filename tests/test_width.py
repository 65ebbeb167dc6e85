import pytest
import torch

from pml_compat import fit_width


@pytest.mark.parametrize(
    ("width", "expected"),
    [(1, [[1.0]]), (2, [[1.0, 2.0]]), (3, [[1.0, 2.0, 3.0]]), (5, [[1.0, 2.0, 3.0, 0.0, 0.0]])],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cuts_or_pads_with_zeros(width, expected, dtype):
    out = fit_width(torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype), width)
    assert out.dtype == dtype
    assert out.tolist() == expected


def test_same_width_is_the_same_tensor():
    embeddings = torch.randn(2, 3)
    assert fit_width(embeddings, 3) is embeddings


@pytest.mark.parametrize("width", [2, 5])
def test_gradient_reaches_the_coordinates_that_stay(width):
    embeddings = torch.randn(2, 3, requires_grad=True)
    fit_width(embeddings, width).sum().backward()
    assert embeddings.grad.tolist() == [[1.0 if column < width else 0.0 for column in range(3)]] * 2
