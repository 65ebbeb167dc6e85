"""What a store of vectors can do: be read in a fixed order, and have another written beside it, a batch at a time."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Some items of a store, in its order.

    Args:
        ids: ``(n,)`` numbers or strings; the rows' numbers where the store has no ids.
        vectors: ``(n, D)`` floating point.
        payload: what else is stored with each item: a ``pyarrow.Table`` or a list of dicts; None for nothing.
        cursor: where the next batch begins, of types that JSON has; None after the last.
        left_out: columns of the payload that are ids or vectors, in a table that keeps the order of its columns.
    """

    ids: np.ndarray
    vectors: np.ndarray
    payload: Any
    cursor: Any
    left_out: tuple[str, ...] = ()

    def records(self) -> list[dict[str, Any]]:
        """Return the payload as a dict an item."""
        if self.payload is None:
            return [{} for _ in self.ids]
        if isinstance(self.payload, list):
            return self.payload
        return self.payload.drop_columns(list(self.left_out)).to_pylist()

    def take(self, rows: np.ndarray) -> Batch:
        """Return some items of a batch whose payload is a list or None."""
        payload = None if self.payload is None else [self.payload[row] for row in rows]
        return replace(self, ids=self.ids[rows], vectors=self.vectors[rows], payload=payload)


class Store(abc.ABC):
    """A gallery where it is kept; it is only read.

    Attributes:
        address: names it.
        width: of its vectors.
        dtype: of its vectors.
        notes: what a reader should know, one sentence each.
        live: whether others may write to it meanwhile.
    """

    address: str
    width: int
    dtype: np.dtype
    notes: tuple[str, ...] = ()
    live = False

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of items."""

    @abc.abstractmethod
    def batches(self, size: int, cursor: Any = None) -> Iterator[Batch]:
        """Yield the items in a fixed order, ``size`` or fewer at once, from a cursor of the same size on."""

    @abc.abstractmethod
    def fetch(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors of some items, in the order of ``ids``.

        Raises:
            ValueError: an id that the store does not have.
        """

    def known(self, ids: np.ndarray) -> np.ndarray:
        """Tell of each id whether a live store has it."""
        raise NotImplementedError

    def as_stored(self, vectors: np.ndarray) -> np.ndarray:
        """Return vectors as the store gives them back, which a quantiser changes."""
        return vectors


class Writer(abc.ABC):
    """A new store beside an old one. What a run that was killed has written stays, and the next one goes on there.

    Attributes:
        written_whole: whether :meth:`replace` writes the whole store anew, and should have all vectors at once.
    """

    written_whole = False

    @abc.abstractmethod
    def keep(self, manifest: Manifest) -> None:
        """Keep the manifest beside, or in, the new store; it is the first thing that is written."""

    @abc.abstractmethod
    def commit(self, batch: Batch, manifest: Manifest) -> None:
        """Write a batch and, once it is there, keep the manifest; a batch that was written before may come again.

        Where others write to the new store meanwhile, an item that is there is left as it is.
        """

    @abc.abstractmethod
    def replace(self, ids: np.ndarray, vectors: np.ndarray, manifest: Manifest) -> None:
        """Write other vectors for some items of the finished store, then keep the manifest.

        Raises:
            ValueError: an id that the store does not have.
        """

    def finish(self) -> None:
        """Make a whole store of what was written; may be called again."""
        return

    @abc.abstractmethod
    def discard(self) -> None:
        """Remove everything that was written, and the manifest."""


def check_finite_vectors(batch: Batch, address: str) -> None:
    """Raise a ValueError that names the first item with NaN or infinity."""
    bad = ~np.isfinite(batch.vectors).all(1)
    if bad.any():
        first = batch.ids[int(bad.argmax())].item()
        raise ValueError(
            f"{address} must hold finite vectors, item {first!r} has NaN or infinity; mend or remove it, and run again"
        )
