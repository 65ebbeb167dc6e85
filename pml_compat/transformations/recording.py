"""What a transformation does with its inputs, as the steps of a small program for the NumPy form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .numpy_form import FORMAT

if TYPE_CHECKING:
    from .base import Transformation


def record(transformation: Transformation, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run ``transform`` once on stand-ins for its inputs; return the program and the weights that it names."""
    recording = _Recording(dtype)
    stand_ins: list[Any] = [_Rows(recording, "embeddings", transformation.in_features), None]
    if transformation.side_features is not None:
        stand_ins[1] = _Rows(recording, "side_info", transformation.side_features)
    try:
        output = transformation.transform(*stand_ins)
    except TypeError as error:  # it has run on tensors, so what it does not take is the stand-in
        raise _not_known(f"something else ({error})") from error
    if not isinstance(output, _Rows):
        raise _not_known("no embeddings")
    program = {
        "format": FORMAT,
        "in_features": transformation.in_features,
        "out_features": transformation.out_features,
        "side_features": transformation.side_features,
        "dtype": str(dtype).removeprefix("torch."),
        "steps": recording.steps,
        "output": output.name,
    }
    return program, recording.weights


class _Recording:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.steps: list[dict[str, Any]] = []
        self.weights: dict[str, np.ndarray] = {}

    def step(self, op: str, inputs: Sequence[Any], width: int, **options: int) -> _Rows:
        names = [self.name_of(value) for value in inputs]
        output = f"value{len(self.steps)}"
        self.steps.append({"op": op, "inputs": names, "output": output, "width": width, "options": options})
        return _Rows(self, output, width)

    def name_of(self, value: Any) -> str:
        if isinstance(value, _Rows):
            return value.name
        name = f"weight{len(self.weights)}"
        self.weights[name] = torch.as_tensor(value, dtype=self.dtype).detach().numpy()
        return name


class _Rows:
    """Stands for an ``(N, width)`` tensor: what torch or Python is asked to do with it becomes a step.

    What a transformation computes from its weights alone is no concern of it: that is computed once, by torch.
    """

    def __init__(self, recording: _Recording, name: str, width: int) -> None:
        self.recording, self.name, self.width = recording, name, width

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        if name not in _OPERATIONS:
            raise _not_known(name)
        return _OPERATIONS[name](*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in _OPERATIONS:
            raise _not_known(name)
        return partial(_OPERATIONS[name], self)

    def dim(self) -> int:
        return 2

    def __add__(self, other: Any) -> _Rows:
        return _elementwise("add", self, other)

    def __radd__(self, other: Any) -> _Rows:
        return _elementwise("add", other, self)

    def __sub__(self, other: Any) -> _Rows:
        return _elementwise("sub", self, other)

    def __rsub__(self, other: Any) -> _Rows:
        return _elementwise("sub", other, self)

    def __mul__(self, other: Any) -> _Rows:
        return _elementwise("mul", self, other)

    def __rmul__(self, other: Any) -> _Rows:
        return _elementwise("mul", other, self)

    def __matmul__(self, matrix: torch.Tensor) -> _Rows:
        return _matmul(self, matrix)

    def __getitem__(self, key: Any) -> _Rows:
        rows, columns = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        if rows != slice(None) or not isinstance(columns, slice) or columns.step not in (None, 1):
            raise _not_known(f"[{key}]")
        start, stop, _ = columns.indices(self.width)
        return self.recording.step("slice", [self], max(0, stop - start), start=start, stop=stop)


# What the stand-ins take, under the names and with the arguments of torch's functions and methods.


def _elementwise(op: str, first: Any, second: Any) -> _Rows:
    widths = [
        value.width if isinstance(value, _Rows) else [1, *torch.as_tensor(value).shape][-1] for value in (first, second)
    ]
    recording = first.recording if isinstance(first, _Rows) else second.recording
    return recording.step(op, [first, second], max(widths))


def _matmul(rows: Any, matrix: torch.Tensor) -> _Rows:
    if not isinstance(matrix, torch.Tensor) or matrix.ndim != 2:
        raise _not_known("a matmul with anything but a matrix of weights on the right")
    return rows.recording.step("matmul", [rows, matrix], matrix.shape[1])


def _linear(rows: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> _Rows:
    product = _matmul(rows, weight.t())
    return product if bias is None else product + bias


def _batch_norm(
    rows: Any, mean: Any, variance: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> _Rows:
    if training:
        raise _not_known("batch normalisation without running statistics")
    scale = torch.rsqrt(variance + eps) * (1 if weight is None else weight)
    return rows * scale + ((0 if bias is None else bias) - mean * scale)


def _relu(rows: Any, inplace: bool = False) -> _Rows:
    return rows.recording.step("relu", [rows], rows.width)


def _prelu(rows: Any, slope: torch.Tensor) -> _Rows:
    return rows.recording.step("prelu", [rows, slope], rows.width)


def _dropout(rows: Any, p: float, training: bool, inplace: bool) -> _Rows:
    if training:
        raise _not_known("dropout in training mode")
    return rows


def _cat(parts: Sequence[Any], dim: int = 0) -> _Rows:
    _check_columns("cat", dim)
    if not all(isinstance(part, _Rows) for part in parts):
        raise _not_known("cat with a weight")
    return parts[0].recording.step("cat", parts, sum(part.width for part in parts))


def _split(rows: Any, widths: int | Sequence[int], dim: int = 0) -> list[_Rows]:
    _check_columns("split", dim)
    if isinstance(widths, int):
        widths = [widths] * math.ceil(rows.width / widths)
    return [rows[:, end - width : end] for width, end in zip(widths, itertools.accumulate(widths), strict=True)]


def _check_columns(name: str, dim: int) -> None:
    if dim not in (1, -1):
        raise _not_known(f"{name} along dim {dim}")


def _not_known(what: str) -> ValueError:
    return ValueError(
        f"transformation must be made of {', '.join(_OPERATIONS)} and slices of columns, this one uses {what}; "
        "a .pt2 file takes any"
    )


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "matmul": _matmul,
    "batch_norm": _batch_norm,
    "relu": _relu,
    "prelu": _prelu,
    "dropout": _dropout,
    "add": partial(_elementwise, "add"),
    "sub": partial(_elementwise, "sub"),
    "mul": partial(_elementwise, "mul"),
    "cat": _cat,
    "split": _split,
}
