"""Some of what a migration has written, read back and compared."""

from __future__ import annotations

import numpy as np

from .stores import open_store
from .stores.base import Batch, Store

_READ_BACK = 256  # items that are compared at the end
_OTHERS = 0.1  # of them, that others may have written meanwhile


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

    def compare(self, address: str, rows: int, live: Store | None = None) -> int:
        """Return how many items were compared.

        Args:
            address: of the new store.
            rows: that it should have.
            live: the old store, where others write to both meanwhile: an item may be gone from both, and some may be
                another's.
        """
        store = open_store(address)
        if live is None and len(store) != rows:
            raise RuntimeError(f"{address} has {len(store):,} items after {rows:,} were written")
        if self.ids is None or self.vectors is None:
            return 0
        ids, mapped = self.ids, self.vectors
        if live is not None:
            there = store.known(ids)
            if (live.known(ids) & ~there).any():
                raise RuntimeError(f"{address} lacks {ids[there.argmin()].item()!r}, which was written")
            ids, mapped = ids[there], mapped[there]
        found, mapped = _unit(store.fetch(ids)), _unit(store.as_stored(mapped))
        wrong = np.abs(found - mapped).max(1) > 1e-3
        if wrong.sum() > (0 if live is None else len(ids) * _OTHERS):
            raise RuntimeError(
                f"{address} gives back another vector than was written for {ids[wrong.argmax()].item()!r}"
            )
        return len(ids)


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
