"""A transformation without torch: this file, NumPy and an exported ``.npz`` file are all that a server needs.

Copy the file as it is; it imports nothing of the package that it comes from.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

FORMAT = "pml_compat.NumpyTransformation/1"


class NumpyTransformation:
    """Map embeddings with NumPy alone, like the transformation whose ``export`` wrote the file.

    The file is an ``.npz`` with the weights and, as JSON text, the steps of a small program; nothing is unpickled.
    Memory grows with the rows of a call: feed a gallery in batches of some thousand rows. Threads may share one object.

    Args:
        path: the ``.npz`` file that :meth:`Transformation.export` wrote.
    Shape:
        - embeddings ``(N, in_features)``; side_info ``(N, side_features)``, where the transformation takes it
        - output: ``(N, out_features)`` in the dtype of ``embeddings``, of any length: normalise where it matters
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a truncated file, or one of something else; in a call: not 2-dimensional, empty, not floating
            point, another width or number of rows, side-information missing or not asked for.
    Example:
        >>> import tempfile
        >>> from pml_compat.transformations import LinearTransformation
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LinearTransformation(3, 2).export(f"{folder}/old_to_new.npz")
        ...     transformation = NumpyTransformation(f"{folder}/old_to_new.npz")
        >>> transformation(np.array([[1.0, 2.0, 3.0]], dtype=np.float32))
        array([[1., 2.]], dtype=float32)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        program, self._weights = _read(path)
        self.in_features: int = program["in_features"]
        self.out_features: int = program["out_features"]
        self.side_features: int | None = program["side_features"]
        self.dtype = np.dtype(program["dtype"])
        self._steps = _plan(program["steps"], program["output"])
        self._output: str = program["output"]

    def __call__(self, embeddings: Any, side_info: Any = None) -> np.ndarray:
        """Map ``(N, in_features)`` embeddings to ``(N, out_features)``."""
        embeddings = _check(embeddings, "embeddings", self.in_features)
        values = {**self._weights, "embeddings": embeddings.astype(self.dtype, copy=False)}
        if (side_info is None) != (self.side_features is None):
            wanted = "None" if self.side_features is None else f"given, (N, {self.side_features})"
            got = "None" if side_info is None else f"shape {np.shape(side_info)}"
            raise ValueError(f"side_info must be {wanted} for this transformation, got {got}")
        if self.side_features is not None:
            side_info = _check(side_info, "side_info", self.side_features)
            if len(side_info) != len(embeddings):
                raise ValueError(
                    f"side_info must have one row an embedding: expected {len(embeddings)}, got {len(side_info)}"
                )
            values["side_info"] = side_info.astype(self.dtype, copy=False)
        for step in self._steps:
            inputs = [values.pop(name) if name in step.last_read else values[name] for name in step.inputs]
            out = None if step.spare is None else inputs[step.spare]
            values[step.output] = step.operation(out, *inputs)
        return values[self._output].astype(embeddings.dtype, copy=False)


class _Step(NamedTuple):
    operation: Callable[..., np.ndarray]
    inputs: list[str]
    output: str
    last_read: set[str]  # inputs that no other step reads: their memory is let go
    spare: int | None  # which input the result may overwrite


def _plan(steps: list[dict[str, Any]], output: str) -> list[_Step]:
    readers = Counter([name for step in steps for name in step["inputs"]] + [output])
    own: dict[str, int] = {}  # widths of the arrays that are neither the caller's nor a view of another
    plan = []
    for step in steps:
        inputs, width = step["inputs"], step["width"]
        last_read = {name for name in inputs if readers[name] == 1}
        spare = next((i for i, name in enumerate(inputs) if name in last_read and own.get(name) == width), None)
        operation = partial(_OPERATIONS[step["op"]], **step["options"])
        plan.append(_Step(operation, inputs, step["output"], last_read, spare))
        if step["op"] != "slice":
            own[step["output"]] = width
    return plan


# The operations. ``out`` is an array that may hold the result, or None.


def _matmul(out: Any, rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return np.matmul(rows, matrix)


def _relu(out: Any, rows: np.ndarray) -> np.ndarray:
    return np.maximum(rows, 0, out=out)


def _prelu(out: Any, rows: np.ndarray, slope: np.ndarray) -> np.ndarray:
    negative = np.minimum(rows, 0)
    negative *= slope
    out = np.maximum(rows, 0, out=out)
    out += negative
    return out


def _add(out: Any, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.add(first, second, out=out)


def _sub(out: Any, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.subtract(first, second, out=out)


def _mul(out: Any, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.multiply(first, second, out=out)


def _cat(out: Any, *parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts, axis=1)


def _slice(out: Any, rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    return rows[:, start:stop]


_OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "matmul": _matmul,
    "relu": _relu,
    "prelu": _prelu,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "cat": _cat,
    "slice": _slice,
}


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with open(path, "rb") as stream:  # np.load leaves a broken file open
        try:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array")
            program = json.loads(str(file["program"])) if "program" in file.files else None
            if not isinstance(program, dict) or program.get("format") != FORMAT:
                raise ValueError(f"it holds {sorted(file.files)[:8]} and no program of format {FORMAT}")
            steps = program["steps"]
            computed = {"embeddings", "side_info", *(step["output"] for step in steps)}
            weights = {name for step in steps for name in step["inputs"]} - computed
            return program, {name: file[name] for name in weights}
        except Exception as error:  # one wrong bit may show in a dozen ways
            raise ValueError(
                f"path must be a whole file that a transformation exported, {os.fspath(path)!r} is not: {error}"
            ) from error


def _check(value: Any, name: str, width: int) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != 2:
        raise ValueError(f"{name} must be 2-dimensional, (N, D), got shape {array.shape}")
    if array.shape[1] != width:
        raise ValueError(f"{name} must be {width} wide, got width {array.shape[1]}")
    if len(array) == 0:
        raise ValueError(f"{name} must not be empty, got shape {array.shape}")
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} must be floating point, got {array.dtype}; convert them with .astype(np.float32)")
    return array
