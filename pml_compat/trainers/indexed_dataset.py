"""Any data set, with the index of each sample beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class IndexedDataset(torch.utils.data.Dataset[Any]):
    """Gives every sample of a data set its index: ``(data, label)`` becomes ``(data, label, index)``.

    By the index a trainer finds what is stored of the sample. Wrap the whole data set, and take the part to train on
    from the result: ``Subset(IndexedDataset(dataset), part)`` keeps the indices of the whole.

    Args:
        dataset: with ``len()``; its items are tuples or lists that begin with data and label.
    Raises:
        ValueError: in a lookup, an item that is no tuple or list.
    Example:
        >>> dataset = torch.utils.data.TensorDataset(torch.zeros(2, 3), torch.tensor([5, 6]))
        >>> IndexedDataset(dataset)[1]
        (tensor([0., 0., 0.]), tensor(6), 1)
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self._with_index(self.dataset[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, ...]]:
        """Return several samples; this is what a DataLoader calls for a batch."""
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(indices) if fetch else [self.dataset[index] for index in indices]
        return [self._with_index(item, index) for item, index in zip(items, indices, strict=True)]

    def _with_index(self, item: Any, index: int) -> tuple[Any, ...]:
        if not isinstance(item, tuple | list):
            raise ValueError(f"dataset must give (data, label) tuples, got {type(item).__name__}")
        return (*item, index + len(self) if index < 0 else index)
