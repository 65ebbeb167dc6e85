"""The place of each query's nearest positive alone: what precision at 1, CMC and the reciprocal rank look at.

It costs a comparison of each score with the positive's, in place of the buckets of :mod:`pml_compat.accuracy.ranking`.
Where a wrong item is as near as the rounding of the scores, the full ranking decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .compiled import CompiledCounting, can_compile
from .gallery import Gallery
from .matches import Matches
from .places import PositiveRanks
from .ranking import exact_ranks, query_chunks


def first_ranks(
    query: torch.Tensor,
    reference: torch.Tensor | Gallery,
    positives: Matches,
    excluded: Sequence[Matches] = (),
    *,
    nearest_only: bool = False,
) -> Iterator[tuple[torch.Tensor, PositiveRanks]]:
    """Yield numbers of queries, each once and in any order, and the rank of their nearest positive.

    The arguments are those of :func:`pml_compat.accuracy.ranking.exact_ranks`, whose first column this is; of some
    queries all columns are there. With ``nearest_only`` the caller looks at no more than whether the nearest item is
    right: any place but the first may be given as the second.
    """
    gallery = reference if isinstance(reference, Gallery) else Gallery(reference)
    query32 = query.float()
    rounding = gallery.rounding(query32)
    if rounding is None:
        yield from exact_ranks(query, gallery, positives, excluded)
        return
    compiled = nearest_only and can_compile(query32, gallery, positives)
    find = _nearest if compiled else _firsts
    unsure = []
    for numbers, ranks, sure in find(query32, gallery, rounding, positives, excluded):
        if bool(sure.any()):
            yield numbers[sure], ranks.of(sure)
        unsure.append(numbers[~sure])
    left = torch.cat(unsure)
    if len(left):
        parts = _Of(positives, left), [_Of(one, left) for one in excluded]
        for numbers, ranks in exact_ranks(query[left], gallery, *parts):
            yield left[numbers], ranks


def _nearest(
    query: torch.Tensor, gallery: Gallery, rounding: torch.Tensor, positives: Matches, excluded: Sequence[Matches]
) -> Iterator[tuple[torch.Tensor, PositiveRanks, torch.Tensor]]:
    """Yield queries, whether the nearest item is right, and for which that is sure; in compiled loops."""
    counting = CompiledCounting(query, gallery, gallery.largest_scores(query), rounding)
    for numbers in counting.chunks(positives):
        for part, right, wrong, relevant in counting.nearest(numbers, positives, excluded):
            sure = (relevant == 0) | ((right - wrong).abs() > rounding[part, 0])
            yield part, _ranks((wrong < right).long(), relevant), sure


def _firsts(
    query: torch.Tensor, gallery: Gallery, rounding: torch.Tensor, positives: Matches, excluded: Sequence[Matches]
) -> Iterator[tuple[torch.Tensor, PositiveRanks, torch.Tensor]]:
    """Yield queries, the places of their nearest positives, and for which these are sure."""
    scores = query.new_empty(0, len(gallery))
    for rows in query_chunks(len(query), len(gallery)):
        numbers = torch.arange(rows.start, rows.stop, device=query.device)
        if len(scores) < len(numbers):  # made once: new memory costs more than the work in it
            scores = query.new_empty(len(numbers), len(gallery))
        chunk = gallery.scores(query[rows], out=scores[: len(numbers)])
        yield numbers, *_first(numbers, chunk, rounding[rows], positives, excluded)


def _first(
    numbers: torch.Tensor, scores: torch.Tensor, rounding: torch.Tensor, positives: Matches, excluded: Sequence[Matches]
) -> tuple[PositiveRanks, torch.Tensor]:
    """Return the ranks of the nearest positives, and for which queries they are sure."""
    for one in excluded:
        scores[one.pairs(numbers)] = torch.inf
    index, valid = positives.lists(numbers)
    own = scores.gather(1, index).masked_fill_(~valid, torch.inf)
    relevant = own.isfinite().sum(1)
    first = torch.nn.functional.pad(own, (0, 1), value=torch.inf).amin(1, keepdim=True)
    closer = _count(scores, first - rounding)
    near = _count(scores, first + rounding) - closer
    near_positives = _count(own, first + rounding) - _count(own, first - rounding)
    return _ranks(closer, relevant), (relevant == 0) | (near == near_positives)


def _ranks(closer: torch.Tensor, relevant: torch.Tensor) -> PositiveRanks:
    """Return the ranks of nearest positives that as many items are closer than."""
    return PositiveRanks(
        valid=relevant[:, None] > 0,
        closer=closer[:, None],
        within=closer[:, None] + 1,  # one positive of those as near stands there for sure
        positives_within=torch.ones_like(closer[:, None]),
        relevant=relevant,
    )


def _count(scores: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """Count the scores of each row that are at most its bound; NumPy adds bools faster than torch does on a CPU."""
    if scores.device.type == "cpu":
        return torch.from_numpy((scores.numpy() <= bound.numpy()).sum(1, dtype="int32")).long()
    return (scores <= bound).sum(1)


class _Of(Matches):
    """The matches of some queries, which are then numbered from 0."""

    def __init__(self, matches: Matches, numbers: torch.Tensor) -> None:
        self.matches, self.numbers = matches, numbers

    def lists(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the items of each of the queries."""
        return self.matches.lists(self.numbers[queries])
