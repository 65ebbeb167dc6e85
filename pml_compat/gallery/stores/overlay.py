"""Other vectors for some items of a store, laid over what is read of it."""

from __future__ import annotations

import numpy as np

from .base import Batch


class Overlay:
    """Vectors of some ids, laid over batches.

    Args:
        ids: ``(n,)``, each once.
        vectors: ``(n, D)``, in memory or mapped.
    """

    def __init__(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        self.order = np.argsort(ids, kind="stable")
        self.ids, self.vectors = ids[self.order], vectors
        self.found = 0

    def on(self, batch: Batch) -> np.ndarray:
        """Return the vectors of a batch, with the others in their place."""
        places = np.searchsorted(self.ids, batch.ids).clip(max=len(self.ids) - 1)
        here = np.flatnonzero(self.ids[places] == batch.ids)
        if not len(here):
            return batch.vectors
        self.found += len(here)
        rows = np.array(batch.vectors)
        rows[here] = self.vectors[self.order[places[here]]]
        return rows

    def check_all_found(self, address: str) -> None:
        """Raise a ValueError where some ids were in no batch."""
        if self.found != len(self.ids):
            raise ValueError(
                f"{address} must hold the ids that are asked for, it lacks {len(self.ids) - self.found} of them"
            )
