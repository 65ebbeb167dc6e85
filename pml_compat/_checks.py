"""Checks of what comes in, made once at the public edge.

Every error names the argument, the rule, the value received and, where it is known, the fix.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ._rows import precise_dtype


class _Reads(threading.local):
    """What one call of a loss asks the device for."""

    def __init__(self) -> None:
        self.pending: list[tuple[Sequence[torch.Tensor], Callable[..., None]]] | None = None
        self.known = False
        self.counts: dict[tuple[int, str], int] = {}


_reads = _Reads()


@contextmanager
def one_read() -> Iterator[None]:
    """Ask the device once, at the end, for all values that are checked or counted inside."""
    if _reads.known or _reads.pending is not None:
        yield
        return
    pending = _reads.pending = []
    try:
        yield
    finally:
        _reads.pending = None
    if not pending:
        return
    numbers = [number for asked, _ in pending for number in asked]
    device = next((number.device for number in numbers if number.device.type != "cpu"), numbers[0].device)
    found = iter(torch.stack([number.to(device) for number in numbers]).tolist())
    for asked, judge in pending:
        judge(*[next(found) for _ in asked])


@contextmanager
def values_known() -> Iterator[None]:
    """Take values for checked, as a loss may that checked all it was given: nothing is read back inside."""
    outer = _reads.known
    _reads.known = True
    try:
        yield
    finally:
        _reads.known = outer
        if not outer:
            _reads.counts.clear()


def check_values(numbers: Sequence[torch.Tensor], judge: Callable[..., None]) -> None:
    """Have ``judge`` raise what is wrong with 0-dimensional tensors, which it gets as numbers of Python.

    At once, or inside :func:`one_read` at its end. Not where values are known, and not inside ``torch.compile``: to
    read a value there would cut the graph in two.
    """
    if values_are_known() or any(number.is_meta for number in numbers):
        return
    if _reads.pending is not None:
        _reads.pending.append((numbers, judge))
    else:
        judge(*torch.stack(list(numbers)).tolist())


def values_are_known() -> bool:
    """Tell whether values are not to be read."""
    return torch.compiler.is_compiling() or _reads.known


def count_rows(owner: Any, mask: torch.Tensor, which: str = "") -> None:
    """Ask, inside :func:`one_read`, how many rows ``owner`` will be asked for by :func:`rows_where`.

    ``which`` tells several counts of one owner apart.
    """
    check_values([mask.sum()], lambda count: _reads.counts.__setitem__((id(owner), which), int(count)))


def counted_rows(owner: Any, which: str = "") -> int | None:
    """Return how many rows were counted for ``owner`` by :func:`count_rows`; None where they were not."""
    return None if torch.compiler.is_compiling() else _reads.counts.get((id(owner), which))


def rows_where(owner: Any, mask: torch.Tensor) -> torch.Tensor:
    """Return the indices at which ``mask`` is True, ``(n,)``, without asking the device where they were counted."""
    count = counted_rows(owner)
    if count is None:
        return mask.nonzero()[:, 0]
    if count == len(mask):
        return torch.arange(count, device=mask.device)
    return torch.argsort(mask, descending=True, stable=True)[:count]


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


def check_square(value: Any, name: str, width: int) -> torch.Tensor:
    """Return ``value`` as a finite, floating-point ``(width, width)`` tensor without a gradient."""
    square = check_embeddings(value, name, width).detach()
    if len(square) != width:
        raise ValueError(f"{name} must be square, ({width}, {width}), got shape {tuple(square.shape)}")
    return square


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


def check_finite(values: torch.Tensor, name: str, first_row: int = 0, places: torch.Tensor | None = None) -> None:
    """Raise a ValueError that names the first row of ``values`` with a NaN or an infinity.

    ``first_row`` is the place of ``values[0]`` in what they are a part of, ``places`` that of each row.

    It looks at values where :func:`check_values` does.
    """
    if values_are_known():
        return
    values = values.detach()

    def judge(total: float) -> None:
        if math.isfinite(total):  # one pass; the sum of large numbers may be infinite all the same
            return
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            row = int((~finite).reshape(len(values), -1).any(1).nonzero()[0])
            row = first_row + row if places is None else int(places[row])
            raise ValueError(
                f"{name} must be finite, row {row} has a NaN or an infinity; "
                "look for a diverged training, a division by zero or a broken file"
            )

    # float32: it is read beside counts, and a sum of float16 overflows early.
    check_values([values.sum(dtype=precise_dtype(values.dtype))], judge)


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


def stored_rows(array: Any, index: torch.Tensor, name: str) -> torch.Tensor:
    """Return the rows ``index``, in their dtype, where they are stored; a NaN or an infinity is an error."""
    if isinstance(array, np.ndarray):  # fancy indexing copies, so that a read-only memory map is only read
        rows = as_tensor(np.asarray(array[index.numpy()]), name)
    elif isinstance(array, torch.Tensor):
        rows = array.detach()[index.to(array.device)]
    else:
        rows = as_tensor(array[index], name)
    check_finite(rows, name, places=index)
    return rows
