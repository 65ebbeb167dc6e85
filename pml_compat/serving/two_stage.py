"""Two-stage search measured from stored embeddings: the old index proposes, the new model decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .._checks import check_embeddings, check_finite, check_integer, check_labels, check_matrix, stored_rows
from .._rows import unit_rows
from ..accuracy.matches import EqualCodes, Matches, SamePosition
from ..accuracy.ranking import exact_ranks

_METRICS = ("precision_at_1", "mean_average_precision")
_QUERIES, _GALLERY_ROWS = 256, 16384  # of a tile of scores
_GATHERED = 2**23  # numbers of candidates' new vectors, held at once


@torch.no_grad()
def two_stage_accuracy(
    old_queries: Any,
    new_queries: Any,
    old_gallery: Any,
    new_gallery: Any,
    query_labels: Any,
    gallery_labels: Any,
    *,
    depth: Sequence[int] | int = (10, 50, 200),
    same_items: bool = False,
    include: Sequence[str] = _METRICS,
) -> dict[int, dict[str, float]]:
    r"""Measure a search in two stages: the ``depth`` nearest in the old index, put in the new model's order.

    The old gallery stays as it is. Of each query's candidates the new model's vectors are needed, which a service makes
    when they are first asked for (:class:`TwoStageSearch`). Items past the candidates keep the place that the first
    stage gave them. Both stages rank by cosine. Exact, a tile of scores at a time; galleries may be memory maps.

    Args:
        old_queries: ``(Q, D_old)``, what the old index is asked with: the old model's queries, blended ones
            (:class:`QueryBlend`), or those of a compatible model.
        new_queries: ``(Q, D_new)``, the new model's of the same items.
        old_gallery: ``(N, D_old)``.
        new_gallery: ``(N, D_new)``, row i of the same item; only the rows that are candidates are read.
        query_labels: ``(Q,)`` integers.
        gallery_labels: ``(N,)``.
        depth: how many candidates, 1 or more; several are measured in one search.
        same_items: row i of queries and gallery are the same item, which is left out of query i's ranking.
        include: ``"precision_at_1"`` alone needs no ranking past the candidates.
    Returns:
        By depth, with the metrics of ``include`` over the queries that have a right item; and ``"embedded"``, the
        share of the gallery that was a candidate of any query: what a service has embedded anew after this log.
    Raises:
        ValueError: widths or lengths that differ, NaN or infinity, a depth below 1, another metric.
    Example:
        >>> old, new, labels = torch.randn(20, 4), torch.randn(20, 8), torch.arange(20) % 4
        >>> found = two_stage_accuracy(old, new, old, new, labels, labels, depth=5, same_items=True)
        >>> sorted(found[5])
        ['embedded', 'mean_average_precision', 'precision_at_1']
    """
    wanted = list(include)
    if not wanted or set(wanted) - set(_METRICS):
        raise ValueError(f"include must name some of {list(_METRICS)}, got {wanted}")
    asked = np.atleast_1d(np.asarray(depth, dtype=object)).tolist()
    depths = [check_integer(value, "depth", minimum=1) for value in asked]
    if not depths:
        raise ValueError("depth must be a number or some numbers, got none")
    old = check_embeddings(old_queries, "old_queries")
    new = check_embeddings(new_queries, "new_queries")
    _check_lengths(old_queries, new_queries, "queries")
    _check_lengths(old_gallery, new_gallery, "gallery")
    query_labels = check_labels(query_labels, "query_labels", len(old)).to(old.device)
    gallery_labels = check_labels(gallery_labels, "gallery_labels", len(old_gallery)).to(old.device)
    if same_items and not (len(old) <= len(old_gallery) and query_labels.equal(gallery_labels[: len(old)])):
        raise ValueError("gallery_labels must begin with query_labels with same_items=True, as row i is the same item")
    excluded: list[Matches] = [SamePosition()] if same_items else []
    values = two_stage_values(
        old, new, old_gallery, new_gallery, (query_labels, gallery_labels), excluded, depths, wanted
    )
    return {
        depth: {**{name: float(found[name].nanmean()) for name in wanted}, "embedded": embedded}
        for depth, (found, embedded) in values.items()
    }


def two_stage_values(
    old: torch.Tensor,
    new: torch.Tensor,
    old_gallery: Any,
    new_gallery: Any,
    labels: tuple[torch.Tensor, torch.Tensor],
    excluded: list[Matches],
    depths: Sequence[int],
    include: Sequence[str] = _METRICS,
) -> dict[int, tuple[dict[str, torch.Tensor], float]]:
    """Return, by depth, each query's metrics and the share of the gallery that was a candidate of any query.

    Args:
        old: ``(Q, D_old)``.
        new: ``(Q, D_new)``.
        old_gallery: ``(N, D_old)``.
        new_gallery: ``(N, D_new)``.
        labels: of queries and gallery, from which it follows what is right.
        excluded: items that are left out of a query's ranking.
        depths: how many candidates.
        include: metrics.
    Shape:
        - metrics: ``(Q,)`` float64; NaN for a query with no right item
    """
    query_labels, gallery_labels = labels
    size, positives = len(old_gallery), EqualCodes(query_labels, gallery_labels)
    left_out = _pairs(excluded, len(old), old.device)
    relevant = positives.count.clone()
    row, item = left_out
    relevant.index_add_(0, row, -(query_labels[row] == gallery_labels[item]).to(relevant.dtype))
    most = min(max(depths), size)
    candidates, filled = _candidates(old, old_gallery, most, left_out)
    scores = _new_scores(new, new_gallery, candidates).masked_fill(~filled, -torch.inf)
    right = (gallery_labels[candidates] == query_labels[:, None]) & filled
    kept = None
    if "mean_average_precision" in include:
        kept = _kept_precision(old, old_gallery, positives, excluded, right, [min(d, most) for d in depths])
    found = {}
    for number, value in enumerate(depths):
        first = min(value, most)
        order = scores[:, :first].argsort(dim=1, descending=True, stable=True)
        hits = right[:, :first].gather(1, order)
        metrics = {"precision_at_1": hits[:, :1].any(1).double()}
        if kept is not None:
            places = torch.arange(1, first + 1, device=hits.device)
            inside = (hits.cumsum(1) / places * hits).sum(1, dtype=torch.float64)
            metrics["mean_average_precision"] = (inside + kept[number]) / relevant.clamp(min=1)
        lone = relevant == 0
        embedded = len(torch.unique(candidates[:, :first][filled[:, :first]])) / size
        found[value] = {name: metrics[name].masked_fill(lone, torch.nan) for name in include}, embedded
    return found


def depth_for_gain(
    found: Mapping[int, Mapping[str, float]],
    old: float,
    new: float,
    share: float = 0.95,
    metric: str = "precision_at_1",
) -> int | None:
    """Return the smallest measured depth that reaches a share of what a new gallery gains; None where none does.

    Args:
        found: of :func:`two_stage_accuracy`.
        old: old/old in ``metric``.
        new: new/new.
        share: of the way from ``old`` to ``new``.
        metric: one of those that were measured.
    """
    goal = old + share * (new - old)
    return next((depth for depth in sorted(found) if found[depth][metric] >= goal), None)


def _check_lengths(old: Any, new: Any, name: str) -> None:
    if len(old) != len(new):
        raise ValueError(
            f"new_{name} must have the items of old_{name}, row by row: expected {len(old)}, got {len(new)}"
        )


def _blocks(gallery: Any, name: str, width: int) -> Iterator[tuple[int, torch.Tensor]]:
    for start in range(0, len(gallery), _GALLERY_ROWS):
        rows = check_matrix(gallery[start : start + _GALLERY_ROWS], name, width)
        check_finite(rows, name, start)
        yield start, unit_rows(rows.float(), torch.float32)


def _pairs(excluded: list[Matches], n_query: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is left out as pairs of a query's number, in order, and a gallery row, each once."""
    pairs = [torch.zeros(0, 2, dtype=torch.long, device=device)]
    for first in range(0, n_query if excluded else 0, _QUERIES):
        numbers = torch.arange(first, min(first + _QUERIES, n_query), device=device)
        found = [one.pairs(numbers) for one in excluded]
        pairs.append(torch.cat([torch.stack([row + first, item], 1) for row, item in found]).unique(dim=0))
    joined = torch.cat(pairs)
    return joined[:, 0], joined[:, 1]


def _candidates(
    queries: torch.Tensor, gallery: Any, depth: int, left_out: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``(Q, depth)`` gallery rows of the highest cosines, highest first, and which of them there are.

    The gallery is read once: what is found so far is kept for all queries, and a tile of scores at a time.
    """
    queries = unit_rows(queries.float(), torch.float32)
    best = queries.new_full((len(queries), depth), -torch.inf)
    rows = torch.zeros(best.shape, dtype=torch.long, device=queries.device)
    tiles = torch.arange(0, len(queries) + _QUERIES, _QUERIES, device=queries.device)
    ends = torch.searchsorted(left_out[0].contiguous(), tiles).tolist()
    for start, block in _blocks(gallery, "old_gallery", queries.shape[1]):
        block = block.to(queries.device)
        for tile, first in enumerate(range(0, len(queries), _QUERIES)):
            part = slice(first, first + _QUERIES)
            scores = queries[part] @ block.t()
            own, item = (side[ends[tile] : ends[tile + 1]] for side in left_out)
            inside = (item >= start) & (item < start + len(block))
            scores[own[inside] - first, item[inside] - start] = -torch.inf
            values, places = scores.topk(min(depth, len(block)), dim=1)
            if bool((values[:, 0] > best[part, -1]).any()):
                merged, chosen = torch.cat([best[part], values], 1).topk(depth, dim=1)
                rows[part] = torch.cat([rows[part], places + start], 1).gather(1, chosen)
                best[part] = merged
    return rows, best > -torch.inf


def _new_scores(queries: torch.Tensor, gallery: Any, candidates: torch.Tensor) -> torch.Tensor:
    """Return the cosines of each query with the new vectors of its candidates, ``(Q, depth)``."""
    unit = unit_rows(queries.float(), torch.float32)
    size, found = max(1, _GATHERED // max(1, candidates.shape[1] * queries.shape[1])), []
    for numbers in torch.arange(len(queries)).split(size):
        rows = candidates[numbers]
        needed, place = torch.unique(rows, return_inverse=True)  # each is read once
        vectors = check_matrix(stored_rows(gallery, needed.cpu(), "new_gallery"), "new_gallery", queries.shape[1])
        vectors = unit_rows(vectors.to(unit), torch.float32)
        found.append(torch.bmm(vectors[place], unit[numbers, :, None])[:, :, 0])
    return torch.cat(found)


def _kept_precision(
    queries: torch.Tensor,
    gallery: Any,
    positives: Matches,
    excluded: list[Matches],
    right: torch.Tensor,
    depths: list[int],
) -> torch.Tensor:
    """Sum, for each depth and query, the precision at the right items that are no candidates: the first stage's."""
    whole = torch.cat([rows for _, rows in _blocks(gallery, "old_gallery", queries.shape[1])]).to(queries.device)
    unit = unit_rows(queries.float(), torch.float32)
    inside = torch.stack([right[:, :depth].sum(1) for depth in depths])
    sums = torch.zeros(len(depths), len(queries), dtype=torch.float64, device=queries.device)
    for numbers, ranks in exact_ranks(unit, whole, positives, excluded):
        precision = (ranks.positives_within / ranks.within.clamp(min=1)).double() * ranks.valid
        place = torch.arange(precision.shape[1], device=precision.device)
        for row, count in enumerate(inside[:, numbers]):
            sums[row, numbers] = (precision * (place >= count[:, None])).sum(1)
    return sums
