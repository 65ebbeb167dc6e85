"""The stored old embeddings of a batch, looked up and checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..frozen import FrozenEmbeddings

ONE = ""  # the name of an old model that was given without one


def called(argument: str, name: str) -> str:
    """Return what to call an old model's argument in errors."""
    return argument if name == ONE else f"{argument}[{name!r}]"


def rows_in_batch(batch: Any, length: int) -> torch.Tensor:
    """Return the old embeddings that an OldEmbeddingDataset put into a batch."""
    rows = batch[-1] if isinstance(batch, tuple | list) else None
    if not isinstance(rows, torch.Tensor) or rows.ndim != 2 or len(rows) != length or not rows.is_floating_point():
        got = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(batch if rows is None else rows).__name__
        raise ValueError(
            f"the last part of a batch of an OldEmbeddingDataset must be ({length}, D) old embeddings, got {got}; let "
            "collate_fn keep it, or give old_embeddings and index_getter"
        )
    return rows


def indices_in_batch(batch: Any, index_getter: Callable[[Any], Any] | None, length: int) -> torch.Tensor:
    """Return the data set's index of each sample of a batch."""
    if index_getter is not None:
        index = index_getter(batch)
    elif not isinstance(batch, tuple | list) or len(batch) < 3:
        got = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(
            f"dataset must give (data, label, index) for old_embeddings to be looked up, got a {got}; wrap it in "
            "pml_compat.trainers.IndexedDataset, or give index_getter"
        )
    else:
        index = batch[-1]
    index = torch.as_tensor(index)
    if index.ndim != 1 or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(
            f"the indices of a batch must be integers of shape (N,), got {index.dtype} of shape {tuple(index.shape)}; "
            "they are its last part, or what index_getter returns"
        )
    if len(index) != length:
        raise ValueError(f"the indices of a batch must be one a sample: expected {length}, got {len(index)}")
    return index


def stored_rows(stored: FrozenEmbeddings, index: torch.Tensor, name: str) -> torch.Tensor:
    """Return the old embedding of each sample of a batch."""
    rows = stored.index_of(index)
    missing = (rows < 0).nonzero()[:, 0]
    if len(missing):
        raise ValueError(
            f"{called('old_embeddings', name)} must have every sample that dataset gives, index "
            f"{int(index[int(missing[0])])} is not among its {len(stored)}; embed it with the old model, or leave it "
            "out with torch.utils.data.Subset"
        )
    return stored[rows]
