"""Ranks by counting in compiled loops: the engine of the metrics on a CPU, where numba is installed (extra ``fast``).

A tile of scores is counted right after its product, while it is in the cache. The positives of a query are thresholds
among its wrong items (:mod:`pml_compat.accuracy.counting_kernel`), so that nothing of the size of the gallery is kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from .gallery import Gallery
from .matches import Matches, joined_runs
from .places import CHANGE, FIRST_PLACES, PositiveRanks

_WORTH_IT = 2**22  # scores; numba takes longer to load than torch to count fewer
_ROWS = 256  # queries of a tile
_FEWEST_ROWS = 64  # a product of fewer would spend its time reading the gallery
_COLUMNS = 8192  # gallery rows of a tile: 8 MiB of scores
_ALIGNED = 16  # columns of a tile are a multiple, a cache line: a product of other widths is far slower
_BYTES = 24 * 2**20  # of the queries' tables and counts
_BYTES_A_POSITIVE = 64
_BUCKETS = 2**11, 2**15  # the fewest and the most of a query
_BUCKETS_A_POSITIVE = 4
_MOST_POSITIVES = 2**15 - 2**8  # that a table of uint16 can lead to

Runs = tuple[np.ndarray, np.ndarray, np.ndarray]  # a list of gallery rows, where each query's begin, and how many


@cache
def kernels() -> tuple[Any, Any] | None:
    """Return the compiled loops; None without numba, or with no place to keep what it compiles."""
    try:
        from . import counting_kernel, places_kernel
    except (ImportError, RuntimeError):
        return None
    return counting_kernel, places_kernel


def can_compile(query: torch.Tensor, gallery: Gallery, positives: Matches, thresholds: int = 1) -> bool:
    """Tell whether queries are worth it and fit, with as many thresholds of each positive."""
    large = len(query) * len(gallery) >= _WORTH_IT
    here = gallery.group is None and gallery.device.type == "cpu"
    most = int(positives.most()) or len(gallery)
    return large and here and thresholds * most < _MOST_POSITIVES and kernels() is not None


def _loops() -> tuple[Any, Any]:
    found = kernels()
    assert found is not None  # or can_compile said no
    return found


class Threads:
    """As many threads as torch uses, for loops that do not hold Python's lock."""

    def __init__(self) -> None:
        self.count = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(max(1, self.count - 1))

    def spread(self, work: Callable[[slice], None], rows: int) -> None:
        """Call ``work`` with a part of the rows in each thread."""
        ends = [rows * number // self.count for number in range(self.count + 1)]
        parts = [slice(start, stop) for start, stop in itertools.pairwise(ends) if start < stop]
        others = [self._pool.submit(work, part) for part in parts[1:]]
        work(parts[0])
        for one in others:
            one.result()


class QueryBlock:
    """Some queries: what is right for each, what is not in its ranking, and how far rounding reaches.

    Args:
        query: ``(q, D)`` float32.
        size: ``(q,)`` float32, the largest absolute value of a score.
        tolerance: ``(q,)`` float32.
        positives: what is right.
        excluded: what is not in the ranking.
    """

    def __init__(
        self, query: torch.Tensor, size: torch.Tensor, tolerance: torch.Tensor, positives: Runs, excluded: Runs
    ) -> None:
        self.query, self.largest, self.tolerance = query, size.numpy(), tolerance.numpy()
        self.positives, self.excluded = positives, excluded
        self.width = max(1, int(positives[2].max()))

    def __len__(self) -> int:
        return len(self.query)

    def runs(self, rows: slice) -> tuple[np.ndarray, ...]:
        """Return positives and excluded items of some of the queries."""
        return tuple(
            part if place % 3 == 0 else part[rows] for place, part in enumerate(self.positives + self.excluded)
        )

    def own_scores(self, gallery: Gallery, threads: Threads) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ``(q, P)`` scores of the positives in the ranking, their rows, and ``(q,)`` how many there are."""
        own = np.empty((len(self), self.width), dtype=np.float32)
        items, size = np.empty(own.shape, dtype=np.int32), np.empty(len(self), dtype=np.int32)
        rows32 = gallery.rows32.numpy()
        half_norms = np.empty(0, dtype=np.float32) if gallery.half_norms is None else gallery.half_norms.numpy()
        query, loops = self.query.numpy(), _loops()[1]

        def work(rows: slice) -> None:
            loops.own_scores(query[rows], rows32, half_norms, *self.runs(rows), own[rows], items[rows], size[rows])

        threads.spread(work, len(self))
        return own, items, size


def tiles(
    query: torch.Tensor, gallery: Gallery, start: int, stop: int, buffer: torch.Tensor
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield tiles of gallery rows from ``start`` to ``stop``: the first row's number, and ``(q, n)`` scores."""
    parts = math.ceil((stop - start) / _COLUMNS)
    size = math.ceil((stop - start) / max(parts, 1) / _ALIGNED) * _ALIGNED
    for first in range(start, stop, max(size, 1)):
        last = min(first + size, stop)
        scores = buffer[: len(query) * (last - first)].view(len(query), -1)
        yield first, gallery.scores(query, scores, slice(first, last)).numpy()


class Thresholds:
    """Scores of positives, ascending, and the wrong items that are counted between them.

    Args:
        block: the queries.
        own: ``(q, P)`` float32, ascending in the first ``size`` of each row.
        size: ``(q,)`` int32.
        threads: what counts.
    """

    def __init__(self, block: QueryBlock, own: np.ndarray, size: np.ndarray, threads: Threads) -> None:
        self.block, self.own, self.size, self.threads = block, own, size, threads
        self.loops = _loops()[0]
        n_query, width = own.shape
        buckets = min(max(_BUCKETS[0], 1 << (_BUCKETS_A_POSITIVE * width - 1).bit_length()), _BUCKETS[1])
        lanes = self.loops.LANES
        self.low, self.scale = np.empty((2, n_query), dtype=np.float32)
        self.table = np.empty((n_query, buckets + 2 * lanes), dtype=np.uint16)
        self.counts = np.zeros((n_query, 2 * (width + 2 * lanes)), dtype=np.int32)
        self.shifts = np.zeros((n_query, 3, width + 1), dtype=np.int32)

        def work(rows: slice) -> None:
            self.loops.make_tables(*self._own(rows), self.low[rows], self.scale[rows], self.table[rows])

        threads.spread(work, n_query)

    def _own(self, rows: slice) -> tuple[np.ndarray, ...]:
        block = self.block
        return self.own[rows], self.size[rows], block.tolerance[rows], block.largest[rows]

    def count(self, gallery: Gallery, start: int, stop: int, buffer: torch.Tensor) -> None:
        """Count the gallery's rows from ``start`` to ``stop``."""
        for column, scores in tiles(self.block.query, gallery, start, stop, buffer):
            self.threads.spread(partial(self._count, scores, column), len(self.own))

    def _count(self, scores: np.ndarray, column: int, rows: slice) -> None:
        self.loops.count_scores(
            scores[rows],
            column,
            *self.block.runs(rows),
            *self._own(rows),
            self.low[rows],
            self.scale[rows],
            self.table[rows],
            self.counts[rows],
            self.shifts[rows],
        )

    def wrong(self) -> np.ndarray:
        """Return ``(q, 4, P)`` wrong items before each threshold, and begin to count anew."""
        out = np.empty((len(self.own), 4, self.own.shape[1]), dtype=np.int32)
        self.threads.spread(
            lambda rows: self.loops.sum_counts(self.size[rows], self.counts[rows], self.shifts[rows], out[rows]),
            len(self.own),
        )
        return out


def find_places(
    own: np.ndarray, size: np.ndarray, tolerance: np.ndarray, wrong: np.ndarray, cuts: Sequence[int], threads: Threads
) -> tuple[PositiveRanks, torch.Tensor]:
    """Return the ranks of positives, and for which queries the rounding of scores could show in a metric."""
    closer, within, positives_within = np.empty((3, *own.shape), dtype=np.int32)
    unsure, loops = np.empty(len(own), dtype=bool), _loops()[1]
    places = np.array(cuts, dtype=np.int64)

    def work(rows: slice) -> None:
        given = own[rows], size[rows], tolerance[rows], wrong[rows], places, FIRST_PLACES, CHANGE
        loops.find_places(*given, closer[rows], within[rows], positives_within[rows], unsure[rows])

    threads.spread(work, len(own))
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
    """Return ``(q, P)`` thresholds of a gallery whose first rows are new, and ``(q, 4, P)`` the wrong items before."""
    own = np.full(items.shape, np.inf, dtype=np.float32)
    chosen, loops = np.zeros((len(items), 4, items.shape[1]), dtype=np.int32), _loops()[1]

    def work(rows: slice) -> None:
        given = thresholds.own[rows], order[rows], items[rows], size[rows], replaced, wrong[rows]
        loops.choose_thresholds(*given, own[rows], chosen[rows])

    thresholds.threads.spread(work, len(items))
    return own, chosen


def blocks(
    query: torch.Tensor,
    size: torch.Tensor,
    tolerance: torch.Tensor,
    numbers: torch.Tensor,
    n_reference: int,
    positives: Matches,
    excluded: Sequence[Matches],
    thresholds: int = 1,
) -> Iterator[tuple[torch.Tensor, QueryBlock]]:
    """Yield some of the queries' numbers after the other, and what is counted for them.

    So many that their tables fit, with as many thresholds of each positive.
    """
    most = thresholds * (int(positives.most()) or n_reference)
    bytes_a_query = _BYTES_A_POSITIVE * most + 2 * min(_BUCKETS_A_POSITIVE * most, _BUCKETS[1])
    for part in numbers.split(min(_ROWS, max(_FEWEST_ROWS, _BYTES // bytes_a_query))):
        right, out = _arrays(positives.runs(part)), _arrays(joined_runs(excluded, part, n_reference))
        yield part, QueryBlock(query[part], size[part, 0], tolerance[part, 0], right, out)


def _arrays(runs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Runs:
    items, first, length = (one.contiguous().numpy() for one in runs)
    return items, first, length


class CompiledCounting:
    """Ranks by counting float32 scores; what ``ranking`` asks of its counting."""

    def __init__(self, query: torch.Tensor, gallery: Gallery, size: torch.Tensor, tolerance: torch.Tensor) -> None:
        self.query, self.gallery = query.contiguous(), gallery
        self.size, self.tolerance = size, tolerance
        self.threads = Threads()
        self.buffer = query.new_empty(_ROWS * min(_COLUMNS, len(gallery)))

    def chunks(self, positives: Matches) -> list[torch.Tensor]:
        """Return all queries' numbers, in the parts that are counted at once."""
        return list(positives.neighbours(len(self.query)).split(_ROWS))

    def ranks(
        self, numbers: torch.Tensor, positives: Matches, excluded: Sequence[Matches], cuts: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, PositiveRanks, torch.Tensor]]:
        """Yield some of the queries, their ranks, and for which the rounding of scores could show in a metric."""
        size = len(self.gallery)
        for part, block in blocks(self.query, self.size, self.tolerance, numbers, size, positives, excluded):
            own, _, found = block.own_scores(self.gallery, self.threads)
            own.sort(axis=1)
            thresholds = Thresholds(block, own, found, self.threads)
            thresholds.count(self.gallery, 0, size, self.buffer)
            yield part, *find_places(own, found, block.tolerance, thresholds.wrong(), cuts, self.threads)

    def nearest(
        self, numbers: torch.Tensor, positives: Matches, excluded: Sequence[Matches]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield some of the queries, the scores of their nearest positive and wrong item, and how many are right."""
        size = len(self.gallery)
        for part, block in blocks(self.query, self.size, self.tolerance, numbers, size, positives, excluded):
            own, _, found = block.own_scores(self.gallery, self.threads)
            wrong = np.full(len(block), np.inf, dtype=np.float32)

            def work(scores: np.ndarray, column: int, rows: slice, block: Any = block, wrong: Any = wrong) -> None:
                _loops()[0].remove_right(scores[rows], column, *block.runs(rows))
                np.minimum(wrong[rows], scores[rows].min(axis=1), out=wrong[rows])

            for column, scores in tiles(block.query, self.gallery, 0, size, self.buffer):
                self.threads.spread(partial(work, scores, column), len(block))
            right, relevant = torch.from_numpy(own.min(axis=1)), torch.from_numpy(found).long()
            yield part, right, torch.from_numpy(wrong), relevant
