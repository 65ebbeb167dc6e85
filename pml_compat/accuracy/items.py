"""Which items are right and which are the same: labels, ids and cameras, compared by equality whatever their type.

Values become codes: equal values have one code of 0 or more, in the values' order. What is unknown (NaN, None, NaT)
equals nothing: its code is ``UNKNOWN_QUERY`` among the queries and ``UNKNOWN_ITEM`` in the gallery.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch

UNKNOWN_QUERY, UNKNOWN_ITEM = -1, -2
_ACCEPTED = "numbers (of any type and size), bools, strings or dates"


def codes(
    query: Any, reference: Any, names: tuple[str, str], sizes: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Number the values of ``(Q,)`` queries and an ``(N,)`` gallery: labels, ids or cameras.

    Numbers are compared exactly: an int64 of 2**60 + 1 is no float of 2**60. Bytes are text in UTF-8.

    Args:
        query: a tensor, an array or a sequence of numbers, bools, strings or dates.
        reference: the same, of one kind with ``query``.
        names: what to call them in error messages.
        sizes: ``Q`` and ``N``.
    Shape:
        - output: ``(Q,)`` and ``(N,)`` int64, on the CPU
    Raises:
        ValueError: missing, another shape, another type; kinds that can never be equal, such as text and numbers.
    Example:
        >>> codes(["b", None, "a"], ["a", "b", "c"], ("query_labels", "reference_labels"), (3, 3))
        (tensor([ 1, -1,  0]), tensor([0, 1, 2]))
    """
    sides, kinds, known = [], [], []
    for value, name, size in zip((query, reference), names, sizes, strict=True):
        array = as_values(value, name)
        if array.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), got {array.shape}")
        values, one_known, kind = _known(array, name)
        sides.append(values)
        known.append(one_known)
        kinds.append(kind)
    if None not in kinds and kinds[0] != kinds[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must be of one kind, got {kinds[0]} and {kinds[1]}, which are never equal; "
            "convert one of them"
        )
    numbers = _numbered([side for side, kind in zip(sides, kinds, strict=True) if kind is not None])
    out = []
    for one_known, unknown in zip(known, (UNKNOWN_QUERY, UNKNOWN_ITEM), strict=True):
        coded = np.full(len(one_known), unknown, dtype=np.int64)
        n_known = int(one_known.sum())
        coded[one_known], numbers = numbers[:n_known], numbers[n_known:]
        out.append(torch.from_numpy(coded))
    return out[0], out[1]


def pair_of_codes(
    query: Any, reference: Any, kind: str, sizes: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return :func:`codes` of ``query_<kind>`` and ``reference_<kind>``, or None where neither is given.

    Raises:
        ValueError: one of them alone; what :func:`codes` raises.
    """
    if query is None and reference is None:
        return None
    if query is None or reference is None:
        missing, given = ("query", "reference") if query is None else ("reference", "query")
        raise ValueError(f"{missing}_{kind} must be given with {given}_{kind}, got None")
    return codes(query, reference, (f"query_{kind}", f"reference_{kind}"), sizes)


def item_codes(
    labels: tuple[torch.Tensor, torch.Tensor] | None,
    ref_includes_query: bool,
    query_ids: Any,
    reference_ids: Any,
    sizes: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Number the items, so that a query and the gallery item that is the same have one number; None: all differ.

    Args:
        labels: codes of the labels, which the same item must have in common; None: they are not compared.
        ref_includes_query: row i of both is the same item.
        query_ids: ``(Q,)`` ids, which say the same for galleries in any order; a missing one is no item's. An id may
            stand for several items (the frames of a film), also of several labels; where every id is one item's, its
            label must be the same on both sides.
        reference_ids: ``(N,)``, with ``query_ids``.
        sizes: ``Q`` and ``N``.
    Raises:
        ValueError: ids beside ``ref_includes_query``; a gallery that is shorter than the queries; an item with two
            labels; what :func:`pair_of_codes` raises.
    """
    if not ref_includes_query:
        ids = pair_of_codes(query_ids, reference_ids, "ids", sizes)
        if ids is not None and labels is not None and _each_once(ids[0]) and _each_once(ids[1]):
            check_one_label(labels, ids, query_ids)
        return ids
    if query_ids is not None or reference_ids is not None:
        raise ValueError("ref_includes_query must be False where query_ids tell which items are the same")
    if sizes[1] < sizes[0]:
        raise ValueError(
            f"reference must hold every query with ref_includes_query=True, got {sizes[1]} rows for {sizes[0]} queries"
        )
    if labels is not None and not torch.equal(labels[0].clamp_min(-1), labels[1][: sizes[0]].clamp_min(-1)):
        raise ValueError(
            "reference_labels must begin with query_labels with ref_includes_query=True, as row i is the same item "
            "in both; where the order differs, pass query_ids and reference_ids"
        )
    return torch.arange(sizes[0]), torch.arange(sizes[1])


def as_values(value: Any, name: str) -> np.ndarray:
    """Return labels, ids or cameras as an array that keeps their values; a sequence becomes one of objects."""
    if value is None:
        raise ValueError(f"{name} must be given, got None")
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if hasattr(value, "__array__"):
        return np.asarray(value)
    out = np.empty(len(value), dtype=object)  # np.asarray would turn [1, "a"] into text
    out[:] = value
    return out


def _known(array: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Return the values that are known, which these are, and of what kind they are."""
    if array.dtype.kind not in "biufSUmM":
        array, known = _from_objects(array, name)
        kind = None if not len(array) else "text" if array.dtype.kind == "U" else "numbers"
        return array, known, kind if array.dtype.kind not in "mM" else "dates"
    known = np.ones(len(array), dtype=bool)
    if array.dtype.kind in "fmM":
        known = ~(np.isnan(array) if array.dtype.kind == "f" else np.isnat(array))
        array = array[known]
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    kind = {"U": "text", "m": "dates", "M": "dates"}.get(array.dtype.kind, "numbers")
    return array, known, kind if len(array) else None


def _from_objects(array: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    values = array.astype(object)
    missing = [value is None or bool(value is not value or _is_nan(value)) for value in values]
    known = ~np.array(missing, dtype=bool)
    found: list[Any] = [value.decode() if isinstance(value, bytes) else value for value in values[known]]
    if all(isinstance(value, str) for value in found):
        return np.array(found, dtype=str), known
    if all(isinstance(value, float | np.floating) for value in found):
        return np.array(found, dtype=np.float64), known
    if all(isinstance(value, bool | int | float | np.number | np.bool_) for value in found):
        try:
            return np.array([operator.index(value) for value in found], dtype=np.int64), known
        except (TypeError, OverflowError):  # floats among them, or beyond int64
            return np.array([value.item() if hasattr(value, "item") else value for value in found], dtype=object), known
    kinds = sorted({type(value).__name__ for value in found})
    if len(kinds) == 1 and kinds[0] == "UUID":
        return np.array([str(value) for value in found]), known
    raise ValueError(f"{name} must be {_ACCEPTED}, all of one kind, got {' and '.join(kinds)}")


def _is_nan(value: Any) -> bool:
    try:
        return bool(value != value)
    except TypeError:  # pandas.NA
        return True


def _numbered(sides: list[np.ndarray]) -> np.ndarray:
    """Return the place of each value among the distinct values of all sides, one side after the other."""
    if not sides:
        return np.zeros(0, dtype=np.int64)
    kinds = {side.dtype.kind for side in sides}
    if not kinds <= set("UmM") and len(kinds - {"b"}) > 1:
        sides = _exactly_comparable(sides)
    return np.unique(np.concatenate(sides), return_inverse=True)[1].astype(np.int64)


def _exactly_comparable(sides: list[np.ndarray]) -> list[np.ndarray]:
    """Return numbers of several types in one that holds each of them exactly: int64, or else Python's own."""
    out: list[np.ndarray] = []
    for side in sides:
        if side.dtype.kind == "f":
            whole = (side == np.floor(side)) & (np.abs(side) < 2.0**63)
            out.append(side.astype(np.int64 if whole.all() else object))
        elif side.dtype.kind == "u" and len(side) and side.max() >= 2**63:
            out.append(side.astype(object))
        else:
            out.append(side if side.dtype.kind == "O" else side.astype(np.int64))
    if any(side.dtype.kind == "O" for side in out):
        return [np.array(side.tolist(), dtype=object) for side in sides]
    return out


def check_one_label(
    labels: tuple[torch.Tensor, torch.Tensor], ids: tuple[torch.Tensor, torch.Tensor], query_ids: Any
) -> None:
    """Raise a ValueError that names an id that has one label among the queries and another in the gallery.

    Args:
        labels: codes of the labels.
        ids: codes of the ids.
        query_ids: the ids themselves.
    """
    order = torch.argsort(ids[1], stable=True)
    ordered = ids[1][order]
    place = torch.searchsorted(ordered, ids[0]).clamp_max(len(ordered) - 1)
    found = labels[1][order[place]]
    wrong = (ordered[place] == ids[0]) & (labels[0] != found) & (labels[0] >= 0) & (found >= 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        one = as_values(query_ids, "query_ids")[row : row + 1].tolist()[0]
        raise ValueError(
            f"query_ids and reference_ids must give an item one label, the item {one!r} has two ({int(wrong.sum())} "
            "such items); look for ids that mean something else in each file, or for a shifted column"
        )


def _each_once(numbers: torch.Tensor) -> bool:
    known = numbers[numbers >= 0]
    return len(known.unique()) == len(known)
