"""How far class weights point away from class centres, without temporaries of their size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# Elements gone through at once: a block stays in the cache of a CPU core, and fills a GPU.
_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}


def direction_error(weights: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    r"""Return :math:`\frac{1}{C d} \sum_j \lVert w_j / \lVert w_j \rVert - c_j \rVert^2`.

    The direction of a row of length 0 counts as 0 and receives no gradient.

    Args:
        weights: ``(C, d)``, of any length; receives the gradient.
        directions: ``(C, d)``, unit rows, fixed. Fastest where both lie in memory alike.
    Shape:
        - output: scalar
    """
    return _DirectionError.apply(weights, directions)


def blocks(weights: torch.Tensor) -> Iterator[slice]:
    """Split the rows into blocks of bounded size."""
    elements = _BLOCK_ELEMENTS.get(weights.device.type, _BLOCK_ELEMENTS["cuda"])
    size = max(1, elements // weights.shape[1])
    return (slice(start, start + size) for start in range(0, len(weights), size))


class _DirectionError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        lengths, products = weights.new_empty(len(weights)), weights.new_empty(len(weights))
        for rows in blocks(weights):
            torch.linalg.vector_norm(weights[rows], dim=1, out=lengths[rows])
            torch.sum(weights[rows] * directions[rows], dim=1, out=products[rows])
        inverse = torch.where(lengths > 0, 1 / lengths, 0)
        cosines = products * inverse
        ctx.save_for_backward(weights, directions, inverse, cosines)
        return ((lengths > 0) + 1 - 2 * cosines).sum() / weights.numel()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights, directions, inverse, cosines = ctx.saved_tensors
        factor = grad * (-2 / weights.numel()) * inverse
        onto_weights = -factor * cosines * inverse
        gradient = torch.empty_like(weights)
        for rows in blocks(weights):
            torch.mul(directions[rows], factor[rows, None], out=gradient[rows])
            gradient[rows].addcmul_(weights[rows], onto_weights[rows, None])
        return gradient, None
