"""Exact ranks of the right gallery items, query chunk by query chunk: the one engine under every metric.

Retrieval metrics need only where the positives stand in each query's full ranking. So the distances of a chunk of
queries are sorted by value, and the positives' ranks are looked up in them; no more than one chunk of queries by
the gallery is ever held.

Distances are taken in float64, and items whose distances differ by no more than the rounding of the product tie: copies
of a vector, or codes at the same distance, wherever they stand. So no order of the rows can change a metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

_CHUNK_ELEMENTS = 2**22  # distances held at once: 32 MiB, and a few masks of the same shape
_MIN_QUERIES = 16  # a matrix product of fewer rows would spend its time reading the gallery
_GALLERY_BLOCK = 2**15  # gallery rows turned to float64 at once

Mask = Callable[[slice], torch.Tensor]


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


def query_chunks(n_query: int, n_reference: int) -> Iterator[slice]:
    """Yield slices of the queries, of a size set by the gallery's."""
    size = max(_MIN_QUERIES, _CHUNK_ELEMENTS // n_reference)
    for start in range(0, n_query, size):
        yield slice(start, min(start + size, n_query))


def squared_distances(query: torch.Tensor, reference: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield ``(rows, (q, N) distances)`` over chunks of queries; squared Euclidean less the query's own norm.

    Within a row the order, which is all that ranks need, is that of the Euclidean distance.
    """
    dtype = torch.float32 if query.device.type == "mps" else torch.float64
    reference_norms = torch.cat([part.to(dtype).square().sum(1) for part in reference.split(_GALLERY_BLOCK)])
    for rows in query_chunks(len(query), len(reference)):
        part = query[rows].to(dtype)
        distances = part.new_empty(len(part), len(reference))
        for first in range(0, len(reference), _GALLERY_BLOCK):
            block = slice(first, first + _GALLERY_BLOCK)
            distances[:, block] = torch.addmm(reference_norms[block], part, reference[block].to(dtype).t(), alpha=-2)
        yield rows, distances


def exact_ranks(
    query: torch.Tensor, reference: torch.Tensor, relevant: Mask, excluded: Mask
) -> Iterator[tuple[slice, PositiveRanks]]:
    """Yield the positives' ranks in the full ranking by Euclidean distance.

    Args:
        query: ``(Q, D)``.
        reference: ``(N, D)``.
        relevant: ``(q, N)`` bool for a slice of queries: same label.
        excluded: ``(q, N)`` bool for a slice of queries: not in the ranking at all.
    """
    for rows, distances in squared_distances(query, reference):
        out = excluded(rows)
        positive = relevant(rows) & ~out
        distances.masked_fill_(out, torch.inf)
        counts = positive.sum(1)
        own = distances.new_full((len(distances), max(1, int(counts.max()))), torch.inf)
        valid = torch.arange(own.shape[1], device=own.device) < counts[:, None]
        own[valid] = distances[positive]
        own, everyone = _sort_values(own), _sort_values(distances)
        first = _first_of_tie(everyone, query[rows].to(everyone.dtype).square().sum(1, keepdim=True))
        places = torch.searchsorted(everyone, own).clamp_max(len(reference) - 1)
        closer = first.gather(1, places).masked_fill_(~valid, len(reference))
        yield (
            rows,
            PositiveRanks(
                valid=valid,
                closer=closer,
                within=torch.searchsorted(first, closer, right=True),
                positives_within=torch.searchsorted(closer, closer, right=True),
                relevant=counts,
            ),
        )


def nearest(query: torch.Tensor, reference: torch.Tensor, excluded: Mask, k: int) -> Iterator[torch.Tensor]:
    """Yield the ``(q, k)`` row numbers of the nearest gallery items, chunk by chunk."""
    for rows, distances in squared_distances(query, reference):
        yield distances.masked_fill_(excluded(rows), torch.inf).topk(k, dim=1, largest=False).indices


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
