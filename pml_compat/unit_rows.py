"""Rows of length 1, with a finite slope also where a row is 0."""

from __future__ import annotations

from typing import Any

import torch

from .precision import at_least_float32


def shortest_row(dtype: torch.dtype) -> float:
    """Return the length below which a row counts as 0: the slope at it, 1 / length, has to be a number of ``dtype``."""
    return max(1e-12, torch.finfo(dtype).tiny)


def unit_rows(rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return rows of length 1; too short a row becomes 0, with a gradient of 0.

    ``dtype`` is that of the embeddings which the rows were cast from; None: that of the rows.
    """
    shortest = shortest_row(rows.dtype if dtype is None else dtype)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows * torch.where(length >= shortest, 1 / length.clamp_min(shortest), 0.0)


def cosines_with(rows: torch.Tensor, directions: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return each row's cosine with the unit row that stands beside it, without a unit copy of the rows.

    Args:
        rows: ``(N, D)``, of any length; too short a row has cosine 0 and a gradient of 0.
        directions: ``(N, D)`` unit rows, fixed.
        dtype: see :func:`unit_rows`.
    Shape:
        - output: ``(N,)``
    """
    return _CosinesWith.apply(rows, directions, shortest_row(rows.dtype if dtype is None else dtype))


class _CosinesWith(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, directions: torch.Tensor, shortest: float) -> torch.Tensor:
        lengths = torch.linalg.vector_norm(rows, dim=1)
        inverse = torch.where(lengths >= shortest, 1 / lengths, 0.0)
        cosines = (rows * directions).sum(1) * inverse
        ctx.save_for_backward(rows, directions, inverse, cosines)
        return cosines

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, directions, inverse, cosines = ctx.saved_tensors
        # The slope before ``grad`` comes in: where little but rounding is left of it, a larger loss rounds it alike.
        slopes = torch.addcmul(directions, rows, (cosines * inverse)[:, None], value=-1)
        return slopes.mul_((grad * inverse)[:, None]), None, None


def unit_rows_as_given(rows: torch.Tensor) -> torch.Tensor:
    """Return rows of length 1 in the dtype they have, computed in float32 at least; a row of 0 stays 0."""
    precise = at_least_float32(rows)  # float16 has no number to keep 0 / 0 away with
    return torch.nn.functional.normalize(precise, dim=1).to(rows.dtype)
