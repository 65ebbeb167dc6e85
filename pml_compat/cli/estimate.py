"""What a long run will take, said before it begins."""

from __future__ import annotations

import os
import sys
import time

from ..accuracy import CrossModelAccuracyCalculator
from .inputs import Embeddings

_SAMPLE = 200  # queries ranked to estimate the time


def print_estimate(embeddings: Embeddings, calculator: CrossModelAccuracyCalculator, rankings: int) -> None:
    """Rank a few queries, and say on stderr what all rankings will take; warn where memory will not do."""
    labels, gallery = embeddings.query_labels.cpu(), embeddings.galleries["old"]
    size = min(_SAMPLE, len(labels))
    codes = {n: value[:size] if n.startswith("query_") else value for n, value in embeddings.codes.items()}
    start = time.perf_counter()
    calculator.get_per_query_accuracy(
        embeddings.queries["new"][:size], labels[:size], gallery, embeddings.gallery_labels, **codes
    )
    seconds = (time.perf_counter() - start) * len(labels) / size * rankings
    memory = estimate_memory(embeddings)
    print(
        f"{rankings} rankings of {len(labels):,} queries on {len(gallery):,} vectors: about {duration(seconds)} and "
        f"{size_in_words(memory)} of memory beside the program's own",
        file=sys.stderr,
    )
    available = available_memory()
    if available is not None and memory > available and gallery.device.type == "cpu":
        print(
            f"pml-compat: that is more than the {size_in_words(available)} of this machine; sample the gallery",
            file=sys.stderr,
        )


def estimate_memory(embeddings: Embeddings) -> int:
    """Return about how many bytes the embeddings take, with what ranking and backfilling hold beside them."""
    held = [*embeddings.queries.values(), *embeddings.galleries.values()]
    widest = max(held, key=lambda matrix: matrix.shape[1])
    n_gallery = len(embeddings.gallery_labels)
    row = widest.shape[1] * widest.element_size()
    copies = 3 if "new" in embeddings.galleries else 1  # the mixed gallery, one fitted to its width; and squares
    chunk = max(16 * n_gallery, 3 * 2**19) * 40
    return sum(matrix.nbytes for matrix in held) + copies * n_gallery * row + chunk


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
