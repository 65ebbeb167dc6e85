"""A stored gallery through a transformation: one pass, constant memory."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from ..checks import as_tensor, check_finite, check_integer
from ..files import whole_file

if TYPE_CHECKING:
    from .base import Transformation


@torch.inference_mode()
def apply(
    transformation: Transformation,
    source: Any,
    side_info: Any = None,
    *,
    out: str | os.PathLike[str] | None = None,
    batch_size: int = 8192,
    normalize: bool = False,
    progress: bool = True,
) -> np.ndarray:
    """Map every row of ``source``, in eval mode and with batch normalisation folded into the layers.

    Args:
        transformation: the map; it stays as it is, on its device.
        source: ``(N, in_features)`` tensor, array, memory map, or whatever gives rows by a slice; read in batches.
        side_info: ``(N, side_features)``, row i of the same item; None where the transformation takes none.
        out: an ``.npy`` file to write to, whole or not at all; None keeps the result in memory.
        batch_size: rows at once; memory is set by it and not by ``N``.
        normalize: scale each row to length 1.
        progress: show a progress bar.
    Shape:
        - output: ``(N, out_features)`` float32 (float64 for a float64 transformation); a memory map with ``out``
    Raises:
        ValueError: other widths, lengths that differ, NaN or infinity (which row), ``out`` no ``.npy`` file.
    """
    check_integer(batch_size, "batch_size", minimum=1)
    if side_info is not None and len(side_info) != len(source):
        raise ValueError(f"side_info must have one row an embedding: expected {len(source)}, got {len(side_info)}")
    weight = next(transformation.parameters())
    dtype = np.dtype(np.float64 if weight.dtype == torch.float64 else np.float32)
    shape = (len(source), transformation.out_features)
    run = _Batches(transformation, source, side_info, batch_size, normalize, progress)
    if out is None:
        result = np.empty(shape, dtype)
        run.write_to(result)
        return result
    if Path(out).suffix != ".npy":
        raise ValueError(f"out must be an .npy file, got {os.fspath(out)!r}")
    with whole_file(out) as temporary:
        run.write_to(np.lib.format.open_memmap(temporary, "w+", dtype, shape))
    return np.load(out, mmap_mode="r", allow_pickle=False)


class _Batches:
    def __init__(
        self,
        transformation: Transformation,
        source: Any,
        side_info: Any,
        batch_size: int,
        normalize: bool,
        progress: bool,
    ) -> None:
        self.transformation = transformation.folded()
        self.source, self.side_info = source, side_info
        self.batch_size, self.normalize, self.progress = batch_size, normalize, progress
        self.weight = next(self.transformation.parameters())

    def write_to(self, result: np.ndarray) -> None:
        target = torch.from_numpy(result)
        starts = range(0, len(self.source), self.batch_size)
        for start in tqdm(starts, desc="transform", unit="batch", disable=not self.progress):
            rows = slice(start, start + self.batch_size)
            mapped = self.transformation(
                self._read(self.source, "source", rows),
                None if self.side_info is None else self._read(self.side_info, "side_info", rows),
            )
            if self.normalize:
                mapped = torch.nn.functional.normalize(mapped, dim=1)
            if not bool(torch.isfinite(mapped.sum())):  # one number a batch; which row it is, only when asked
                check_finite(mapped, f"source (from row {start}), mapped,")
            target[rows] = mapped

    def _read(self, array: Any, name: str, rows: slice) -> torch.Tensor:
        block = array[rows]
        if isinstance(block, np.ndarray) and not block.flags.writeable:
            with warnings.catch_warnings():  # a read-only map is only read here; a copy would cost a pass
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                block = torch.from_numpy(block)
        return as_tensor(block, name).to(self.weight.device, self.weight.dtype)
