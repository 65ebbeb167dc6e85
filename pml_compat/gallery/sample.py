"""Some of what a migration has written, read back and compared."""

from __future__ import annotations

import numpy as np

from .stores import open_store
from .stores.base import Batch

_READ_BACK = 256  # items that are compared at the end


class Sample:
    """Some of what was mapped, drawn evenly, to compare with what the new store gives back."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)
        self.keys = np.zeros(0)
        self.ids: np.ndarray | None = None
        self.vectors: np.ndarray | None = None

    def add(self, batch: Batch) -> None:
        """Keep some items of a batch."""
        keys = np.concatenate([self.keys, self.generator.random(len(batch.ids))])
        kept = np.argsort(keys)[:_READ_BACK]
        ids = batch.ids if self.ids is None else np.concatenate([self.ids, batch.ids])
        vectors = batch.vectors if self.vectors is None else np.concatenate([self.vectors, batch.vectors])
        self.keys, self.ids, self.vectors = keys[kept], ids[kept], vectors[kept]

    def compare(self, address: str, rows: int) -> int:
        """Return how many items were compared."""
        store = open_store(address)
        if len(store) != rows:
            raise RuntimeError(f"{address} has {len(store):,} items after {rows:,} were written")
        if self.ids is None or self.vectors is None:
            return 0
        found, mapped = (_unit(rows) for rows in (store.fetch(self.ids), self.vectors))
        wrong = np.abs(found - mapped).max(1) > 1e-3
        if wrong.any():
            raise RuntimeError(
                f"{address} gives back another vector than was written for {self.ids[wrong.argmax()].item()!r}"
            )
        return len(self.ids)


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
