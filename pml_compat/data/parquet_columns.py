"""A Parquet column of embeddings as a matrix, however the program that wrote it stores vectors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

TAKEN = "lists of numbers, fixed-shape tensors, float32 as binary, or lists as JSON text"


def embedding_rows(column: Any, option: str, name: str) -> np.ndarray:
    """Return ``(N, D)`` numbers.

    Args:
        column: a ``pyarrow.ChunkedArray``.
        option: the command's option that named the file, for error messages.
        name: of the column.
    Raises:
        ValueError: a column of another type (the error names it), with nulls, or with vectors of several widths.
    """
    kind = str(column.type)
    lists = column.combine_chunks()
    if hasattr(lists.type, "storage_type"):  # an extension type: a fixed-shape tensor
        lists = lists.storage
    if lists.null_count:
        raise ValueError(f"{option} must have a vector in every row of the column {name}, got {lists.null_count} nulls")
    if lists.type in _binary_types():
        rows = [np.frombuffer(value, dtype="<f4") for value in lists.to_pylist()]
        return _stacked(rows, option)
    if str(lists.type) in ("string", "large_string"):
        try:
            rows = [np.asarray(json.loads(value), dtype=np.float32) for value in lists.to_pylist()]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{option} must have {TAKEN} in the column {name}, got text that is none") from error
        return _stacked(rows, option)
    if "list" not in str(lists.type) or not _of_numbers(lists.type.value_type):
        raise ValueError(f"{option} must have {TAKEN} in the column {name}, got {kind}")
    values = lists.flatten()
    if values.null_count:
        raise ValueError(f"{option} must have a number in every place of the column {name}, got nulls")
    flat = values.to_numpy(zero_copy_only=False)
    width = len(flat) // max(1, len(lists))
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    if (lengths != width).any():
        row = int((lengths != lengths[0]).argmax())
        raise ValueError(
            f"{option} must have embeddings of one width, got {int(lengths[0])} in row 0 and {int(lengths[row])} in "
            f"row {row}"
        )
    return flat.reshape(len(lists), width)


def _binary_types() -> tuple[Any, ...]:
    import pyarrow

    return pyarrow.binary(), pyarrow.large_binary()


def _of_numbers(kind: Any) -> bool:
    return any(str(kind).startswith(one) for one in ("int", "uint", "halffloat", "float", "double"))


def _stacked(rows: list[np.ndarray], option: str) -> np.ndarray:
    widths = [len(row) for row in rows]
    for place, width in enumerate(widths):
        if width != widths[0]:
            raise ValueError(
                f"{option} must have embeddings of one width, got {widths[0]} in row 0 and {width} in row {place}"
            )
    return np.stack(rows)
