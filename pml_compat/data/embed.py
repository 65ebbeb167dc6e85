"""Embed a whole data set, into memory or into a folder that a killed run goes on with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from tqdm import tqdm

from .._checks import as_tensor, check_finite, check_integer
from .._rows import precise_dtype
from ..frozen import FrozenEmbeddings, model_fingerprint
from .nest import moved_to

_LABELS = ("label", "labels")


def embed(
    model: torch.nn.Module,
    data: Any,
    *,
    out: str | os.PathLike[str] | None = None,
    batch_size: int = 256,
    device: Any = None,
    autocast: torch.dtype | bool | None = None,
    progress: bool = True,
) -> torch.Tensor | FrozenEmbeddings:
    """Return the embeddings of a data set, in its order, by a model in eval mode and without a gradient.

    A batch is what the model takes, or a tuple or list that starts with it: ``(data, labels)`` or
    ``(data, labels, ids)``. The model is called with ``data``, one argument: a tensor, or any nest of tensors in dicts,
    tuples and lists, of whose dicts the keys ``label`` and ``labels`` are left out. Wrap a model that wants them as
    keywords.

    Args:
        model: ``data -> (n, D)``; its modules are put in eval mode, and back into the mode they were in.
        data: a tensor or array of inputs; a Dataset; or a DataLoader (not shuffled), whose batches come as they are.
        out: the folder to write, for :class:`~pml_compat.frozen.FrozenEmbeddings`: with the ids of the batches, and the
            model's fingerprint. Where a run for it was killed, the next one with the same model and ``batch_size`` goes
            on, unless data is a DataLoader. None: a tensor.
        batch_size: 1 or more; a DataLoader has its own.
        device: where to run, to which model and data are moved; None: where the model is.
        autocast: the dtype to run in, ``torch.bfloat16``, or True for the device's own; None: off.
        progress: show a bar.
    Shape:
        - output: ``(N, D)`` on the CPU, in float32 where the model gives float16 or bfloat16
    Raises:
        ValueError: ``model`` no module, or one that does not give ``(n, D)`` embeddings, one a row; ``data`` of another
            type, or empty; NaN or infinite embeddings (which row); ``out`` is there already, or a killed run for it was
            of another model or ``batch_size``.
    Example:
        >>> embed(torch.nn.Linear(4, 2), torch.randn(10, 4), batch_size=4, progress=False).shape
        torch.Size([10, 2])
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    batch_size = check_integer(batch_size, "batch_size", minimum=1)
    if device is None:
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    device = torch.device(device)
    model.to(device)
    dataset = _dataset(data)
    if out is None:
        parts = list(_embedded(model, _loader(dataset, batch_size), device, autocast, progress, 0))
        if not parts:
            raise ValueError("data must not be empty, got no batch")
        return torch.cat([rows for rows, _ in parts])
    out = Path(out)
    if out.exists():
        raise ValueError(f"out must be free, {os.fspath(out)!r} is there already; delete it or choose another")
    fingerprint = model_fingerprint(model)
    spool = out.with_name(f".{out.name}-parts")
    done = _open_spool(spool, {"fingerprint": fingerprint, "batch_size": batch_size}, isinstance(dataset, DataLoader))
    if done:
        dataset = Subset(dataset, range(min(done * batch_size, len(dataset)), len(dataset)))
    if not done or len(dataset):
        batches = _embedded(model, _loader(dataset, batch_size), device, autocast, progress, done * batch_size)
        for number, (rows, ids) in enumerate(batches, done):
            part = spool / f"{number:08d}.safetensors"
            save_file({"rows": rows} if ids is None else {"rows": rows, "ids": ids}, part.with_suffix(".new"))
            part.with_suffix(".new").replace(part)  # whole, or not there
    written = FrozenEmbeddings.write(out, map(_read, _parts(spool)), fingerprint=fingerprint)
    shutil.rmtree(spool)
    return written


def _dataset(data: Any) -> Any:
    if isinstance(data, np.ndarray | torch.Tensor):
        return TensorDataset(as_tensor(data, "data"))
    if not isinstance(data, Dataset | DataLoader):
        raise ValueError(f"data must be a tensor, an array, a Dataset or a DataLoader, got {type(data).__name__}")
    return data


def _loader(dataset: Any, batch_size: int) -> Iterable[Any]:
    return dataset if isinstance(dataset, DataLoader) else DataLoader(dataset, batch_size)


@torch.no_grad()
def _embedded(
    model: torch.nn.Module,
    loader: Iterable[Any],
    device: torch.device,
    autocast: torch.dtype | bool | None,
    progress: bool,
    first_row: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Give the embeddings of each batch, and its ids."""
    dtype = autocast if isinstance(autocast, torch.dtype) else None
    for batch in tqdm(loader, desc="Embedding", disable=not progress):
        inputs, ids = _inputs(batch)
        with _eval_mode(model), torch.autocast(device.type, dtype, enabled=bool(autocast)):
            rows = model(moved_to(inputs, device))
        if not isinstance(rows, torch.Tensor) or rows.ndim != 2 or not rows.is_floating_point():
            got = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
            raise ValueError(f"model must return a tensor of shape (N, D), got {got}; wrap what picks the embedding")
        rows = rows.to("cpu", precise_dtype(rows.dtype)).contiguous()
        check_finite(rows, "embeddings", first_row)
        first_row += len(rows)
        if ids is not None and len(ids) != len(rows):
            raise ValueError(f"model must return one embedding a sample: expected {len(ids)} rows, got {len(rows)}")
        yield rows, ids


def _inputs(batch: Any) -> tuple[Any, torch.Tensor | None]:
    """Return what the model takes of a batch, and the ids where it has any."""
    ids = None
    if isinstance(batch, tuple | list):
        if len(batch) > 2 and isinstance(batch[2], torch.Tensor) and batch[2].ndim == 1:
            ids = batch[2].cpu() if not batch[2].is_floating_point() else None
        batch = batch[0]
    if isinstance(batch, Mapping):
        batch = {key: part for key, part in batch.items() if key not in _LABELS}
    return batch, ids


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _open_spool(spool: Path, made_by: dict[str, Any], anew: bool) -> int:
    """Return how many batches a killed run has left."""
    if anew and spool.exists():
        shutil.rmtree(spool)
    spool.mkdir(parents=True, exist_ok=True)
    note = spool / "made_by.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != made_by:
        raise ValueError(f"out has parts by another model or batch_size in {os.fspath(spool)!r}; delete that folder")
    note.write_text(json.dumps(made_by), encoding="utf-8")
    return len(_parts(spool))


def _parts(spool: Path) -> list[Path]:
    return sorted(spool.glob("*.safetensors"))


def _read(part: Path) -> Any:
    found = load_file(part)
    return (found["rows"], found["ids"]) if "ids" in found else found["rows"]
