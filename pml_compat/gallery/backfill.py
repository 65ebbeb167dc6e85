"""A mapped gallery embedded anew, item by item, as far as a budget goes; a later run goes on where this one stopped."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .._checks import check_integer
from .stores import Manifest, open_store, open_writer, read_manifest
from .stores.base import Store
from .stores.files import WaitingVectors

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_READ = 2**16  # ids at once


def backfill(
    new: str | os.PathLike[str],
    embed: Callable[[list[Any]], Any],
    *,
    budget: str | int,
    order: Any = None,
    model: str | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Manifest:
    """Replace mapped vectors by the new model's own, the most urgent first, until the budget is spent.

    Call it again with a larger budget, or after it was killed, and it goes on. Every item is served all the while, by
    its mapped vector or by its own. Parquet files, FAISS indices and Lance datasets are written anew at the end of the
    run; until then new vectors wait in a file beside them, which a killed run leaves for the next one.

    Args:
        new: address of what :func:`migrate` has finished.
        embed: called with a list of ids, returns their ``(n, D)`` embeddings by the new model.
        budget: of all runs together, ``"20%"`` of the items or their number; of this run, ``"90s"``, ``"30min"``,
            ``"8h"``.
        order: ids, the most urgent first, such as those with the highest :func:`backfill_scores` or the most queries;
            they need not be all. Random by default.
        model: fingerprint of the model behind ``embed``; that which the manifest has, where it has one.
        batch_size: items a call of ``embed``.
        seed: of the random order.
        progress: show a progress bar with the time left.
    Returns:
        The manifest; ``manifest["backfill"]["done"]`` items have vectors of their own.
    Raises:
        ValueError: no finished migration, another model, another order than an earlier run had, a budget that is
            neither, an id that the store lacks; embeddings of another width or number, NaN or infinity.
    """
    address = os.fspath(new)
    manifest = read_manifest(address)
    if manifest is None or manifest.get("status") != "finished":
        raise ValueError(f"new must be what a migration has finished, {address!r} is not")
    check_integer(batch_size, "batch_size", minimum=1)
    expected = manifest["new_model"]
    if model is not None and expected is not None and model != expected:
        raise ValueError(f"model must be the one that the gallery was mapped for, {expected!r}, got {model!r}")
    share, seconds = _budget(budget, manifest["rows"])
    store = open_store(address)
    writer = open_writer(address, store, manifest["width"])
    ids = _ids(store, order, seed)
    print_of_order = hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()[:16]
    state = manifest.setdefault("backfill", {"order": print_of_order, "done": 0, "written": 0, "model": model})
    if state["order"] != print_of_order or state["model"] != model:
        raise ValueError("order, seed and model must be those of the run that began, or rows would be left out")
    waiting = WaitingVectors(writer.path, store.width, store.dtype) if writer.written_whole else None  # type: ignore[attr-defined]
    if waiting is not None and order is not None:
        lacking = ~np.isin(ids, np.concatenate(list(_every_id(store))))
        if lacking.any():
            raise ValueError(f"order must name items of {address!r}, it lacks {ids[lacking.argmax()].item()!r}")
    until = min(len(ids), share)
    end = time.monotonic() + seconds
    with tqdm(total=until, initial=state["done"], desc="backfill", unit="item", disable=not progress) as bar:
        while state["done"] < until and time.monotonic() < end:
            part = ids[state["done"] : min(state["done"] + batch_size, until)]
            vectors = _checked(embed(part.tolist()), len(part), manifest).astype(store.dtype, copy=False)
            if waiting is not None:
                waiting.put(state["done"] - state["written"], vectors)
            state["done"] += len(part)
            if waiting is not None:
                writer.keep(manifest)
            else:
                state["written"] = state["done"]
                writer.replace(part, vectors, manifest)
            bar.update(len(part))
    if waiting is not None and state["written"] < state["done"]:
        rest = ids[state["written"] : state["done"]]
        state["written"] = state["done"]
        writer.replace(rest, waiting.first(len(rest)), manifest)
        waiting.remove()
    return manifest


def _budget(budget: Any, rows: int) -> tuple[int, float]:
    """Return up to how many items, and for how many seconds."""
    text = str(budget).strip()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|s|min|h)?", text)
    if found is None or isinstance(budget, bool):
        raise ValueError(f"budget must be a share (20%), a number of items or a time (90s, 30min, 8h), got {budget!r}")
    number, unit = float(found[1]), found[2]
    if unit in _UNITS:
        return rows, number * _UNITS[unit]
    if unit == "%":
        if number > 100:
            raise ValueError(f"budget must be at most 100%, got {budget!r}")
        return round(rows * number / 100), float("inf")
    if "." in found[1]:
        raise ValueError(f"budget must be a whole number of items, got {budget!r}; a share is written 20%")
    return int(number), float("inf")


def _ids(store: Store, order: Any, seed: int) -> np.ndarray:
    """Return ids in the order in which they are embedded."""
    if order is None:
        every = np.sort(np.concatenate(list(_every_id(store))))  # a store that is written anew may change its order
        return every[np.random.default_rng(seed).permutation(len(every))]
    ids = order.cpu().numpy() if isinstance(order, torch.Tensor) else np.asarray(order)
    if ids.ndim != 1 or len(np.unique(ids)) < len(ids):
        raise ValueError(f"order must be (n,) ids, each once, got shape {ids.shape}")
    return ids


def _every_id(store: Store) -> Iterator[np.ndarray]:
    for batch in store.batches(_READ):
        yield batch.ids


def _checked(vectors: Any, count: int, manifest: Manifest) -> np.ndarray:
    rows = vectors.detach().float().cpu().numpy() if isinstance(vectors, torch.Tensor) else np.asarray(vectors)
    if rows.shape != (count, manifest["width"]):
        raise ValueError(
            f"embed must return a row of {manifest['width']} numbers for each of {count} ids, got {rows.shape}"
        )
    if not np.isfinite(rows).all():
        raise ValueError("embed must return finite numbers, got NaN or infinity")
    if manifest["normalize"]:
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows
