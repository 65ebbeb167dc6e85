"""What a model takes: one tensor, or tensors in dicts, tuples and lists, as a tokenizer gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def moved_to(data: Any, device: Any = None, dtype: torch.dtype | None = None) -> Any:
    """Return a nest of tensors on ``device``; floating-point ones in ``dtype``. What is no tensor stays as it is.

    Args:
        data: a tensor, or mappings, tuples and lists of such nests; a mapping comes back as a dict.
        device: None: where they are.
        dtype: None: that which they have.
    """
    if isinstance(data, torch.Tensor):
        return data.to(device=device, dtype=dtype if data.is_floating_point() else None)
    return each(data, lambda part: moved_to(part, device, dtype))


def rows_of(data: Any, index: Any) -> Any:
    """Return the rows ``index`` of every tensor in a nest."""
    return data[index] if isinstance(data, torch.Tensor) else each(data, lambda part: rows_of(part, index))


def each(data: Any, change: Any) -> Any:
    """Return a mapping, tuple or list with every part changed; anything else as it is."""
    if isinstance(data, Mapping):
        return {key: change(part) for key, part in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(change(part) for part in data))
    return type(data)(change(part) for part in data) if isinstance(data, tuple | list) else data
