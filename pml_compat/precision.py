"""Where precision counts, whatever the autocast around it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


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
