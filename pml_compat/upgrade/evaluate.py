"""An upgrade measured on arrays: every query model on every gallery that is given, and what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm import tqdm

from .._checks import check_integer, check_number
from ..accuracy import CrossModelAccuracyCalculator
from ..accuracy.items import as_values
from ..accuracy.mixed_accuracy import mixed_accuracy
from ..verification.thresholds import check_rates
from .criterion import pair_criterion
from .evaluation import Backfill, Evaluation
from .groups import by_group
from .names import ALL_METRICS, METRICS, PAIR_NAMES, TWO_STAGES
from .prepare import Prepared, chance, prepare, rows_of, take
from .query_time import blended_queries, two_stages
from .verified import verify, verify_some

if TYPE_CHECKING:
    from ..serving import QueryBlend

_BLOCK = 1024  # queries ranked between two steps of the progress bar
_STEPS = 10  # of a backfill


def evaluate(
    queries: Any,
    gallery: Any,
    query_labels: Any,
    gallery_labels: Any,
    *,
    old_queries: Any = None,
    new_gallery: Any = None,
    transformed_gallery: Any = None,
    query_ids: Any = None,
    gallery_ids: Any = None,
    new_gallery_ids: Any = None,
    query_cameras: Any = None,
    gallery_cameras: Any = None,
    same_items: bool = False,
    fars: Sequence[float] = (),
    normalize: bool = True,
    fit_width: bool = False,
    k: int | None = None,
    margin: float = 0.01,
    orders: int = 5,
    blend: QueryBlend | Literal[False] | None = None,
    depths: Sequence[int] = (10, 50),
    groups: Any = None,
    knn_func: Callable[..., Any] | None = None,
    seed: int = 0,
    device: Any = None,
    progress: bool = False,
) -> Evaluation:
    """Measure an upgrade: new queries on the stored gallery, compared with what old queries find there today.

    Args:
        queries: ``(Q, D_new)``, as the new model embeds them: a tensor, an array or a memory map.
        gallery: ``(N, D_old)``, as the old model embedded and stored it.
        query_labels: ``(Q,)`` numbers, bools or strings; NaN and None are unknown.
        gallery_labels: ``(N,)``.
        old_queries: ``(Q, D_old)``, the same queries by the old model: needed for a verdict.
        new_gallery: ``(N, D_new)``, the same gallery items by the new model: gain and backfill. With
            ``new_gallery_ids`` a sample of them; all is then measured on that sample.
        transformed_gallery: ``(N, D_new)``, the stored gallery mapped into the new space.
        query_ids: ``(Q,)``; gallery items with a query's id are left out of its ranking.
        gallery_ids: ``(N,)``.
        new_gallery_ids: ids of the rows of ``new_gallery``, among ``gallery_ids``.
        query_cameras: ``(Q,)``; items of the query's label and camera are left out.
        gallery_cameras: ``(N,)``.
        same_items: row i of queries and gallery is the same item, in place of ids.
        fars: false accept rates to measure verification at, too; the verdict then looks at the old thresholds.
        normalize: scale rows to length 1.
        fit_width: compare models of different widths by :func:`pml_compat.fit_width`.
        k: cut rankings off after k items.
        margin: a difference that does not matter: above it, and not sure, more queries are asked for.
        orders: random orders that a backfill is measured in; 0, none is.
        blend: fitted to training items, to measure blended queries with; by default it is fitted, without labels, to
            the gallery by both models. False: none, as where the old model will not run any more.
        depths: items a query of a search in two stages, measured with old queries and the new gallery; may be empty.
        groups: ``(Q,)`` a group of each query, such as a country: ``.groups`` has the evaluation of each, with its
            false accepts at the thresholds of all; the verdict warns of groups that are worse off.
        knn_func: ranks in place of the exact search, such as the :class:`~pml_compat.accuracy.ServedIndex` that the
            service runs; then there are no two stages. Verification stays exact.
        seed: of the orders and the resamples.
        device: where to compute.
        progress: show a progress bar.
    Returns:
        The :class:`Evaluation`: ``.table()``, ``.verdict``, ``.to_json(path)``, ``.to_html(path)``.
    Raises:
        ValueError: embeddings, labels, ids or widths that do not fit together; queries that are gallery items, bit by
            bit, without ``same_items`` or ids; cameras that leave no query a right item; a blend without old queries,
            or of other widths.
    Example:
        >>> labels = torch.arange(40) % 4
        >>> old, new = torch.randn(40, 8), torch.eye(8)[labels]
        >>> found = evaluate(new, old, labels, labels, old_queries=old, same_items=True)
        >>> list(found.pairs)
        ['old_to_old', 'new_to_old']
    """
    rates = check_rates(fars, "fars") if len(list(fars)) else []
    check_number(margin, "margin", minimum=0)
    check_integer(orders, "orders", minimum=0)
    depths = [check_integer(depth, "depths", minimum=1) for depth in depths]
    if blend and old_queries is None:
        raise ValueError("blend must be given with old_queries, which it blends with the new ones")
    notes = []
    if new_gallery_ids is not None:
        if new_gallery is None or gallery_ids is None:
            raise ValueError("new_gallery_ids must be given with new_gallery and gallery_ids")
        rows = rows_of(new_gallery_ids, gallery_ids)
        if len(rows) < len(gallery):
            notes.append(
                f"new_gallery is a sample: all is measured on its {len(rows):,} of {len(gallery):,} gallery items."
            )
            if same_items:
                same_items, query_ids = False, as_values(gallery_ids, "gallery_ids")[: len(queries)]
        gallery, gallery_labels, gallery_ids, transformed_gallery, gallery_cameras = (
            take(side, rows) for side in (gallery, gallery_labels, gallery_ids, transformed_gallery, gallery_cameras)
        )
    given = {"new": queries, "old": old_queries}
    stored = {"old": gallery, "transformed_old": transformed_gallery, "new": new_gallery}
    calculator = CrossModelAccuracyCalculator(
        include=tuple(ALL_METRICS), k=k, device=device, knn_func=knn_func, fit_width=fit_width
    )
    ready = prepare(
        {name: rows for name, rows in given.items() if rows is not None},
        {name: rows for name, rows in stored.items() if rows is not None},
        (query_labels, gallery_labels),
        (query_ids, gallery_ids),
        (query_cameras, gallery_cameras),
        same_items=same_items,
        normalize=normalize,
        fit_width=fit_width,
        device=calculator.device,
    )
    ready.notes[:0] = notes
    depths = depths if knn_func is None else []
    found = _measure(ready, calculator, query_labels, rates, margin, orders, blend, depths, seed, normalize, progress)
    if groups is not None:
        found.groups = by_group(found, groups, lambda rows: verify_some(ready, rates, found, rows, fit_width))
    return found


def _measure(
    ready: Prepared,
    calculator: CrossModelAccuracyCalculator,
    query_labels: Any,
    rates: list[float],
    margin: float,
    orders: int,
    blend: QueryBlend | Literal[False] | None,
    depths: Sequence[int],
    seed: int,
    normalize: bool,
    progress: bool,
) -> Evaluation:
    queries, galleries, labels = ready.queries, ready.galleries, ready.labels
    widths = queries["new"].shape[1], galleries["old"].shape[1]
    meets = widths[0] == widths[1] or calculator.fit_width
    if widths[0] != widths[1]:
        rule = "the first coordinates of the queries" if widths[0] > widths[1] else "zeros after the queries"
        how = f"new/old is measured with {rule}" if meets else "new/old is not measured"
        ready.notes.append(f"New queries are {widths[0]} wide and the stored gallery {widths[1]}: {how}.")
    pairs = [(query, gallery) for query in ("old", "new") for gallery in galleries if query in queries]
    pairs = [
        (query, gallery)
        for query, gallery in pairs
        if (query, gallery) != ("old", "transformed_old") and (meets or (query == "new") == (gallery != "old"))
    ]
    starts = [name for name in galleries if name != "new" and ("new", name) in pairs] if "new" in galleries else []
    starts = starts if orders else []
    at_query_time = "old" in queries and normalize  # both rank by cosine
    blended = blended_queries(ready, blend, seed) if at_query_time and blend is not False else {}
    rankings = len(pairs) + len(blended) + len(starts) * orders * (_STEPS - 1)
    with tqdm(
        total=rankings * len(labels[0]), desc="ranking", unit="query", unit_scale=True, disable=not progress
    ) as bar:
        found = {
            f"{query}_to_{gallery}": _rank(calculator, queries[query], galleries[gallery], ready, bar)
            for query, gallery in pairs
        }
        found |= {f"{name}_to_old": _rank(calculator, q, galleries["old"], ready, bar) for name, q in blended.items()}
        if at_query_time and "new" in galleries and calculator.k is None:
            found |= two_stages(ready, depths)
        first = found["new_to_old" if ("new", "old") in pairs else "new_to_transformed_old"]
        scored = ~first["precision_at_1"].isnan()
        if not scored.any():
            raise ValueError(
                "query_cameras and gallery_cameras must leave a query a right item from another camera, they leave "
                "none; leave the cameras out, or give a gallery with items from other cameras"
                if "query_cameras" in ready.codes
                else "gallery must hold a right item besides each query's own, it holds none"
            )
        backfill = {start: _backfill(ready, calculator, start, found, orders, seed, bar) for start in starts}
        items: dict[str, Any] = {name: value for name, value in ready.codes.items() if name.endswith("_ids")}
        criterion = None
        if "old" in queries and meets:
            criterion = pair_criterion(
                queries["old"], queries["new"], labels[0], galleries["old"], labels[1], fit_width=True, **items
            )
        verified = verify(ready, rates, items, pairs, calculator.fit_width) if rates else None
    if not scored.all():
        n_lone = int((~scored).sum())
        ready.notes.append(f"{n_lone:,} queries have no item of their label in the gallery and do not count.")
    return Evaluation(
        data={
            "queries": len(labels[0]),
            "scored_queries": int(scored.sum()),
            "gallery": len(labels[1]),
            "classes": len(labels[1].unique()),
            "widths": {"queries": widths[0], "gallery": widths[1]},
            "files": {},
            "normalized": normalize,
            "same_items": ready.how,
            "cameras": "query_cameras" in ready.codes,
            "k": calculator.k,
            "seed": seed,
            "chance": chance(ready, scored),
            "margin": margin,
        },
        labels=query_labels,
        gallery_size=len(labels[1]),
        pairs={pair: found[pair] for pair in sorted(found, key=_place)},
        backfill=backfill,
        criterion=criterion,
        verification=verified,
        notes=ready.notes,
        suspicions=ready.suspicions,
        seed=seed,
        margin=margin,
    )


def _place(pair: str) -> tuple[int, int]:
    """Return where a pair stands in tables."""
    if pair.startswith(TWO_STAGES):
        return len(PAIR_NAMES), int(pair.removeprefix(TWO_STAGES))
    return list(PAIR_NAMES).index(pair), 0


def count_rankings(given: dict[str, Any], orders: int = 5) -> int:
    """Return how often the queries are ranked, for the arguments of :func:`evaluate`."""
    starts = 1 + (given["transformed_gallery"] is not None)
    new = given["new_gallery"] is not None
    pairs = starts + new + (given["old_queries"] is not None) * (1 + 3 * new)
    return pairs + new * starts * orders * (_STEPS - 1)


def _rank(
    calculator: CrossModelAccuracyCalculator, query: torch.Tensor, gallery: torch.Tensor, ready: Prepared, bar: tqdm
) -> dict[str, torch.Tensor]:
    """Return per-query metrics, block of queries by block of queries."""
    blocks = []
    for start in range(0, len(query), _BLOCK):
        rows = slice(start, start + _BLOCK)
        own: dict[str, Any] = {
            name: value[rows] if name.startswith("query_") else value for name, value in ready.codes.items()
        }
        labels = ready.labels[0][rows], ready.labels[1]
        blocks.append(calculator.get_per_query_accuracy(query[rows], labels[0], gallery, labels[1], **own))
        bar.update(len(query[rows]))
    return {metric: torch.cat([block[metric] for block in blocks]) for metric in blocks[0]}


def _backfill(
    ready: Prepared,
    calculator: CrossModelAccuracyCalculator,
    start: str,
    found: dict[str, dict[str, torch.Tensor]],
    orders: int,
    seed: int,
    bar: tqdm,
) -> Backfill:
    """Replace the gallery in several random orders; both ends are measured already."""
    query, old, new = ready.queries["new"], ready.galleries[start], ready.galleries["new"]
    fractions = tuple(step / _STEPS for step in range(_STEPS + 1))
    vectors = tuple(int(fraction * len(old) + 1e-6) for fraction in fractions)
    ends = ({metric: found[pair][metric] for metric in METRICS} for pair in (f"new_to_{start}", "new_to_new"))
    first, last = ends
    metrics = copy.copy(calculator)
    metrics.original_function_dict = calculator.get_function_dict(tuple(METRICS))
    repeats = []
    codes: dict[str, Any] = ready.codes
    for turn in range(orders):
        order = torch.randperm(len(old), generator=torch.Generator().manual_seed(seed + turn))
        given = metrics, query, ready.labels[0], old, new, ready.labels[1], order, vectors[1:-1]
        steps = [first]
        for step in mixed_accuracy(*given, per_query=True, **codes):
            steps.append(step)
            bar.update(len(query))
        repeats.append([*steps, last])
    return Backfill("random", fractions, vectors, repeats[0], repeats)
