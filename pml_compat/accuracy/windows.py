"""Float64 decisions about the items near a query's positives alone, where the rounding of its scores could show.

A wrong item whose float32 score is no nearer to a positive's than rounding reaches is on one side of it for sure: such
items need only be counted. The others were listed meanwhile, a handful in a window around each positive. Their
distances and the positives', in float64, give the places that sorting all of the gallery would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .gallery import Gallery
from .places import TIED, PositiveRanks

if TYPE_CHECKING:
    from .compiled import QueryBlock

_REACH = 2.0**-10  # share of the window that a tie may take: far below what float32 may err
_BYTES = 2**21  # of distances at once


@dataclass(frozen=True)
class NearItems:
    """Wrong items near a positive: ``(q, n)`` gallery rows, and how many each query has; more than n did not fit."""

    rows: np.ndarray
    size: np.ndarray


def decide(
    block: QueryBlock,
    galleries: tuple[Gallery, Gallery],
    replaced: int,
    own: tuple[np.ndarray, np.ndarray],
    near: NearItems,
    n_old: np.ndarray,
    apart: np.ndarray,
    ranks: PositiveRanks,
    unsure: torch.Tensor,
) -> None:
    """Correct the ranks of unsure queries, and take them off ``unsure``; those with too many items near stay there.

    Args:
        block: the queries.
        galleries: the old and the new one.
        replaced: how many of the first rows are new.
        own: ``(q, P)`` rows of positives, and ``(q,)`` how many there are.
        near: what counting found, old rows before new ones.
        n_old: ``(q,)``, how many of these are old.
        apart: ``(q, P)`` wrong items that are not near and closer than the first positive, the second...
        ranks: ``(q, P)``.
        unsure: ``(q,)`` bool.
    """
    from . import windows_kernel  # numba's, whose types Python's do not tell

    loops: Any = windows_kernel
    queries = np.flatnonzero(unsure.numpy() & (near.size <= near.rows.shape[1]))
    if not len(queries):
        return
    rows = [gallery.exact_rows.numpy() for gallery in galleries]
    apart = np.ascontiguousarray(apart)
    found = ranks.closer.numpy(), ranks.within.numpy(), ranks.positives_within.numpy(), unsure.numpy()
    reach = 2 * _REACH * block.tolerance  # scores are half of squared distances
    width = own[0].shape[1]
    size = max(1, _BYTES // (8 * (width + int(near.size[queries].max()))))
    for part in np.split(queries, range(size, len(queries), size)):
        query = block.exact[torch.from_numpy(part)].double().numpy()
        own_distances = np.empty((len(part), width))
        distances = np.empty((len(part), int(near.size[part].max())))
        listed = near.rows, n_old, near.size
        loops.find_distances(part, query, *rows, replaced, *own, *listed, own_distances, distances)
        own_distances.sort(axis=1)
        distances.sort(axis=1)
        given = own_distances, distances, own[1], apart, reach, TIED * np.finfo(np.float64).eps
        loops.find_exact_places(part, query, *given, *found)
