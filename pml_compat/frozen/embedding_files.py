"""How embeddings lie on disk: one plain ``.npy`` file an array, written as the batches come, read as a memory map."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._checks import as_tensor, check_finite, check_matrix

_DTYPES = (torch.float16, torch.float32, torch.float64)  # what .npy has; the others are kept as float32
_HEADER_BYTES = 128


def write_arrays(folder: Path, batches: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """Append every batch to the .npy files in ``folder`` and return what each file holds."""
    forms: dict[str, dict[str, Any]] = {}
    ids: list[torch.Tensor] = []
    rows = next_check = 0
    for batch in batches:
        arrays = _read_batch(batch, rows)
        if forms and arrays.keys() != forms.keys():
            raise ValueError(
                f"batches must all have the same parts: {', '.join(forms)} at first, from row {rows} on "
                f"{', '.join(arrays)}"
            )
        for name, tensor in arrays.items():
            form = forms.setdefault(name, {**form_of(tensor), "shape": [0, *tensor.shape[1:]]})
            if [*tensor.shape[1:]] != form["shape"][1:]:
                raise ValueError(
                    f"{name} must be {form['shape'][1]} wide in every batch, from row {rows} on the width is "
                    f"{tensor.shape[1]}"
                )
            if form_of(tensor)["dtype"] != form["dtype"]:
                raise ValueError(
                    f"{name} must be {form['dtype']} in every batch, from row {rows} on it is "
                    f"{form_of(tensor)['dtype']}; convert them with .float()"
                )
            with (folder / f"{name}.npy").open("ab") as file:
                if form["shape"][0] == 0:
                    file.write(bytes(_HEADER_BYTES))  # the number of rows is known at the end
                file.write(tensor.contiguous().numpy().data)
            form["shape"][0] += len(tensor)
        rows += len(arrays["embeddings"])
        if "ids" in arrays:
            ids.append(arrays["ids"].clone())
            if rows >= next_check:  # at each doubling, so that a mistake shows early and sorting stays cheap
                sort_ids(torch.cat(ids))
                next_check = 2 * rows
    if not forms:
        raise ValueError("batches must not be empty, got none")
    if ids:
        sort_ids(torch.cat(ids))
    for name, form in forms.items():
        with (folder / f"{name}.npy").open("r+b") as file:
            file.write(_npy_header(form))
            flush_to_disk(file)
    return forms


def _read_batch(batch: Any, first_row: int) -> dict[str, torch.Tensor]:
    """Return the parts of one batch that are there, checked, on the CPU and of a dtype that is stored."""
    parts = batch if isinstance(batch, list | tuple) else (batch,)
    if not 1 <= len(parts) <= 3:
        raise ValueError(f"batches must be (embeddings, ids, side_info) or less, got {len(parts)} parts")
    arrays = {}
    for name, value in zip(("embeddings", "ids", "side_info"), parts, strict=False):
        if name == "ids" and value is not None:
            arrays[name] = as_integers(value, name)
        elif value is not None or name == "embeddings":
            arrays[name] = storable(check_matrix(value, name))
            check_finite(arrays[name], name, first_row)
        if name in arrays and len(arrays[name]) != len(arrays["embeddings"]):
            raise ValueError(
                f"{name} must have one entry a row: expected {len(arrays['embeddings'])} from row {first_row} on, "
                f"got {len(arrays[name])}"
            )
    return arrays


def _npy_header(form: dict[str, Any]) -> bytes:
    """Return a header of the .npy format, version 1.0, of a length that does not depend on the number of rows."""
    fields = {"descr": np.dtype(form["dtype"]).str, "fortran_order": False, "shape": tuple(form["shape"])}
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", _HEADER_BYTES - 10)
    return start + repr(fields).encode("latin1").ljust(_HEADER_BYTES - 11) + b"\n"


def form_of(tensor: torch.Tensor) -> dict[str, Any]:
    """Return shape and dtype, of types that JSON has."""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def flush_to_disk(file: Any) -> None:
    """Write what is buffered, as far as the disk."""
    file.flush()
    os.fsync(file.fileno())  # or a power cut could leave the folder's name without its contents


def map_array(path: Path) -> torch.Tensor:
    """Map a whole .npy file; the tensor must not be written to."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        surplus = path.stat().st_size - array.offset - array.nbytes
        if surplus:
            raise ValueError(f"{surplus} bytes more than its header says")
        return borrow(array)
    except (TypeError, ValueError) as error:
        raise ValueError(f"path must be a whole .npy file of numbers, {str(path)!r} is not: {error}") from error


def borrow(array: np.ndarray) -> torch.Tensor:
    """Return the array as a tensor without a copy, be it read-only: it is only read here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def storable(values: torch.Tensor) -> torch.Tensor:
    """Return values on the CPU and of a dtype that ``.npy`` has."""
    values = values.detach().cpu()
    return values if values.dtype in _DTYPES else values.float()


def as_integers(value: Any, name: str) -> torch.Tensor:
    """Return a list, range, tensor or array of integers as a contiguous int64 ``(n,)`` CPU tensor."""
    if not isinstance(value, torch.Tensor):
        array = np.asarray(value)
        if array.shape == (0,):
            return torch.zeros(0, dtype=torch.long)
        value = as_tensor(array.copy(), name)
    if value.ndim != 1 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} must be integers of shape (n,), got {value.dtype} of shape {tuple(value.shape)}")
    if value.dtype == torch.uint64 and bool((value.view(torch.int64) < 0).any()):
        raise ValueError(f"{name} must be below 2**63, got unsigned integers above it")
    return value.detach().to("cpu", torch.long).contiguous()


def sort_ids(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids in order and the row of each."""
    ordered, rows = torch.sort(ids, stable=True)
    twice = (ordered[1:] == ordered[:-1]).nonzero()[:, 0]
    if len(twice):
        first = int(twice[0])
        raise ValueError(
            f"ids must not repeat, got {int(ordered[first])} in rows {int(rows[first])} and {int(rows[first + 1])}; "
            "a sampler that pads its last batch repeats samples"
        )
    return ordered, rows
