"""Checks of what comes in, made once at the public edge.

Every error names the argument, the rule, the value received and, where it is known, the fix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def as_tensor(value: Any, name: str) -> torch.Tensor:
    """Return ``value`` (a tensor or a NumPy array) as a tensor, without a copy where that is possible."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        value = native(value)
        if not value.flags.writeable:  # a read-only memory map: torch cannot borrow it silently
            value = value.copy()
        try:
            return torch.from_numpy(value)
        except TypeError:
            raise ValueError(f"{name} must be numbers, got an array of {value.dtype}") from None
    raise ValueError(f"{name} must be a torch.Tensor or a numpy.ndarray, got {type(value).__name__}")


def native(array: np.ndarray) -> np.ndarray:
    """Return ``array`` in a form that torch can borrow: this machine's byte order, no step backwards."""
    if not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array.copy() if any(step < 0 for step in array.strides) else array


def check_embeddings(value: Any, name: str = "embeddings", width: int | None = None) -> torch.Tensor:
    """Return ``value`` as a non-empty, finite, floating-point ``(N, D)`` tensor.

    Raises:
        ValueError: not 2-dimensional, no rows or columns, not floating point, NaN or infinite, or ``D != width``.
    """
    embeddings = check_matrix(value, name, width)
    check_finite(embeddings, name)
    return embeddings


def check_matrix(value: Any, name: str = "embeddings", width: int | None = None) -> torch.Tensor:
    """:func:`check_embeddings` without the pass over the values."""
    matrix = as_tensor(value, name)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must be 2-dimensional, (N, D), got shape {tuple(matrix.shape)}")
    if 0 in matrix.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {matrix.dtype}; convert them with .float()")
    if width is not None and matrix.shape[1] != width:
        raise ValueError(f"{name} must be {width} wide, got width {matrix.shape[1]}")
    return matrix


def check_rows(value: Any, name: str = "embeddings", width: int | None = None) -> torch.Tensor:
    """:func:`check_embeddings` of floats or whole numbers (codes, quantised vectors), which become floats, exactly."""
    rows = as_tensor(value, name)
    if not rows.is_floating_point() and not rows.is_complex():
        small = rows.dtype in (torch.bool, torch.int8, torch.uint8, torch.int16)
        rows = rows.to(torch.float32 if small else torch.float64)
    return check_embeddings(rows, name, width)


def check_finite(values: torch.Tensor, name: str, first_row: int = 0) -> None:
    """Raise a ValueError that names the first row of ``values`` with a NaN or an infinity.

    ``first_row`` is the place of ``values[0]`` in what they are a part of.

    Not inside ``torch.compile``: to read a value there would cut the graph in two.
    """
    if torch.compiler.is_compiling():
        return
    if bool(torch.isfinite(values.sum())):  # one pass; the sum of large numbers may be infinite all the same
        return
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        row = first_row + int((~finite).reshape(len(values), -1).any(1).nonzero()[0])
        raise ValueError(
            f"{name} must be finite, row {row} has a NaN or an infinity; "
            "look for a diverged training, a division by zero or a broken file"
        )


def check_labels(value: Any, name: str = "labels", length: int | None = None) -> torch.Tensor:
    """Return ``value`` as an int64 ``(N,)`` tensor.

    Raises:
        ValueError: missing, not 1-dimensional, not of an integer type, or not ``length`` long.
    """
    if value is None:
        raise ValueError(f"{name} must be given, got None")
    labels = as_tensor(value, name)
    if labels.ndim != 1:
        raise ValueError(f"{name} must be 1-dimensional, (N,), got shape {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {labels.dtype}; convert them with .long()")
    if length is not None and len(labels) != length:
        raise ValueError(f"{name} must have one entry a row: expected {length}, got {len(labels)}")
    return labels.long()


def check_same_device(tensor: torch.Tensor, name: str, owner: torch.Tensor, owner_name: str) -> None:
    """Raise a ValueError where ``tensor`` is on another device than what it meets."""
    if tensor.device != owner.device:
        raise ValueError(
            f"{name} must be on the device of {owner_name}: got {tensor.device} and {owner.device}; "
            f"move {owner_name} with .to({str(tensor.device)!r})"
        )


def check_number(value: Any, name: str, *, minimum: float, exclusive: bool = False) -> float:
    """Return ``value`` as a float that is finite and at least (``exclusive``: above) ``minimum``."""
    rule = f"a finite number {'above' if exclusive else 'of at least'} {minimum:g}"
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be {rule}, got {value!r}") from None
    if not np.isfinite(number) or number < minimum or (exclusive and number == minimum):
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    return number


def check_integer(value: Any, name: str, *, minimum: int) -> int:
    """Return ``value`` as an int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return int(value)
