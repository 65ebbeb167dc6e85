"""Accuracy on a gallery of which more and more rows are replaced by new ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .._rows import fit_width
from .calculator import CrossModelAccuracyCalculator, _exact_search
from .items import as_values
from .mixed_ranks import can_mix, mixed_ranks
from .named_metrics import add_scores, is_ranked, places, without_lone


def mixed_accuracy(
    calculator: CrossModelAccuracyCalculator,
    query: torch.Tensor,
    query_labels: Any,
    old: torch.Tensor,
    new: torch.Tensor,
    gallery_labels: Any,
    rows: torch.Tensor,
    counts: Sequence[int],
    *,
    per_query: bool = False,
    **kwargs: Any,
) -> Iterator[dict[str, Any]]:
    """Yield the accuracy at each step: all from two products where loops are compiled, else from one a step.

    Args:
        calculator: what measures.
        query: ``(Q, D_new)``.
        query_labels: ``(Q,)``.
        old: ``(N, D_old)``.
        new: ``(N, D_new)``; the narrower embeddings end in zeros.
        gallery_labels: ``(N,)``.
        rows: ``(N,)`` gallery rows, the first to be replaced first; on the CPU.
        counts: how many rows are new at each step, ascending.
        per_query: yield what ``get_per_query_accuracy`` returns, not ``get_accuracy``.
        **kwargs: for either of the two.
    """
    width = max(old.shape[1], new.shape[1])
    query, old, new = (fit_width(side, width) for side in (query, old, new))
    if _is_plain(calculator) and len(counts) > 2 and not set(kwargs) & {"include", "exclude", "junk"}:
        search = calculator._search(*_arguments(query, query_labels, old, gallery_labels, kwargs))
        if search.reference.device.type == "cpu" and can_mix(search.query, search.reference, search.positives):
            given = query, query_labels, old, new, gallery_labels, rows, counts
            yield from _from_two_products(calculator, *given, per_query, kwargs)
            return
    measure = calculator.get_per_query_accuracy if per_query else calculator.get_accuracy
    gallery = old.to(torch.promote_types(old.dtype, new.dtype), copy=True)
    done = 0
    for until in counts:
        replaced = rows[done:until]
        gallery[replaced.to(gallery.device)] = new[replaced.to(new.device)].to(gallery)
        done = until
        yield measure(query, query_labels, gallery, gallery_labels, **kwargs)


def _is_plain(calculator: CrossModelAccuracyCalculator) -> bool:
    """Tell whether the calculator measures ranking metrics alone, as it comes."""
    names = set(calculator.get_function_dict())
    plain = type(calculator) is CrossModelAccuracyCalculator and calculator.gallery_group is None
    return plain and all(is_ranked(name) for name in names) and calculator.knn_func is _exact_search


def _arguments(
    query: Any, query_labels: Any, gallery: Any, gallery_labels: Any, kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Return what a search takes, in order."""
    names = ("query_ids", "reference_ids", "query_cameras", "reference_cameras")
    others = (kwargs.get(name) for name in names)
    return query, query_labels, gallery, gallery_labels, kwargs.get("ref_includes_query", False), *others


def _from_two_products(
    calculator: CrossModelAccuracyCalculator,
    query: torch.Tensor,
    query_labels: Any,
    old: torch.Tensor,
    new: torch.Tensor,
    gallery_labels: Any,
    rows: torch.Tensor,
    counts: Sequence[int],
    per_query: bool,
    kwargs: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    kwargs = {
        name: as_values(value, name)[rows.numpy()] if name.startswith("reference_") and value is not None else value
        for name, value in kwargs.items()
    }
    if kwargs.get("ref_includes_query"):
        kwargs |= {"ref_includes_query": False, "query_ids": torch.arange(len(query)), "reference_ids": rows}
    labels = as_values(gallery_labels, "gallery_labels")[rows.numpy()]
    search = calculator._search(*_arguments(query, query_labels, old[rows.to(old.device)], labels, kwargs))
    functions = calculator.get_function_dict()
    k = calculator._cut_off(search)
    new = new[rows.to(new.device)].to(search.reference.device)
    steps: list[dict[str, torch.Tensor]] = [{} for _ in counts]
    given = search.query, search.reference, new, search.positives, search.excluded, counts, sorted(places(functions, k))
    for step, numbers, ranks in mixed_ranks(*given):
        add_scores(steps[step], numbers, ranks, functions, k, len(query))
    for scores in steps:
        if per_query:
            yield without_lone(scores, functions)
        else:
            yield calculator._get_accuracy(functions, query_labels=search.query_labels, per_query=scores)
