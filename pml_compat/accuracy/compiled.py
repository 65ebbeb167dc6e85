"""Ranks by counting in compiled loops: the engine of the metrics on a CPU, where numba is installed (extra ``fast``).

A tile of scores is counted right after its product, by the thread that multiplied, while it is in the cache: each
thread has queries of its own. The positives of a query are thresholds among its wrong items
(:mod:`pml_compat.accuracy.counting_kernel`), so that nothing of the size of the gallery is kept.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from .gallery import Gallery
from .matches import Matches, joined_runs
from .places import CHANGE, FIRST_PLACES, PositiveRanks
from .threads import in_threads, thread_count
from .windows import NearItems, decide

_WORTH_IT = 2**22  # scores; numba takes longer to load than torch to count fewer
_ALIGNED = 16  # columns of a tile are a multiple, a cache line: a product of other widths is far slower
_TILE_ROWS = 256  # queries of a product
_TILE = 2**20  # scores of a product: 4 MiB a thread
_MOST_COLUMNS = 2**16 - _ALIGNED  # of a tile, gallery rows: a place in it is a uint16
_MANY_POSITIVES = 2**12  # reading a query's tables for each tile takes long then: tiles are twice as large
_ROWS = 512  # queries of a block
_FEWEST_ROWS = 32  # a product of fewer would spend its time reading the gallery
_BLOCKS = 4  # of a thread, at the least: none waits long for another
_BYTES = 16 * 2**20  # of the queries' tables and counts
_BYTES_A_POSITIVE = 64
_NEAR_BYTES = 8 * 2**20  # a thread's, for the rows of items near a positive
_BUCKETS = 2**11, 2**16 - 2**8  # the fewest and the most of a query
_BUCKETS_A_POSITIVE = 4
_MOST_POSITIVES = 2**15 - 2**8  # that a table of uint16 can lead to

Runs = tuple[np.ndarray, np.ndarray, np.ndarray]  # a list of gallery rows, where each query's begin, and how many


@cache
def kernels() -> tuple[Any, Any, Any] | None:
    """Return the compiled loops; None without numba, or with no place to keep what it compiles."""
    try:
        from . import counting_kernel, nearest_kernel, places_kernel
    except (ImportError, RuntimeError):
        return None
    return counting_kernel, places_kernel, nearest_kernel


def can_compile(query: torch.Tensor, gallery: Gallery, positives: Matches, thresholds: int = 1) -> bool:
    """Tell whether queries are worth it and fit, with as many thresholds of each positive."""
    large = len(query) * len(gallery) >= _WORTH_IT
    here = gallery.group is None and gallery.device.type == "cpu"
    most = int(positives.most()) or len(gallery)
    return large and here and thresholds * most < _MOST_POSITIVES and kernels() is not None


def _loops() -> tuple[Any, Any, Any]:
    found = kernels()
    assert found is not None  # or can_compile said no
    return found


class QueryBlock:
    """Some queries: what is right for each, what is not in its ranking, and how far rounding reaches.

    Args:
        query: ``(q, D)``.
        size: ``(q,)`` float32, the largest absolute value of a score.
        tolerance: ``(q,)`` float32.
        positives: what is right.
        excluded: what is not in the ranking.
    """

    def __init__(
        self, query: torch.Tensor, size: torch.Tensor, tolerance: torch.Tensor, positives: Runs, excluded: Runs
    ) -> None:
        self.query, self.exact = query.float(), query
        self.largest, self.tolerance = size.numpy(), tolerance.numpy()
        self.positives, self.excluded = positives, excluded
        self.width = max(1, int(positives[2].max()))

    def __len__(self) -> int:
        return len(self.query)

    def own_scores(self, gallery: Gallery) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ``(q, P)`` scores of the positives in the ranking, their rows, and ``(q,)`` how many there are."""
        own = np.empty((len(self), self.width), dtype=np.float32)
        items, size = np.empty(own.shape, dtype=np.int32), np.empty(len(self), dtype=np.int32)
        half_norms = np.empty(0, dtype=np.float32) if gallery.half_norms is None else gallery.half_norms.numpy()
        rows = self.query.numpy(), gallery.rows32.numpy(), half_norms
        _loops()[1].own_scores(*rows, *self.positives, *self.excluded, own, items, size)
        return own, items, size

    def rows(self, part: slice) -> tuple[np.ndarray, ...]:
        """Return positives and excluded items of some of the queries."""
        return tuple(
            array if place % 3 == 0 else array[part] for place, array in enumerate(self.positives + self.excluded)
        )


def tiles(
    query: torch.Tensor, gallery: Gallery, start: int, stop: int, buffer: torch.Tensor
) -> Iterator[tuple[slice, int, np.ndarray]]:
    """Yield tiles of gallery rows from ``start`` to ``stop``: which queries, the first row's number, and the scores."""
    most = min(_MOST_COLUMNS, len(buffer) // min(len(query), _TILE_ROWS) // _ALIGNED * _ALIGNED)
    parts = math.ceil((stop - start) / most)
    size = max(1, math.ceil((stop - start) / max(parts, 1) / _ALIGNED) * _ALIGNED)
    for top, first in itertools.product(range(0, len(query), _TILE_ROWS), range(start, stop, size)):
        rows, last = slice(top, min(top + _TILE_ROWS, len(query))), min(first + size, stop)
        scores = buffer[: (rows.stop - top) * (last - first)].view(-1, last - first)
        yield rows, first, gallery.scores(query[rows], scores, slice(first, last)).numpy()


class Thresholds:
    """Scores of positives, ascending, and the wrong items that are counted between them.

    Args:
        block: the queries.
        own: ``(q, P)`` float32, ascending in the first ``size`` of each row.
        size: ``(q,)`` int32.
        near_rows: a place for the gallery rows of wrong items near a positive; is filled.
    """

    def __init__(self, block: QueryBlock, own: np.ndarray, size: np.ndarray, near_rows: np.ndarray) -> None:
        self.block, self.own, self.size = block, own, size
        self.loops = _loops()[0]
        n_query, width = own.shape
        buckets = min(max(_BUCKETS[0], 1 << (_BUCKETS_A_POSITIVE * width - 1).bit_length()), _BUCKETS[1])
        lanes = self.loops.LANES
        low, scale = np.empty((2, n_query), dtype=np.float32)
        table = np.empty((n_query, buckets + 2 * lanes), dtype=np.uint16)
        self.counts = np.zeros((n_query, 2 * (width + 2 * lanes)), dtype=np.int32)
        self.shifts = np.zeros((n_query, 4, width + 1), dtype=np.int32)
        self.near = NearItems(near_rows.reshape(n_query, -1), np.zeros(n_query, dtype=np.int32))
        self.tables = own, size, block.tolerance, block.largest, low, scale, table
        self.loops.make_tables(*self.tables)

    def count(self, gallery: Gallery, start: int, stop: int, buffer: torch.Tensor) -> None:
        """Count the gallery's rows from ``start`` to ``stop``."""
        for rows, column, scores in tiles(self.block.query, gallery, start, stop, buffer):
            filled = self.counts, self.shifts, self.near.rows, self.near.size
            tables = (array[rows] for array in (*self.tables, *filled))
            self.loops.count_scores(scores, column, *self.block.rows(rows), *tables)

    def wrong(self) -> np.ndarray:
        """Return ``(q, 5, P)`` wrong items before each threshold, and begin to count anew."""
        out = np.empty((len(self.own), 5, self.own.shape[1]), dtype=np.int32)
        self.loops.sum_counts(self.size, self.counts, self.shifts, out)
        return out


def find_places(
    own: np.ndarray, size: np.ndarray, tolerance: np.ndarray, wrong: np.ndarray, cuts: Sequence[int]
) -> tuple[PositiveRanks, torch.Tensor]:
    """Return the ranks of positives, and for which queries the rounding of scores could show in a metric."""
    closer, within, positives_within = np.empty((3, *own.shape), dtype=np.int32)
    unsure, places = np.empty(len(own), dtype=bool), np.array(cuts, dtype=np.int64)
    given = own, size, tolerance, wrong, places, FIRST_PLACES, CHANGE
    _loops()[1].find_places(*given, closer, within, positives_within, unsure)
    relevant = torch.from_numpy(size).long()
    ranks = PositiveRanks(
        valid=torch.arange(own.shape[1]) < relevant[:, None],
        closer=torch.from_numpy(closer),
        within=torch.from_numpy(within),
        positives_within=torch.from_numpy(positives_within),
        relevant=relevant,
    )
    return ranks, torch.from_numpy(unsure)


def choose_thresholds(
    thresholds: Thresholds, order: np.ndarray, items: np.ndarray, size: np.ndarray, replaced: int, wrong: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(q, P)`` thresholds of a gallery whose first rows are new, and ``(q, 5, P)`` the wrong items before."""
    own = np.full(items.shape, np.inf, dtype=np.float32)
    chosen = np.zeros((len(items), 5, items.shape[1]), dtype=np.int32)
    _loops()[1].choose_thresholds(thresholds.own, order, items, size, replaced, wrong, own, chosen)
    return own, chosen


def _arrays(runs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Runs:
    items, first, length = (one.contiguous().numpy() for one in runs)
    return items, first, length


class CompiledCounting:
    """Ranks by counting float32 scores; what ``ranking`` asks of its counting.

    Args:
        query: ``(Q, D)``.
        gallery: what is searched.
        size: ``(Q, 1)``, the largest absolute value of a score.
        tolerance: ``(Q, 1)``, how far rounding reaches.
        thresholds: of each positive.
    """

    def __init__(
        self, query: torch.Tensor, gallery: Gallery, size: torch.Tensor, tolerance: torch.Tensor, thresholds: int = 1
    ) -> None:
        self.query, self.gallery = query.contiguous(), gallery
        self.size, self.tolerance, self.thresholds = size, tolerance, thresholds
        self.threads = thread_count()
        self._own = threading.local()

    def near_rows(self, n_query: int) -> np.ndarray:
        """Return this thread's place for the gallery rows of items near positives, as many of each query."""
        if not hasattr(self._own, "near"):
            self._own.near = np.empty(_NEAR_BYTES // 4, dtype=np.int32)
        return self._own.near[: n_query * min(len(self._own.near) // n_query, self.thresholds * len(self.gallery))]

    def buffer(self, positives: int) -> torch.Tensor:
        """Return this thread's place for a tile of scores of queries with so many positives."""
        size = min((1 + (positives > _MANY_POSITIVES)) * _TILE, _TILE_ROWS * (len(self.gallery) + _ALIGNED))
        if not hasattr(self._own, "buffer") or len(self._own.buffer) < size:
            self._own.buffer = torch.empty(size)  # kept: new memory costs more than the work in it
        return self._own.buffer[:size]

    def chunks(self, positives: Matches) -> list[torch.Tensor]:
        """Return all queries' numbers: some by which to judge, and the others."""
        numbers = positives.neighbours(len(self.query))
        return [part for part in numbers.tensor_split([self.threads * _ROWS]) if len(part)]

    def over_blocks(
        self,
        work: Callable[[QueryBlock], Any],
        numbers: torch.Tensor,
        positives: Matches,
        excluded: Sequence[Matches],
    ) -> Iterator[tuple[torch.Tensor, Any]]:
        """Yield some of the queries' numbers after the other, and what ``work`` gives for them, from all threads."""
        parts = numbers.split(self._block_rows(len(numbers), positives))
        made = (self._block(part, positives, excluded) for part in parts)
        yield from zip(parts, in_threads(work, made, self.threads), strict=True)

    def _block_rows(self, queries: int, positives: Matches) -> int:
        """Return how many queries a thread takes: as many as all have work for, and the tables fit."""
        most = self.thresholds * (int(positives.most()) or len(self.gallery))
        bytes_a_query = _BYTES_A_POSITIVE * most + 2 * min(_BUCKETS_A_POSITIVE * most, _BUCKETS[1])
        fit = max(_FEWEST_ROWS, _BYTES // self.threads // bytes_a_query)
        blocks = 1 if self.threads == 1 else _BLOCKS * self.threads
        return min(_ROWS, fit, max(_FEWEST_ROWS, math.ceil(queries / blocks)))

    def _block(self, part: torch.Tensor, positives: Matches, excluded: Sequence[Matches]) -> QueryBlock:
        right = _arrays(positives.runs(part)), _arrays(joined_runs(excluded, part, len(self.gallery)))
        return QueryBlock(self.query[part], self.size[part, 0], self.tolerance[part, 0], *right)

    def ranks(
        self, numbers: torch.Tensor, positives: Matches, excluded: Sequence[Matches], cuts: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, PositiveRanks, torch.Tensor]]:
        """Yield some of the queries, their ranks, and for which the rounding of scores could show in a metric."""

        def work(block: QueryBlock) -> tuple[PositiveRanks, torch.Tensor]:
            own, items, found = block.own_scores(self.gallery)
            own.sort(axis=1)
            thresholds = Thresholds(block, own, found, self.near_rows(len(block)))
            thresholds.count(self.gallery, 0, len(self.gallery), self.buffer(block.width))
            wrong, near = thresholds.wrong(), thresholds.near
            ranks, unsure = find_places(own, found, block.tolerance, wrong, cuts)
            both = self.gallery, self.gallery
            decide(block, both, 0, (items, found), near, near.size, wrong[:, 4], ranks, unsure)
            return ranks, unsure

        for part, found in self.over_blocks(work, numbers, positives, excluded):
            yield part, *found

    def nearest(
        self, numbers: torch.Tensor, positives: Matches, excluded: Sequence[Matches]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield some of the queries, the scores of their nearest positive and wrong item, and how many are right."""

        def work(block: QueryBlock) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            right, wrong = np.full((2, len(block)), np.inf, dtype=np.float32)
            found = np.zeros(len(block), dtype=np.int64)
            for rows, column, scores in tiles(block.query, self.gallery, 0, len(self.gallery), self.buffer(1)):
                _loops()[2].nearest_right(scores, column, *block.rows(rows), right[rows], found[rows])
                np.minimum(wrong[rows], scores.min(axis=1), out=wrong[rows])
            return torch.from_numpy(right), torch.from_numpy(wrong), torch.from_numpy(found)

        for part, found in self.over_blocks(work, numbers, positives, excluded):
            yield part, *found
