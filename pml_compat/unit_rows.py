"""Rows of length 1, with a finite slope also where a row is 0."""

from __future__ import annotations

import torch


def unit_rows(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return rows of length 1; too short a row becomes 0, with a gradient of 0.

    The slope at a short row is 1 / its length, which has to be a number of ``dtype``, that of the embeddings, too.
    """
    shortest = max(1e-12, torch.finfo(dtype).tiny)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows * torch.where(length >= shortest, 1 / length.clamp_min(shortest), 0.0)


def unit_rows_as_given(rows: torch.Tensor) -> torch.Tensor:
    """Return rows of length 1 in the dtype they have, computed in float32 at least; a row of 0 stays 0."""
    precise = rows.to(torch.promote_types(rows.dtype, torch.float32))  # float16 has no number to keep 0 / 0 away with
    return torch.nn.functional.normalize(precise, dim=1).to(rows.dtype)
