"""Exact ranks of the right gallery items, query chunk by query chunk: the one engine under every metric.

Retrieval metrics need only where the positives stand in each query's full ranking: the scores of a chunk of queries,
one float32 matrix product, are sorted by value, and each positive's score is looked up among them. Compiled loops count
in place of sorting where there are any (:mod:`pml_compat.accuracy.compiled`). No more than one chunk of queries by the
gallery is ever held.

Where the rounding of the scores could show in a metric (among the first places, across a cut-off, or by more than a
thousandth of the query's average precision or reciprocal rank, in the worst case), float64 decides: the query is ranked
again by sorted float64 distances, in which items tie where their distances differ by no more than the rounding of that
product: copies of a vector, or codes at the same distance, wherever they stand. So no order of the rows can change a
metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from .compiled import CompiledCounting, can_compile
from .gallery import Gallery
from .matches import Matches, mask
from .places import TIED, PlaceBounds, PositiveRanks, unsure_queries

_CHUNK_ELEMENTS = 4 * 2**20  # scores held at once: 16 MiB
_COUNTED_ELEMENTS = 2**20  # scores counted at once, with some 20 bytes each
_MIN_QUERIES = 16  # a matrix product of fewer rows would spend its time reading the gallery
_FEW_QUERIES = 16  # the least that a float64 product is taken of: each time it reads the gallery


def query_chunks(n_query: int, n_reference: int) -> Iterator[slice]:
    """Yield slices of the queries, of a size set by the gallery's."""
    size = max(_MIN_QUERIES, _CHUNK_ELEMENTS // n_reference)
    for start in range(0, n_query, size):
        yield slice(start, min(start + size, n_query))


def exact_ranks(
    query: torch.Tensor,
    reference: torch.Tensor | Gallery,
    positives: Matches,
    excluded: Sequence[Matches] = (),
    k: int | Sequence[int] | None = None,
) -> Iterator[tuple[torch.Tensor, PositiveRanks]]:
    """Yield numbers of queries, each once and in any order, and the ranks of their positives by Euclidean distance.

    Args:
        query: ``(Q, D)``.
        reference: ``(N, D)``, or a gallery made of it.
        positives: the right items of each query.
        excluded: items that are not in the ranking at all.
        k: the places at which the caller cuts rankings off, if any.
    """
    cuts = () if k is None else (k,) if isinstance(k, int) else tuple(k)
    gallery = reference if isinstance(reference, Gallery) else Gallery(reference)
    plain = Counting(query, gallery)
    counting: Counting | CompiledCounting = plain
    careful = not plain.works
    if not careful and can_compile(query, gallery, positives):
        counting = CompiledCounting(query, gallery, plain.size, plain.tolerance)
    left = torch.zeros(0, dtype=torch.long, device=query.device)
    chunks = counting.chunks(positives)
    for place, numbers in enumerate(chunks):
        if careful:
            left = torch.cat([left, numbers])
        else:
            counted = 0
            for part, ranks, unsure in counting.ranks(numbers, positives, excluded, cuts):
                n_unsure = int(unsure.sum())
                if n_unsure == 0:
                    yield part, ranks
                elif n_unsure < len(part):
                    yield part[~unsure], ranks.of(~unsure)
                counted += len(part) - n_unsure
                left = torch.cat([left, part[unsure]])
            careful = 2 * counted < len(numbers)  # ties everywhere: counting first would be for nothing
        if len(left) and (
            place == len(chunks) - 1 or len(left) >= len(numbers)
        ):  # together: each time reads the gallery
            yield from sorted_ranks(query, gallery, left, positives, excluded)
            left = left[:0]


class Counting:
    """Ranks by counting float32 scores, half the squared distance less the query's share of it."""

    def __init__(self, query: torch.Tensor, gallery: Gallery) -> None:
        self.query, self.gallery = query.float(), gallery
        self.size = gallery.largest_scores(self.query)
        tolerance = gallery.rounding(self.query)
        self.works = tolerance is not None and len(gallery) < 2**24  # countable in float32
        self.tolerance = self.query.new_empty(len(query), 1) if tolerance is None else tolerance
        self.scores = self.query.new_empty(0, len(gallery))

    def chunks(self, positives: Matches) -> list[torch.Tensor]:
        """Return all queries' numbers, in the parts that are counted at once."""
        rows = query_chunks(len(self.query), len(self.gallery))
        return [torch.arange(part.start, part.stop, device=self.query.device) for part in rows]

    def ranks(
        self, numbers: torch.Tensor, positives: Matches, excluded: Sequence[Matches], cuts: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, PositiveRanks, torch.Tensor]]:
        """Yield some of the queries, their ranks, and for which the rounding of scores could show in a metric."""
        if len(self.scores) < len(numbers):  # made once: new memory costs more than the work in it
            self.scores = self.query.new_empty(len(numbers), len(self.gallery))
        scores = self.scores[: len(numbers)]
        self.gallery.scores(self.query[numbers[0] : numbers[-1] + 1], out=scores)
        size = max(1, _COUNTED_ELEMENTS // len(self.gallery))
        for part, own_scores in zip(numbers.split(size), scores.split(size), strict=True):
            yield part, *self._count(part, own_scores, positives, excluded, cuts)

    def _count(
        self,
        numbers: torch.Tensor,
        scores: torch.Tensor,
        positives: Matches,
        excluded: Sequence[Matches],
        cuts: Sequence[int],
    ) -> tuple[PositiveRanks, torch.Tensor]:
        for matches in excluded:
            scores[matches.pairs(numbers)] = torch.inf
        index, valid = positives.lists(numbers)
        own = _sort_values(scores.gather(1, index).masked_fill_(~valid, torch.inf))
        relevant = (own < torch.inf).sum(1)
        width = max(1, int(relevant.max()))
        own = torch.nn.functional.pad(own, (0, max(0, width - own.shape[1])), value=torch.inf)[:, :width].contiguous()
        tolerance, everyone = self.tolerance[numbers], _sort_values(scores)
        below, above = own - tolerance, own + tolerance
        ranks = PositiveRanks(
            valid=own < torch.inf,
            closer=torch.searchsorted(everyone, own),
            within=torch.searchsorted(everyone, own, right=True),
            positives_within=torch.searchsorted(own, own, right=True),
            relevant=relevant,
        )
        bounds = PlaceBounds(
            closer=torch.searchsorted(everyone, below),
            within=torch.searchsorted(everyone, above, right=True),
            positives_closer=torch.searchsorted(own, below),
            positives_within=torch.searchsorted(own, above, right=True).minimum(relevant[:, None]),
        )
        return ranks, unsure_queries(ranks, bounds, cuts)


def sorted_ranks(
    query: torch.Tensor,
    gallery: Gallery,
    queries: torch.Tensor,
    positives: Matches,
    excluded: Sequence[Matches],
) -> Iterator[tuple[torch.Tensor, PositiveRanks]]:
    """Rank by sorted float64 distances: slower than counting, and exact to the last tie."""
    size = max(1, _COUNTED_ELEMENTS // (2 * len(gallery)))
    for part in queries.split(max(_FEW_QUERIES, 4 * size)):
        products = gallery.squared_distances(query[part])
        for numbers, distances in zip(part.split(size), products.split(size), strict=True):
            out = mask(list(excluded), numbers, len(gallery))
            positive = mask([positives], numbers, len(gallery)) & ~out
            distances.masked_fill_(out, torch.inf)
            counts = positive.sum(1)
            own = distances.new_full((len(distances), max(1, int(counts.max()))), torch.inf)
            valid = torch.arange(own.shape[1], device=own.device) < counts[:, None]
            own[valid] = distances[positive]
            own, everyone = _sort_values(own), _sort_values(distances)
            first = _first_of_tie(everyone, query[numbers].to(everyone.dtype).square().sum(1, keepdim=True))
            places = torch.searchsorted(everyone, own).clamp_max(len(gallery) - 1)
            closer = first.gather(1, places).masked_fill_(~valid, len(gallery))
            yield (
                numbers,
                PositiveRanks(
                    valid=valid,
                    closer=closer,
                    within=torch.searchsorted(first, closer, right=True),
                    positives_within=torch.searchsorted(closer, closer, right=True),
                    relevant=counts,
                ),
            )


def nearest(
    query: torch.Tensor, reference: torch.Tensor, excluded: Sequence[Matches], k: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the ``(q, k)`` squared distances and row numbers of the nearest gallery items, chunk by chunk."""
    gallery = Gallery(reference)
    for rows in query_chunks(len(query), len(reference)):
        numbers = torch.arange(rows.start, rows.stop, device=query.device)
        distances = gallery.squared_distances(query[rows])
        distances.masked_fill_(mask(list(excluded), numbers, len(reference)), torch.inf)
        found = distances.topk(k, dim=1, largest=False)
        own = query[rows].to(distances.dtype).square().sum(1, keepdim=True)
        yield (found.values + own).clamp_min_(0), found.indices


def listed_ranks(
    indices: torch.Tensor, kept: torch.Tensor, relevant: torch.Tensor, excluded: torch.Tensor
) -> PositiveRanks:
    """Read the ranks off a neighbour list, which an index of the user's own made.

    Args:
        indices: ``(q, k)`` gallery rows, nearest first.
        kept: ``(q, k)`` bool; the others are taken out of the list.
        relevant: ``(q, N)`` bool.
        excluded: ``(q, N)`` bool.
    """
    hits = relevant.gather(1, indices) & kept
    place = kept.cumsum(1)
    order = torch.argsort(~hits, dim=1, stable=True)
    width = max(1, int(hits.sum(1).max()))
    order = order[:, :width]
    within = place.gather(1, order)
    return PositiveRanks(
        valid=hits.gather(1, order),
        closer=within - 1,
        within=within,
        positives_within=torch.arange(1, width + 1, device=indices.device).expand_as(within),
        relevant=(relevant & ~excluded).sum(1),
    )


def _sort_values(matrix: torch.Tensor) -> torch.Tensor:
    """Sort rows without their indices; NumPy's vectorised sort is far faster than torch's on a CPU."""
    if matrix.device.type == "cpu":
        return torch.from_numpy(np.sort(matrix.numpy(), axis=1))
    return matrix.sort(dim=1).values


def _first_of_tie(values: torch.Tensor, query_norms: torch.Tensor) -> torch.Tensor:
    """For rows of sorted distances: how many items come before the tie that each item is in.

    Neighbours tie where they differ by no more than the product's rounding: a few units in the last place of
    ``(2 |q| + d) ** 2``, which bounds the squared lengths of the two vectors.
    """
    scale = (values + query_norms).clamp_min_(0).sqrt_().add_(2 * query_norms.sqrt()).square_()
    apart = values.diff(dim=1) > scale[:, :-1].mul_(TIED * torch.finfo(values.dtype).eps)
    places = torch.arange(1, values.shape[1], device=values.device) * apart
    return torch.nn.functional.pad(places, (1, 0)).cummax(1).values
