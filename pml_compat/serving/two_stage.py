"""Two-stage search measured from stored embeddings: the old index proposes, the new model decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..accuracy.matches import EqualCodes, Matches, SamePosition
from ..accuracy.ranking import exact_ranks
from ..checks import check_embeddings, check_finite, check_integer, check_labels, check_matrix
from ..stored_rows import stored_rows
from ..unit_rows import unit_rows

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
    size = len(old_gallery)
    query_labels = check_labels(query_labels, "query_labels", len(old)).to(old.device)
    gallery_labels = check_labels(gallery_labels, "gallery_labels", size).to(old.device)
    if same_items and not (len(old) <= size and query_labels.equal(gallery_labels[: len(old)])):
        raise ValueError("gallery_labels must begin with query_labels with same_items=True, as row i is the same item")
    excluded: list[Matches] = [SamePosition()] if same_items else []
    positives = EqualCodes(query_labels, gallery_labels)
    relevant = positives.count - int(same_items)
    most = min(max(depths), size - int(same_items))
    candidates = _candidates(old, old_gallery, most, same_items)
    scores = _new_scores(new, new_gallery, candidates)
    right = gallery_labels[candidates] == query_labels[:, None]
    kept = None
    if "mean_average_precision" in wanted:
        kept = _kept_precision(old, old_gallery, positives, excluded, right, [min(d, most) for d in depths])
    found = {}
    for number, value in enumerate(depths):
        first = min(value, most)
        order = scores[:, :first].argsort(dim=1, descending=True, stable=True)
        hits = right[:, :first].gather(1, order)
        counted = relevant > 0
        metrics = {}
        if "precision_at_1" in wanted:
            metrics["precision_at_1"] = hits[counted, :1].any(1).double()
        if kept is not None:
            places = torch.arange(1, first + 1, device=hits.device)
            inside = (hits.cumsum(1) / places * hits).sum(1, dtype=torch.float64)
            metrics["mean_average_precision"] = ((inside + kept[number]) / relevant.clamp(min=1))[counted]
        values = {name: float(row.mean()) if len(row) else float("nan") for name, row in metrics.items()}
        found[value] = values | {"embedded": len(torch.unique(candidates[:, :first])) / size}
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


def _candidates(queries: torch.Tensor, gallery: Any, depth: int, same_items: bool) -> torch.Tensor:
    """Return the ``(Q, depth)`` gallery rows of the highest cosines, highest first.

    The gallery is read once: what is found so far is kept for all queries, and a tile of scores at a time.
    """
    queries = unit_rows(queries.float(), torch.float32)
    best = queries.new_full((len(queries), depth), -torch.inf)
    rows = torch.full(best.shape, -1, device=queries.device)
    for start, block in _blocks(gallery, "old_gallery", queries.shape[1]) if depth else ():
        block = block.to(queries.device)
        for first in range(0, len(queries), _QUERIES):
            part = slice(first, first + _QUERIES)
            scores = queries[part] @ block.t()
            if same_items:
                own = torch.arange(first, first + len(scores), device=scores.device) - start
                inside = (own >= 0) & (own < len(block))
                scores[inside.nonzero()[:, 0], own[inside]] = -torch.inf
            values, places = scores.topk(min(depth, len(block)), dim=1)
            if bool((values[:, 0] > best[part, -1]).any()):
                merged, chosen = torch.cat([best[part], values], 1).topk(depth, dim=1)
                rows[part] = torch.cat([rows[part], places + start], 1).gather(1, chosen)
                best[part] = merged
    return rows


def _new_scores(queries: torch.Tensor, gallery: Any, candidates: torch.Tensor) -> torch.Tensor:
    """Return the cosines of each query with the new vectors of its candidates, ``(Q, depth)``."""
    if candidates.shape[1] == 0:
        return queries.new_empty(candidates.shape)
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
