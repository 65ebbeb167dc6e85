"""Cosine similarities of all pairs of a query and a gallery item, block by block, told apart by label and identity.

Both sides are taken in label order, so that a label's pairs are one rectangle: no ``(Q, N)`` mask of equal labels is
ever made, and no order of the rows can change a number. Products are taken in float32 to sort out the many pairs and
in float64 to score the few that count.

Scores that count are rounded to a grid of ``2**-36`` (1.5e-11), far above float64's rounding and far below float32's:
pairs that are equal but for the order of a summation tie, and all that follows is exact.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from .._checks import check_rows
from .._rows import as_wide
from ..accuracy.items import codes, item_codes
from ..accuracy.threads import in_threads, thread_count

GRID = 2**36  # score steps to 1.0
_BLOCK = 2048, 1024  # queries, gallery items: what a product is taken of at once, 8 MiB of float32
_OWN_LABEL_ROWS = 256  # queries at once where only genuine pairs are looked at: more would span too many labels
_PREPARED = 2**22  # numbers of the gallery brought to unit length at once, 16 MiB of float32
_GATHERED = 2**20  # numbers gathered at once to score single pairs, 8 MiB of float64


class PairScores:
    """Every pair of a query and a gallery item, but for those that are the same item.

    Args:
        query: ``(Q, D_query)`` embeddings, a tensor or an array.
        query_labels: ``(Q,)`` numbers, bools or strings.
        reference: ``(N, D_reference)``; by default the queries, each left out of its own pairs.
        reference_labels: ``(N,)``, of the same kind.
        ref_includes_query: row i of both is the same item.
        query_ids: ``(Q,)`` item ids of any type, instead.
        reference_ids: ``(N,)``, with ``query_ids``.
        device: where to compute; by default where ``reference`` is.
        fit_width: compare widths that differ by :func:`pml_compat.fit_width`.
    Raises:
        ValueError: what ``CrossModelAccuracyCalculator.get_accuracy`` raises of these.
    """

    def __init__(
        self,
        query: Any,
        query_labels: Any,
        reference: Any = None,
        reference_labels: Any = None,
        *,
        ref_includes_query: bool = False,
        query_ids: Any = None,
        reference_ids: Any = None,
        device: str | torch.device | None = None,
        fit_width: bool = False,
    ) -> None:
        if reference is None:
            if reference_labels is not None or reference_ids is not None:
                raise ValueError("reference must be given with reference_labels or reference_ids, got None")
            reference, reference_labels, reference_ids = query, query_labels, query_ids
            ref_includes_query = query_ids is None
        query, reference = check_rows(query, "query"), check_rows(reference, "reference")
        device = reference.device if device is None else torch.device(device)
        self.device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        sizes = len(query), len(reference)
        labels = codes(query_labels, reference_labels, ("query_labels", "reference_labels"), sizes)
        items = item_codes(labels, ref_includes_query, query_ids, reference_ids, sizes)
        query_labels, reference_labels = labels[0].numpy(), labels[1].numpy()

        query_order = np.argsort(query_labels, kind="stable")
        reference_order = np.argsort(reference_labels, kind="stable")
        self.query_labels, reference_labels = query_labels[query_order], reference_labels[reference_order]
        # The gallery items of query i's label are those from first[i] up to last[i].
        self.first = np.searchsorted(reference_labels, self.query_labels, side="left")
        self.last = np.searchsorted(reference_labels, self.query_labels, side="right")
        query, reference = query.detach().to(self.device), reference.detach().to(self.device)
        self._query = _UnitRows(as_wide(query, reference, fit_width), query_order)
        self._reference = _UnitRows(reference, reference_order)
        self._ids = None if items is None else (items[0].numpy()[query_order], items[1].numpy()[reference_order])

        same_label = int((self.last - self.first).sum())
        excluded, excluded_same_label = self._count_excluded(reference_labels)
        self.genuine = same_label - excluded_same_label
        self.impostors = len(query) * len(reference) - same_label - (excluded - excluded_same_label)
        #: How far a float32 score may be from the float64 one: of unit rows, by the worst case of any summation order.
        self.float32_error = (reference.shape[1] + 8) * 2.0**-24 + 1 / GRID

    def blocks(self, dtype: torch.dtype, *, own_label: bool = False) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Yield ``(rows, columns, scores)``: queries and gallery items in label order, and their products.

        The scores lie in one buffer, which the next block overwrites; those of a pair that is the same item are
        ``-inf``. With ``own_label`` the blocks cover every genuine pair, and few others.
        """
        size = _OWN_LABEL_ROWS if own_label else _BLOCK[0]
        buffer = torch.empty(size * _BLOCK[1], dtype=dtype, device=self.device)
        for prepared, reference in self._prepared(dtype):
            for rows in _slices(0, len(self._query), size):
                yield from self._products(rows, prepared, reference, buffer, own_label)

    def _prepared(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield stretches of the gallery, and their rows of unit length."""
        for prepared in _slices(0, len(self._reference), max(_BLOCK[1], _PREPARED // self._reference.width)):
            yield prepared, self._reference[prepared, dtype]

    def _products(
        self, rows: slice, prepared: slice, reference: torch.Tensor, buffer: torch.Tensor, own_label: bool = False
    ) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Yield the blocks of some queries and a stretch of the gallery."""
        start, stop = prepared.start, prepared.stop
        if own_label:
            start, stop = max(start, int(self.first[rows][0])), min(stop, int(self.last[rows][-1]))
            if start >= stop:
                return
        query = self._query[rows, reference.dtype]
        for columns in _slices(start, stop, _BLOCK[1]):
            scores = buffer[: len(query) * (columns.stop - columns.start)].view(len(query), -1)
            part = reference[columns.start - prepared.start : columns.stop - prepared.start]
            torch.mm(query, part.t(), out=scores)
            self._exclude(scores, rows, columns)
            yield rows, columns, scores

    def label_runs(self, rows: slice, columns: slice) -> Iterator[tuple[slice, slice]]:
        """Yield the rectangles of a block that hold its genuine pairs, one a label; positions within the block."""
        labels = self.query_labels[rows]
        starts = np.flatnonzero(np.append(True, labels[1:] != labels[:-1]))
        ends = np.append(starts[1:], len(labels))
        first = np.maximum(self.first[rows][starts], columns.start) - columns.start
        last = np.minimum(self.last[rows][starts], columns.stop) - columns.start
        for run in np.flatnonzero(first < last):
            yield slice(int(starts[run]), int(ends[run])), slice(int(first[run]), int(last[run]))

    def impostor_blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Yield :meth:`blocks` with genuine pairs at ``-inf`` too."""
        for block in self.blocks(dtype):
            yield self._without_genuine(*block)

    def _without_genuine(self, rows: slice, columns: slice, scores: torch.Tensor) -> tuple[slice, slice, torch.Tensor]:
        for run in self.label_runs(rows, columns):
            scores[run] = -torch.inf
        return rows, columns, scores

    def over_impostor_blocks(self, work: Callable[[slice, slice, torch.Tensor], None]) -> None:
        """Call ``work`` with all of :meth:`impostor_blocks` in float32; on a CPU from as many threads as torch has."""
        own = threading.local()

        def products(part: tuple[slice, slice, torch.Tensor]) -> None:
            rows, prepared, reference = part
            if not hasattr(own, "buffer"):
                own.buffer = torch.empty(_BLOCK[0] * _BLOCK[1], device=self.device)
            for block in self._products(rows, prepared, reference, own.buffer):
                work(*self._without_genuine(*block))

        parts = (
            (rows, prepared, reference)
            for prepared, reference in self._prepared(torch.float32)
            for rows in _slices(0, len(self._query), _BLOCK[0])
        )
        for _ in in_threads(products, parts, thread_count() if self.device.type == "cpu" else 1):
            pass

    def genuine_blocks(self) -> Iterator[torch.Tensor]:
        """Yield float64 scores that hold every genuine pair once, and ``-inf`` otherwise."""
        for rows, columns, scores in self.blocks(torch.float64, own_label=True):
            runs = list(self.label_runs(rows, columns))
            if 2 * sum(scores[run].numel() for run in runs) > scores.numel():
                yield from (scores[run] for run in runs)
                continue
            position = torch.arange(columns.start, columns.stop, device=self.device)
            first, last = (torch.from_numpy(end[rows, None]).to(self.device) for end in (self.first, self.last))
            yield scores.masked_fill_((position < first) | (position >= last), -torch.inf)

    def keys_of(self, pairs: np.ndarray) -> np.ndarray:
        """Return :func:`to_keys` of single pairs, numbered as by :meth:`pair_numbers`."""
        size = max(1, _GATHERED // self._reference.width)
        keys = np.empty(len(pairs))
        for part in _slices(0, len(pairs), size):
            rows, columns = np.divmod(pairs[part], len(self._reference))
            products = self._query[rows, torch.float64] * self._reference[columns, torch.float64]
            keys[part] = to_keys(products.sum(1)).cpu().numpy()
        return keys

    def draw_impostors(self, number: int) -> np.ndarray:
        """Return :func:`to_keys` of the impostors among so many pairs drawn at random, the same ones in each call."""
        generator = np.random.default_rng(0)
        rows, columns = (generator.integers(len(side), size=number) for side in (self._query, self._reference))
        impostor = (columns < self.first[rows]) | (columns >= self.last[rows])
        if self._ids is not None:
            impostor &= self._ids[0][rows] != self._ids[1][columns]
        return self.keys_of((rows * len(self._reference) + columns)[impostor])

    def pair_numbers(self, rows: slice, columns: slice, positions: np.ndarray) -> np.ndarray:
        """Return ``row * N + column`` of the flat positions within a block."""
        row, column = np.divmod(positions, columns.stop - columns.start)
        return (row + rows.start) * len(self._reference) + column + columns.start

    def _exclude(self, scores: torch.Tensor, rows: slice, columns: slice) -> None:
        if self._ids is not None:
            row, column = _matches(self._ids[0][rows], self._ids[1][columns])
            scores[torch.from_numpy(row).to(self.device), torch.from_numpy(column).to(self.device)] = -torch.inf

    def _count_excluded(self, reference_labels: np.ndarray) -> tuple[int, int]:
        """Count the pairs that are the same item, and those of them that have the same label."""
        if self._ids is None:
            return 0, 0
        query, reference = self._ids
        labels = np.unique(np.concatenate([self.query_labels, reference_labels]), return_inverse=True)[1]
        with_label = np.concatenate([query, reference]) * len(labels) + labels
        return _count_matches(query, reference), _count_matches(with_label[: len(query)], with_label[len(query) :])


class _UnitRows:
    """Rows of an embedding matrix in another order, brought to unit length as they are asked for; zero stays zero."""

    def __init__(self, embeddings: torch.Tensor, order: np.ndarray) -> None:
        self.width = embeddings.shape[1]
        self._embeddings = embeddings
        self._order = torch.from_numpy(order).to(embeddings.device)
        parts = embeddings.split(max(1, _GATHERED // self.width))
        self._norms = torch.cat([part.double().norm(dim=1, keepdim=True) for part in parts])
        self._norms[self._norms == 0] = 1.0

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, key: tuple[slice | np.ndarray, torch.dtype]) -> torch.Tensor:
        rows, dtype = key
        order = self._order[rows if isinstance(rows, slice) else torch.from_numpy(rows).to(self._order.device)]
        return self._embeddings[order].double().div_(self._norms[order]).to(dtype)


def to_keys(scores: torch.Tensor) -> torch.Tensor:
    """Round float64 scores to the grid, in place: whole numbers of steps, as float64."""
    return scores.mul_(GRID).round_()


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _matches(query: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions ``(row, column)`` of all equal pairs."""
    order = np.argsort(reference)
    ordered = reference[order]
    first = np.searchsorted(ordered, query, side="left")
    counts = np.searchsorted(ordered, query, side="right") - first
    rows = np.repeat(np.arange(len(query)), counts)
    places = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts - first, counts)
    return rows, order[places]


def _count_matches(query: np.ndarray, reference: np.ndarray) -> int:
    ordered = np.sort(reference)
    return int((np.searchsorted(ordered, query, side="right") - np.searchsorted(ordered, query, side="left")).sum())
