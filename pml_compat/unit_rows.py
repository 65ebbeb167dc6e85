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
