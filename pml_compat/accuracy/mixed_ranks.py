"""Ranks in a gallery of which more and more rows are replaced by new ones, from two matrix products.

What is nearer than a positive among the old rows and among the new ones is counted apart, for each stretch of the
gallery between two steps: the counts of any step are sums of these.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from .compiled import CompiledCounting, QueryBlock, Thresholds, can_compile, choose_thresholds, find_places
from .gallery import Gallery, galleries_to_mix
from .matches import Matches
from .places import PositiveRanks
from .ranking import Counting, sorted_ranks
from .windows import decide


def can_mix(query: torch.Tensor, old: torch.Tensor, positives: Matches) -> bool:
    """Tell whether :func:`mixed_ranks` can rank these queries."""
    plain = Counting(query, Gallery(old))
    return plain.works and can_compile(query, plain.gallery, positives, thresholds=2)


def mixed_ranks(
    query: torch.Tensor,
    old: torch.Tensor,
    new: torch.Tensor,
    positives: Matches,
    excluded: Sequence[Matches],
    replaced: Sequence[int],
    cuts: Sequence[int] = (),
) -> Iterator[tuple[int, torch.Tensor, PositiveRanks]]:
    """Yield a step's number, numbers of queries, and the ranks of their positives; each query once a step.

    Args:
        query: ``(Q, D)``.
        old: ``(N, D)``, rows in the order of their replacement.
        new: ``(N, D)``, the same items.
        positives: the right rows of each query.
        excluded: rows that are not in the ranking at all.
        replaced: how many rows are new at each step, ascending.
        cuts: the places at which the caller cuts rankings off.
    """
    galleries = galleries_to_mix(old, new)
    plain = Counting(query, galleries[0])
    counting = CompiledCounting(query, galleries[0], plain.size, plain.tolerance, thresholds=2)
    stretches = list(itertools.pairwise([0, *replaced, len(old)]))

    def work(block: QueryBlock) -> list[tuple[PositiveRanks, torch.Tensor]]:
        own, items, size = block.own_scores(galleries[0])
        own = np.concatenate([own, block.own_scores(galleries[1])[0]], axis=1)
        order = own.argsort(axis=1)
        thresholds = Thresholds(block, np.take_along_axis(own, order, axis=1), 2 * size, counting.near_rows(len(block)))

        def count(gallery: Gallery, start: int, stop: int) -> np.ndarray:
            thresholds.count(gallery, start, stop, counting.buffer(2 * block.width))
            return thresholds.wrong()

        wrong_old = [count(galleries[0], start, stop) for start, stop in stretches]
        wrong, near = np.sum(wrong_old, axis=0, dtype=np.int32), thresholds.near
        n_old = near.size.copy()
        found = []
        for step, until in enumerate(replaced):
            wrong += count(galleries[1], *stretches[step]) - wrong_old[step]
            chosen = choose_thresholds(thresholds, order, items, size, until, wrong)
            ranks, unsure = find_places(chosen[0], size, block.tolerance, chosen[1], cuts)
            decide(block, galleries, until, (items, size), near, n_old, chosen[1][:, 4], ranks, unsure)
            found.append((ranks, unsure))
        return found

    left: list[list[torch.Tensor]] = [[] for _ in replaced]
    for part, found in counting.over_blocks(work, positives.neighbours(len(query)), positives, excluded):
        for step, (ranks, unsure) in enumerate(found):
            if not bool(unsure.all()):
                yield step, part[~unsure], ranks.of(~unsure)
            left[step].append(part[unsure])
    for step, until in enumerate(replaced):
        numbers = torch.cat(left[step])
        if len(numbers):
            gallery = Gallery(torch.cat([new[:until], old[until:]]))
            for part, ranks in sorted_ranks(query, gallery, numbers, positives, excluded):
                yield step, part, ranks
