"""A stored gallery through a transformation: one pass, constant memory."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from .._checks import check_finite, check_integer, check_matrix, native
from .._files import whole_file

if TYPE_CHECKING:
    from .base import Transformation

_CPU_BLOCK = 1024  # rows computed at once: what lies between the layers stays in the caches


@torch.inference_mode()
def apply(
    transformation: Transformation,
    source: Any,
    side_info: Any = None,
    *,
    out: str | os.PathLike[str] | np.ndarray | None = None,
    batch_size: int = 8192,
    normalize: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> np.ndarray:
    """Map every row of ``source``, with batch normalisation folded into the layers: ``Transformation.apply_to``."""
    check_integer(batch_size, "batch_size", minimum=1)
    if side_info is not None and len(side_info) != len(source):
        raise ValueError(f"side_info must have one row an embedding: expected {len(source)}, got {len(side_info)}")
    weight = next(transformation.parameters())
    dtype = np.dtype(np.float64 if weight.dtype == torch.float64 else np.float32)
    shape = (len(source), transformation.out_features)
    run = _Batches(transformation, source, side_info, batch_size, normalize, progress)
    if out is None:
        out = np.empty(shape, dtype)
    if _is_source(out, source):
        raise ValueError("out must not be the source: where a row fails, the only copy would be half mapped")
    if isinstance(out, np.ndarray):
        if out.shape != shape or out.dtype != dtype or not out.flags.writeable:
            raise ValueError(
                f"out must be a writable array of shape {shape} and {dtype}, got {out.shape} and {out.dtype}"
                f"{'' if out.flags.writeable else ', read-only'}"
            )
        run.write_to(out)
        return out
    if Path(out).suffix != ".npy":
        raise ValueError(f"out must be an .npy file, got {os.fspath(out)!r}")
    if Path(out).exists() and not overwrite:
        raise FileExistsError(
            f"out must be free, there is a file at {os.fspath(out)!r}; give overwrite=True to replace it"
        )
    with whole_file(out) as temporary:
        run.write_to(np.lib.format.open_memmap(temporary, "w+", dtype, shape))
    return np.load(out, mmap_mode="r", allow_pickle=False)


def _is_source(out: Any, source: Any) -> bool:
    """Tell whether what is written to is what is read from, in memory or on disk."""
    source = source.numpy() if isinstance(source, torch.Tensor) and source.device.type == "cpu" else source
    read = getattr(source, "filename", None)
    written = out.filename if isinstance(out, np.memmap) else None if isinstance(out, np.ndarray) else out
    if read is not None and written is not None and Path(read).exists() and Path(written).exists():
        return os.path.samefile(read, written)
    both = isinstance(out, np.ndarray) and isinstance(source, np.ndarray)
    return both and np.may_share_memory(out, source)


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
        on_cpu = self.weight.device.type == "cpu"
        starts = range(0, len(self.source), self.batch_size)
        for start in tqdm(starts, desc="transform", unit="batch", disable=not self.progress):
            rows = slice(start, start + self.batch_size)
            source = self._read(self.source, "source", rows, self.transformation.in_features)
            side_info = None
            if self.side_info is not None:
                side_info = self._read(self.side_info, "side_info", rows, self.transformation.side_features)
            block = _CPU_BLOCK if on_cpu else self.batch_size
            for first in range(0, len(source), block):
                part = slice(first, first + block)
                mapped = self.transformation(source[part], None if side_info is None else side_info[part])
                if self.normalize:
                    mapped = torch.nn.functional.normalize(mapped, dim=1)
                check_finite(mapped, "source, mapped,", start + first)
                target[start + first : start + first + len(mapped)] = mapped

    def _read(self, array: Any, name: str, rows: slice, width: int | None) -> torch.Tensor:
        block = array[rows]
        if isinstance(block, np.ndarray):
            block = native(block)
        if isinstance(block, np.ndarray) and not block.flags.writeable:
            with warnings.catch_warnings():  # a read-only map is only read here; a copy would cost a pass
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                block = torch.from_numpy(block)
        block = check_matrix(block, name, width).to(self.weight.device, self.weight.dtype)
        check_finite(block, name, rows.start)  # not of the result alone: a ReLU turns minus infinity into 0
        return block
