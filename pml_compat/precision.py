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
