"""How far class weights point away from class centres, without temporaries of their size."""

from __future__ import annotations

from collections.abc import Iterable
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


def rows_of_a_block(weights: torch.Tensor) -> int:
    """Return how many rows are gone through at once."""
    elements = _BLOCK_ELEMENTS.get(weights.device.type, _BLOCK_ELEMENTS["cuda"])
    return max(1, elements // weights.shape[1])


class _DirectionError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        squares, products = [], []
        for block, aims in _blocks(weights, directions):
            squares.append((block * block).sum(1))  # where columns lie together, faster than the norm of rows
            products.append((block * aims).sum(1))
        lengths = _joined(squares).sqrt_()
        inverse = torch.where(lengths > 0, 1 / lengths, 0)
        cosines = _joined(products) * inverse
        ctx.save_for_backward(weights, directions, inverse, cosines)
        return ((lengths > 0) + 1 - 2 * cosines).sum() / weights.numel()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights, directions, inverse, cosines = ctx.saved_tensors
        factor = grad * (-2 / weights.numel()) * inverse
        onto_weights = -factor * cosines * inverse
        gradient = torch.empty_like(weights)
        given = weights, gradient, directions, factor[:, None], onto_weights[:, None]
        for block, found, aims, one, other in _blocks(*given):
            torch.mul(aims, one, out=found).addcmul_(block, other)
        return gradient, None


def _blocks(weights: torch.Tensor, *others: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Return rows that belong together, some at a time; few classes come whole, as to split takes as long as a sum."""
    size = rows_of_a_block(weights)
    given = weights, *others
    return [given] if len(weights) <= size else zip(*(rows.split(size) for rows in given), strict=True)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
