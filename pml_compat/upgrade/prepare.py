"""The arrays of an evaluation, checked, lined up and made ready to be ranked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .._checks import check_rows
from ..accuracy.items import as_values, check_one_label, codes, item_codes, pair_of_codes

_MANY = 0.5  # share of the queries that are bitwise in the gallery, from which on they are the same items


@dataclass
class Prepared:
    """What is ranked: on one device, of unit length unless asked otherwise.

    Args:
        queries: model (``new``, ``old``) to ``(Q, D)``.
        galleries: gallery (``old``, ``transformed_old``, ``new``) to ``(N, D)``.
        labels: codes of the labels, ``(Q,)`` and ``(N,)``.
        codes: ids and cameras for the calculator.
        how: how the same items are told: ``"position"``, ``"id"`` or None.
        notes: what a reader should know, a sentence each.
        suspicions: what cannot be right about the input, a sentence each.
    """

    queries: dict[str, torch.Tensor]
    galleries: dict[str, torch.Tensor]
    labels: tuple[torch.Tensor, torch.Tensor]
    codes: dict[str, torch.Tensor] = field(default_factory=dict)
    how: str | None = None
    notes: list[str] = field(default_factory=list)
    suspicions: list[str] = field(default_factory=list)


def prepare(
    queries: dict[str, Any],
    galleries: dict[str, Any],
    labels: tuple[Any, Any],
    ids: tuple[Any, Any],
    cameras: tuple[Any, Any],
    *,
    same_items: bool,
    normalize: bool,
    fit_width: bool,
    device: Any,
) -> Prepared:
    """Check the arrays; the names of queries and galleries are those of :class:`Prepared`."""
    raw_queries = {name: check_rows(rows, _NAMES["queries", name]) for name, rows in queries.items()}
    raw_galleries = {name: check_rows(rows, _NAMES["galleries", name]) for name, rows in galleries.items()}
    _check_shapes(raw_queries, raw_galleries, fit_width)
    sizes = len(raw_queries["new"]), len(raw_galleries["old"])
    label_codes = codes(*labels, ("query_labels", "gallery_labels"), sizes)
    if not torch.isin(label_codes[0], label_codes[1]).any():
        raise ValueError("gallery must hold items with the labels of queries, it has none of them")
    found = Prepared({}, {}, label_codes)
    if same_items:
        items = item_codes(label_codes, True, None, None, sizes)
        found.how = "position"
    else:
        one_side = sum(side is None for side in ids) == 1
        items = None if one_side else item_codes(label_codes, False, *ids, sizes)
        if items is not None:
            check_one_label(label_codes, items, ids[0])
            found.how = "id"
        elif one_side:
            found.notes.append("Only one of queries and gallery has ids; no item is left out of a ranking by them.")
    if items is None:
        _check_not_the_same(raw_queries, raw_galleries)
        if sizes[1] >= sizes[0] and torch.equal(label_codes[0], label_codes[1][: sizes[0]]):
            found.notes.append(
                "Queries and gallery have the same labels row by row. If they are the same items, every query found "
                "itself: give same_items=True (--same-items)."
            )
    else:
        found.codes |= {"query_ids": items[0], "reference_ids": items[1]}
    pair = pair_of_codes(*cameras, "cameras", sizes)
    if pair is not None:
        found.codes |= {"query_cameras": pair[0], "reference_cameras": pair[1]}
    _look_at(raw_queries, raw_galleries, found)
    place = torch.device(device) if device is not None else None
    found.queries = {name: _ready(rows, normalize, place) for name, rows in raw_queries.items()}
    found.galleries = {name: _ready(rows, normalize, place) for name, rows in raw_galleries.items()}
    return found


_NAMES = {
    ("queries", "new"): "queries",
    ("queries", "old"): "old_queries",
    ("galleries", "old"): "gallery",
    ("galleries", "transformed_old"): "transformed_gallery",
    ("galleries", "new"): "new_gallery",
}


def _check_shapes(queries: dict[str, torch.Tensor], galleries: dict[str, torch.Tensor], fit_width: bool) -> None:
    new, old = queries["new"], galleries["old"]
    for name, rows, count, width in (
        ("old_queries", queries.get("old"), len(new), old.shape[1]),
        ("new_gallery", galleries.get("new"), len(old), new.shape[1]),
        ("transformed_gallery", galleries.get("transformed_old"), len(old), new.shape[1]),
    ):
        if rows is None:
            continue
        beside, model = ("queries", "gallery") if name == "old_queries" else ("gallery", "queries")
        if len(rows) != count:
            raise ValueError(f"{name} must have the items of {beside}: expected {count} rows, got {len(rows)}")
        if rows.shape[1] != width:
            raise ValueError(
                f"{name} must be as wide as {model}, which it is compared with: expected {width}, got {rows.shape[1]}"
            )
    if new.shape[1] != old.shape[1] and not fit_width and "transformed_old" not in galleries:
        raise ValueError(
            f"queries must be as wide as gallery, got widths {new.shape[1]} and {old.shape[1]}; give "
            "transformed_gallery (--transformation), or, where the new model was trained to serve the old gallery with "
            "its first coordinates (as BCT does), fit_width=True (--fit-width)"
        )


def _check_not_the_same(queries: dict[str, torch.Tensor], galleries: dict[str, torch.Tensor]) -> None:
    """Raise a ValueError where queries are found bit by bit in a gallery of their own model, and no one said so."""
    for model in ("old", "new"):
        if model in queries and model in galleries:
            query, gallery = queries[model], galleries[model]
            filled = (query != 0).any(1)
            share = float(torch.from_numpy(_in(query, gallery))[filled].double().mean()) if filled.any() else 0.0
            if share >= _MANY:
                n_rows = min(len(query), len(gallery))
                in_place = bool((query[:n_rows] == gallery[:n_rows]).all(1).double().mean() >= _MANY)
                fix = "same_items=True (--same-items)" if in_place else "query_ids and gallery_ids"
                raise ValueError(
                    f"queries must not be gallery items, {share:.0%} of the {model} model's are, bit by bit, so that "
                    f"each would find itself; give {fix}"
                )


def _in(rows: torch.Tensor, others: torch.Tensor) -> np.ndarray:
    """Tell which rows are among the others, bit by bit."""
    if rows.dtype != others.dtype or rows.shape[1] != others.shape[1]:
        return np.zeros(len(rows), dtype=bool)
    as_bytes = [
        np.ascontiguousarray(side.cpu().view(torch.uint8).numpy()).view(f"V{side.shape[1] * side.element_size()}")[:, 0]
        for side in (rows, others)
    ]
    known = {row.tobytes() for row in as_bytes[1]}
    return np.array([row.tobytes() in known for row in as_bytes[0]])


def _look_at(queries: dict[str, torch.Tensor], galleries: dict[str, torch.Tensor], found: Prepared) -> None:
    """Note rows of zeros, and what cannot be right about two models' embeddings of the same items."""
    named = {("queries", n): rows for n, rows in queries.items()} | {("galleries", n): r for n, r in galleries.items()}
    for key, rows in named.items():
        empty = int((rows == 0).all(1).sum())
        if empty:
            found.notes.append(
                f"{empty:,} of {len(rows):,} rows of {_NAMES[key]} are all zeros: they are like nothing, and count as "
                "wrong answers. Look for images that failed to load."
            )
    for name, sides in (("queries", queries), ("gallery", galleries)):
        if "old" in sides and "new" in sides and sides["old"].shape == sides["new"].shape:
            filled = (sides["old"] != 0).any(1)
            same = int(((sides["old"] == sides["new"]).all(1) & filled).sum())
            if same:
                found.suspicions.append(
                    f"{same:,} of {len(sides['old']):,} rows of the old and the new {name} are the same, bit by bit: "
                    "one model's embeddings stand where the other's should."
                )


def _ready(rows: torch.Tensor, normalize: bool, device: torch.device | None) -> torch.Tensor:
    """Return rows in float32 or float64, of length 1 unless asked otherwise, however large or small they were."""
    rows = rows.detach()
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    if normalize:
        largest = rows.abs().amax(1, keepdim=True)
        rows = torch.nn.functional.normalize(rows / torch.where(largest > 0, largest, 1.0), dim=1)
    return rows if device is None else rows.to(device)


def chance(ready: Prepared, scored: torch.Tensor) -> float:
    """Return the P@1 of a random ranking, in which a query's own item is not."""
    labels = ready.labels
    known = labels[1][labels[1] >= 0]
    counts = torch.bincount(known, minlength=int(labels[0].max()) + 1)[labels[0][scored].clamp_min(0)].double()
    itself = torch.zeros(len(counts), dtype=torch.float64)
    if "query_ids" in ready.codes:
        itself += torch.isin(ready.codes["query_ids"], ready.codes["reference_ids"])[scored]
    return float(((counts - itself) / (len(labels[1]) - itself)).mean())


def rows_of(ids: Any, gallery_ids: Any) -> np.ndarray:
    """Return the gallery row of each id."""
    places = {value: row for row, value in enumerate(as_values(gallery_ids, "gallery_ids").tolist())}
    wanted = as_values(ids, "new_gallery_ids").tolist()
    missing = [value for value in wanted if value not in places]
    if missing or len(set(wanted)) < len(wanted):
        what = f"{missing[0]!r} is not" if missing else "one is there twice"
        raise ValueError(f"new_gallery_ids must be among gallery_ids, each once: {what}")
    return np.array([places[value] for value in wanted])


def take(side: Any, rows: np.ndarray) -> Any:
    """Return some rows of embeddings, labels, ids or cameras, if there are any."""
    if side is None:
        return None
    if isinstance(side, torch.Tensor):
        return side[torch.from_numpy(rows).to(side.device)]
    return side[rows] if isinstance(side, np.ndarray) else as_values(side, "gallery_labels")[rows]
