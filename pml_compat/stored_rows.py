"""Rows of what is stored, wherever that is: a tensor, an array, a memory map or ``FrozenEmbeddings``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .checks import as_tensor, check_finite


def stored_rows(array: Any, index: torch.Tensor, name: str) -> torch.Tensor:
    """Return the rows ``index``, in their dtype, where they are stored; a NaN or an infinity is an error."""
    if isinstance(array, np.ndarray):  # fancy indexing copies, so that a read-only memory map is only read
        rows = as_tensor(np.asarray(array[index.numpy()]), name)
    elif isinstance(array, torch.Tensor):
        rows = array.detach()[index.to(array.device)]
    else:
        rows = as_tensor(array[index], name)
    check_finite(rows, name, places=index)
    return rows
