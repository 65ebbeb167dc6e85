"""What a long run will take, said before it begins."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from ..accuracy import CrossModelAccuracyCalculator
from ..upgrade.evaluate import count_rankings
from ..upgrade.names import ALL_METRICS
from .inputs import Inputs

_SAMPLE = 200  # queries ranked to estimate the time


def print_estimate(arrays: dict[str, Any], inputs: Inputs) -> None:
    """Rank a few queries, and say on stderr what all rankings will take; warn where memory will not do."""
    queries, gallery, device = arrays["queries"], arrays["gallery"], arrays["device"]
    size = min(_SAMPLE, len(queries))
    knn_func = arrays.get("knn_func")
    calculator = CrossModelAccuracyCalculator(
        include=tuple(ALL_METRICS), k=inputs.k, device=device, knn_func=knn_func, fit_width=True
    )
    labels = torch.arange(size), torch.arange(len(gallery)) % size
    start = time.perf_counter()
    calculator.get_per_query_accuracy(queries[:size], labels[0], gallery, labels[1])
    rankings = count_rankings(arrays)
    seconds = (time.perf_counter() - start) * len(queries) / size * rankings
    memory = estimate_memory(arrays)
    print(
        f"{rankings} rankings of {len(queries):,} queries on {len(gallery):,} vectors: about {duration(seconds)} and "
        f"{size_in_words(memory)} of memory beside the program's own",
        file=sys.stderr,
    )
    available = available_memory()
    if available is not None and memory > available and device.type == "cpu":
        print(
            f"pml-compat: that is more than the {size_in_words(available)} of this machine; sample the gallery",
            file=sys.stderr,
        )


def estimate_memory(arrays: dict[str, Any]) -> int:
    """Return about how many bytes the embeddings take, with what ranking and backfilling hold beside them."""
    names = ("queries", "old_queries", "gallery", "transformed_gallery", "new_gallery")
    held = [arrays[name] for name in names if arrays[name] is not None]
    n_gallery = len(arrays["gallery"])
    row = 4 * max(matrix.shape[1] for matrix in held)
    copies = 3 if arrays["new_gallery"] is not None else 1  # the mixed gallery, one fitted to its width; and squares
    chunk = max(16 * n_gallery, 3 * 2**19) * 40
    return sum(4 * matrix.shape[0] * matrix.shape[1] for matrix in held) + copies * n_gallery * row + chunk


def available_memory() -> int | None:
    """Return the memory of this machine in bytes, where the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def duration(seconds: float) -> str:
    """Return about how long that is."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size_in_words(count: int) -> str:
    """Return a number of bytes in MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(1, round(count / 2**20))} MiB"
