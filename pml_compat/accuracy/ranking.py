"""Exact ranks of the right gallery items, query chunk by query chunk: the one engine under every metric.

Retrieval metrics need only where the positives stand in each query's full ranking, and that is counted, not sorted: the
scores of a chunk of queries (one float32 matrix product) are put into narrow buckets; the items in a positive's own
bucket are compared with it one by one, those in nearer buckets by number. No more than one chunk of queries by the
gallery is ever held.

Where the rounding of the scores could show in a metric (among the first places, across a cut-off, or by more than a
thousandth of the query's average precision or reciprocal rank, in the worst case), float64 decides: the query is ranked
again by sorted float64 distances, in which items tie where their distances differ by no more than the rounding of that
product: copies of a vector, or codes at the same distance, wherever they stand. So no order of the rows can change a
metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from .gallery import Gallery
from .matches import Matches, mask

_CHUNK_ELEMENTS = 4 * 2**20  # scores held at once: 16 MiB
_COUNTED_ELEMENTS = 2**20  # scores counted at once, with some 20 bytes each
_MIN_QUERIES = 16  # a matrix product of fewer rows would spend its time reading the gallery
_FEW_QUERIES = 4  # the least that float64 works at: each time it reads the gallery
_FIRST_PLACES = 10  # where the order is not left to rounding
_CHANGE = 1e-3  # share of a query's average precision, or of its reciprocal rank, that is left to rounding at most


@dataclass(frozen=True)
class PositiveRanks:
    """Where the positives of some queries stand; every tensor but ``relevant`` is ``(Q, P)``, nearest first.

    A row has as many valid entries as its query has positives in the ranking. Ties make ``within`` exceed
    ``closer + 1``: the item stands anywhere from place ``closer + 1`` to place ``within``.
    """

    valid: torch.Tensor  # False for padding
    closer: torch.Tensor  # gallery items strictly closer than this positive
    within: torch.Tensor  # gallery items at most as far, itself included
    positives_within: torch.Tensor  # positives at most as far, itself included
    relevant: torch.Tensor  # (Q,) positives of each query, in the ranking or not

    def of(self, queries: torch.Tensor) -> PositiveRanks:
        """Return the ranks of some of the queries."""
        return PositiveRanks(**{field.name: getattr(self, field.name)[queries] for field in fields(self)})


@dataclass(frozen=True)
class PlaceBounds:
    """What rounding leaves of the places of positives; every tensor is ``(Q, P)``."""

    closer: torch.Tensor  # gallery items that are closer for sure
    within: torch.Tensor  # gallery items that may be as close, itself included
    positives_closer: torch.Tensor  # positives that are closer for sure
    positives_within: torch.Tensor  # positives that may be as close, itself included

    def precisions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the least and the largest precision that each positive may end a list with."""
        wrong_before = (self.closer - self.positives_closer).clamp_min(0)
        wrong_within = (self.within - self.positives_within).clamp_min(0)
        least = (self.positives_closer + 1).double()
        most = self.positives_within.clamp_min(1).double()
        return least / (least + wrong_within), most / (most + wrong_before)


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
    counting = _Counting(query, gallery)
    careful = not counting.works
    left = torch.zeros(0, dtype=torch.long, device=query.device)
    chunks = list(query_chunks(len(query), len(gallery)))
    for rows in chunks:
        numbers = torch.arange(rows.start, rows.stop, device=query.device)
        if careful:
            left = torch.cat([left, numbers])
        else:
            counted = 0
            for part, ranks, unsure in counting.ranks(numbers, positives, excluded, cuts):
                if not bool(unsure.all()):
                    yield part[~unsure], ranks.of(~unsure)
                    counted += int((~unsure).sum())
                left = torch.cat([left, part[unsure]])
            careful = 2 * counted < len(numbers)  # ties everywhere: counting first would be for nothing
        if len(left) and (rows is chunks[-1] or len(left) >= len(numbers)):  # together: each time reads the gallery
            yield from _sorted_ranks(query, gallery, left, positives, excluded)
            left = left[:0]


class _Counting:
    """Ranks by counting float32 scores, half the squared distance less the query's share of it."""

    def __init__(self, query: torch.Tensor, gallery: Gallery) -> None:
        self.query, self.gallery = query.float(), gallery
        tolerance = gallery.rounding(self.query)
        self.works = tolerance is not None and len(gallery) < 2**24  # countable in float32
        self.tolerance = self.query.new_empty(len(query), 1) if tolerance is None else tolerance
        self.scores = self.query.new_empty(0, len(gallery))
        self.bucket = torch.empty(0, len(gallery), dtype=torch.long, device=query.device)
        self.buckets = 2 ** max(8, math.floor(math.log2(len(gallery))) - 1)

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
        tolerance = self.tolerance[numbers]
        low = scores.amin(1, keepdim=True)
        # A little less than all buckets, so that the largest score is not rounded past the last one.
        scale = (self.buckets - 1.5) / (scores.amax(1, keepdim=True) - low).clamp_min_(tolerance)
        scores.sub_(low).mul_(scale)
        if self.bucket.shape[0] < len(numbers):
            self.bucket = torch.empty(scores.shape, dtype=torch.long, device=scores.device)
        bucket = self.bucket[: len(numbers)].copy_(scores)
        for matches in excluded:
            bucket[matches.pairs(numbers)] = self.buckets  # one more, past all others

        index, valid = positives.lists(numbers)
        valid = valid & (bucket.gather(1, index) < self.buckets)
        own = _sort_values(scores.gather(1, index).masked_fill_(~valid, torch.inf))
        relevant = valid.sum(1)
        width = max(1, int(relevant.max()))
        own = torch.nn.functional.pad(own, (0, max(0, width - own.shape[1])), value=torch.inf)[:, :width].contiguous()

        # Items in the buckets of the positives are compared one by one, all others counted.
        below, above = own - tolerance * scale, own + tolerance * scale
        place = torch.cat([below, own, above], dim=1).clamp_(0, self.buckets - 1).long()
        shared = bucket.new_zeros(len(numbers), self.buckets + 1, dtype=torch.bool).scatter_(1, place, True)
        counts = scores.new_zeros(shared.shape)
        counts.scatter_add_(1, bucket, counts.new_ones(1, 1).expand_as(bucket)).scatter_(1, place, 0)
        near = _sort_values(_packed(scores, shared.gather(1, bucket)))
        before, here, after = counts.cumsum(1).gather(1, place).long().split(width, dim=1)
        positives_within = torch.arange(1, width + 1, device=own.device).expand_as(own)
        if bool((own.diff(dim=1) == 0).any()):  # infinity less infinity is not 0
            positives_within = torch.searchsorted(own, own, right=True)
        ranks = PositiveRanks(
            valid=torch.arange(width, device=own.device) < relevant[:, None],
            closer=here + torch.searchsorted(near, own),
            within=here + torch.searchsorted(near, own, right=True),
            positives_within=positives_within,
            relevant=relevant,
        )
        surely_closer = before + torch.searchsorted(near, below)
        maybe_within = after + torch.searchsorted(near, above, right=True)
        surely_before = torch.searchsorted(own, below.contiguous())
        maybe_here = torch.searchsorted(own, above.contiguous(), right=True).minimum(relevant[:, None])
        bounds = PlaceBounds(surely_closer, maybe_within, surely_before, maybe_here)
        return ranks, _unsure(ranks, bounds, cuts)


def _sorted_ranks(
    query: torch.Tensor,
    gallery: Gallery,
    queries: torch.Tensor,
    positives: Matches,
    excluded: Sequence[Matches],
) -> Iterator[tuple[torch.Tensor, PositiveRanks]]:
    """Rank by sorted float64 distances: slower than counting, and exact to the last tie."""
    for numbers in queries.split(max(_FEW_QUERIES, _COUNTED_ELEMENTS // (4 * len(gallery)))):
        distances = gallery.squared_distances(query[numbers])
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


def _unsure(ranks: PositiveRanks, bounds: PlaceBounds, cuts: Sequence[int]) -> torch.Tensor:
    """Tell for which queries rounding could move a positive that a metric looks at, or much of average precision."""
    others = (bounds.within - bounds.closer - 1) * ranks.valid
    seen = bounds.closer < _FIRST_PLACES
    borders = [ranks.relevant[:, None]]
    for k in cuts:
        borders += [torch.full_like(borders[0], k), borders[0].clamp_max(k)]
    for cut in borders:
        seen = seen | ((bounds.closer < cut) & (bounds.within > cut))
    least, most = bounds.precisions()
    precision = ranks.positives_within.double() / ranks.within.clamp_min(1)
    change = torch.maximum(most - precision, precision - least).mul_(ranks.valid).sum(1)
    first = bounds.closer[:, 0] + 1, bounds.within[:, 0].clamp_min(1)  # whose reciprocals differ by (b - a) / (a b)
    reciprocal = (first[1] - first[0]).double() / first[1] * ranks.valid[:, 0]
    unsure = (change > _CHANGE * precision.mul_(ranks.valid).sum(1)) | (reciprocal > _CHANGE)
    return unsure | (seen & (others > 0)).any(1)


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
    apart = values.diff(dim=1) > scale[:, :-1].mul_(64 * torch.finfo(values.dtype).eps)
    places = torch.arange(1, values.shape[1], device=values.device) * apart
    return torch.nn.functional.pad(places, (1, 0)).cummax(1).values


def _packed(values: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
    """Return the flagged values of each row, filled up with infinity."""
    if values.device.type == "cpu":  # NumPy finds them faster
        places = torch.from_numpy(np.flatnonzero(flags.numpy()))
    else:
        places = flags.view(-1).nonzero()[:, 0]
    ends = torch.arange(1, len(flags) + 1, device=values.device) * flags.shape[1]
    count = torch.searchsorted(places, ends).diff(prepend=places.new_zeros(1))
    filled = torch.arange(int(count.max()), device=values.device) < count[:, None]
    return values.new_full(filled.shape, torch.inf).masked_scatter_(filled, values.view(-1)[places])
