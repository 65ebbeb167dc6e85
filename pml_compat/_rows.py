"""Rows of embeddings: their precision, their length and their width."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_LEAST_MOMENT = 1e-3  # of the mean one
LEAST_SPREAD = 1e-3


def no_autocast(rows: torch.Tensor) -> AbstractContextManager[None]:
    """Leave the autocast of a tensor's device, where there is one: to enter the context takes as long as a small op."""
    device = rows.device.type
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def precise_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which rows of ``dtype`` are computed on: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def at_least_float32(rows: torch.Tensor) -> torch.Tensor:
    """Return rows in the dtype in which they are computed on; the very tensor where that is its own."""
    return rows.to(precise_dtype(rows.dtype))


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


def spread_of(rows: torch.Tensor) -> torch.Tensor:
    """Return the root mean square distance of unit rows from their mean, 0-dimensional, not below 0.001."""
    if len(rows) == 0:
        return rows.new_ones(())
    distances = torch.linalg.vector_norm(rows - rows.mean(0), dim=1)
    return distances.square().mean().sqrt().clamp(min=LEAST_SPREAD)


def unit_rows_as_given(rows: torch.Tensor) -> torch.Tensor:
    """Return rows of length 1 in the dtype they have, computed in float32 at least; a row of 0 stays 0."""
    precise = at_least_float32(rows)  # float16 has no number to keep 0 / 0 away with
    return torch.nn.functional.normalize(precise, dim=1).to(rows.dtype)


def unit_rows_times(rows: torch.Tensor, matrix: torch.Tensor | None) -> torch.Tensor:
    """Return rows times a matrix, or as they are for None, at length 1 and in their dtype; a row of 0 stays 0."""
    precise = at_least_float32(rows)
    with no_autocast(rows):
        return unit_rows_as_given(precise if matrix is None else precise @ matrix.to(precise)).to(rows.dtype)


def fit_width(embeddings: torch.Tensor, width: int) -> torch.Tensor:
    r"""Fit embeddings to another space's width: the first ``width`` coordinates, or zeros appended.

    It is BCT's rule (``losses.BCTLoss`` trains by it) and so the rule of every cross-test between models of
    different widths. A wider new model is served to an old gallery as ``fit_width(new, d_old)``.

    Args:
        embeddings: ``(N, D)``.
        width: the width wanted, 1 or more.
    Shape:
        - output: ``(N, width)``; ``embeddings`` itself where ``D == width``.
    Example:
        >>> fit_width(torch.tensor([[1.0, 2.0, 3.0]]), 2)
        tensor([[1., 2.]])
        >>> fit_width(torch.tensor([[1.0, 2.0, 3.0]]), 4)
        tensor([[1., 2., 3., 0.]])

    Reference:
        Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020, as in its public code.
    """
    missing = width - embeddings.shape[1]
    if missing == 0:
        return embeddings
    return embeddings[:, :width] if missing < 0 else torch.nn.functional.pad(embeddings, (0, missing))


def as_wide(
    embeddings: torch.Tensor, other: torch.Tensor, fit: bool, names: tuple[str, str] = ("query", "reference")
) -> torch.Tensor:
    """Return embeddings that can be compared with ``other``: as they are, or, if asked, by :func:`fit_width`.

    Args:
        embeddings: ``(Q, D)``.
        other: ``(N, D_other)``.
        fit: whether the caller asked for :func:`fit_width`.
        names: what to call the two in the error message.
    Raises:
        ValueError: widths that differ, without ``fit``.
    """
    if embeddings.shape[1] != other.shape[1] and not fit:
        raise ValueError(
            f"{names[0]} must be as wide as {names[1]}, got widths {embeddings.shape[1]} and {other.shape[1]}; map one "
            "into the other's space with a transformation, or, where the new model was trained to serve the old "
            "gallery with its first coordinates (as BCT does), say so with fit_width=True"
        )
    return fit_width(embeddings, other.shape[1])


def second_moments(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvalues, upwards, and eigenvectors (columns) of the rows' second moments, float32 or better."""
    rows = at_least_float32(rows)
    return tuple(torch.linalg.eigh(rows.t() @ rows / max(1, len(rows))))


def whitening(moments: tuple[torch.Tensor, torch.Tensor], power: float) -> torch.Tensor:
    """Return the ``(D, D)`` negative power of second moments, 1 in their largest direction.

    Directions that hardly occur count as if they had a thousandth of the mean moment.
    """
    values, axes = moments
    least = (_LEAST_MOMENT * values.mean()).clamp(min=torch.finfo(values.dtype).tiny)  # not read back from the device
    values = torch.maximum(values, least)
    return (axes * (values / values[-1]) ** -power) @ axes.t()
