"""Any data set, with the old model's embedding of each sample beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .embeddings import FrozenEmbeddings


class OldEmbeddingDataset(torch.utils.data.Dataset[Any]):
    """Gives every sample of a data set its old embedding: ``(data, label)`` becomes ``(data, label, old_embedding)``.

    Augmentation may change the data; the old embedding is the stored one. PML's trainers and testers take such a data
    set with ``data_and_label_getter=data_and_label``. A batch is looked up at once, not sample by sample.

    Args:
        dataset: with ``len()``; its items are tuples or lists that begin with data and label. The old embedding comes
            last.
        old_embeddings: the old embeddings of its samples, in any order.
        ids: ``(len(dataset),)`` integers, the id in ``old_embeddings`` of the sample at each position; None: the
            position itself, of a data set that is as long as ``old_embeddings``.
    Raises:
        ValueError: lengths that differ, ids that are not in ``old_embeddings``; in a lookup, an item that is no
            ``(data, label)``.
    Example:
        >>> images, labels = torch.zeros(2, 3), torch.tensor([5, 6])
        >>> old = FrozenEmbeddings.from_array(torch.eye(2), ids=[11, 10])
        >>> OldEmbeddingDataset(torch.utils.data.TensorDataset(images, labels), old, ids=[10, 11])[0]
        (tensor([0., 0., 0.]), tensor(5), tensor([0., 1.]))
    """

    def __init__(self, dataset: Any, old_embeddings: FrozenEmbeddings, ids: Any = None) -> None:
        if not isinstance(old_embeddings, FrozenEmbeddings):
            raise ValueError(
                f"old_embeddings must be FrozenEmbeddings, got {type(old_embeddings).__name__}; "
                "FrozenEmbeddings.from_array takes tensors, arrays and .npy files"
            )
        if ids is None and len(old_embeddings) != len(dataset):
            raise ValueError(
                f"old_embeddings must have one row a sample: expected {len(dataset)}, got {len(old_embeddings)}; "
                "where they are of more samples, or in another order, give ids"
            )
        ids = range(len(dataset)) if ids is None else ids
        if len(ids) != len(dataset):
            raise ValueError(f"ids must have one entry a sample: expected {len(dataset)}, got {len(ids)}")
        rows = old_embeddings.index_of(ids)
        missing = (rows < 0).nonzero()[:, 0]
        if len(missing):
            raise ValueError(
                f"ids must all be in old_embeddings, {len(missing)} of {len(rows)} are not, the first is "
                f"{int(ids[int(missing[0])])}; embed these samples with the old model, or leave them out with "
                "torch.utils.data.Subset"
            )
        self.dataset, self.old_embeddings = dataset, old_embeddings
        self._rows = rows

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (*_check_item(self.dataset[index]), self.old_embeddings[self._rows[index]])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, ...]]:
        """Return several samples; this is what a DataLoader calls for a batch."""
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(indices) if fetch else [self.dataset[index] for index in indices]
        old_embeddings = self.old_embeddings[self._rows[torch.as_tensor(indices, dtype=torch.long)]]
        return [(*_check_item(item), old) for item, old in zip(items, old_embeddings, strict=True)]


def data_and_label(batch: Sequence[Any]) -> tuple[Any, Any]:
    """Return the data and the labels of a batch that has more: the ``data_and_label_getter`` for PML."""
    return batch[0], batch[1]


def _check_item(item: Any) -> Sequence[Any]:
    if not isinstance(item, tuple | list) or len(item) < 2:
        got = f"{type(item).__name__} of {len(item)}" if isinstance(item, tuple | list) else type(item).__name__
        raise ValueError(f"dataset must give (data, label) tuples, got a {got}; wrap it in one that does")
    return item
