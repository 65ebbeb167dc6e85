"""Rows of length 1, with a finite slope also where a row is 0."""

from __future__ import annotations

import torch


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


def unit_rows_as_given(rows: torch.Tensor) -> torch.Tensor:
    """Return rows of length 1 in the dtype they have, computed in float32 at least; a row of 0 stays 0."""
    precise = rows.to(torch.promote_types(rows.dtype, torch.float32))  # float16 has no number to keep 0 / 0 away with
    return torch.nn.functional.normalize(precise, dim=1).to(rows.dtype)
