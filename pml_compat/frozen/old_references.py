"""Old embeddings as references of new ones: what a cross-model loss or miner is called with, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .._checks import as_tensor, check_embeddings, check_labels, check_same_device, check_values
from .._rows import fit_width, precise_dtype
from .embeddings import FrozenEmbeddings


def as_rows(rows: Any, embeddings: torch.Tensor) -> Any:
    """Return ``ref_emb`` as a tensor, or each entry of a mapping: what is no tensor comes to where embeddings are.

    NumPy arrays and FrozenEmbeddings are taken too, whole, as a row is the item of the same row of the batch.
    """
    if rows is None or isinstance(rows, torch.Tensor):
        return rows
    if isinstance(rows, Mapping):
        taken = {id(own): as_rows(own, embeddings) for own in rows.values()}
        return {name: taken[id(own)] for name, own in rows.items()}
    if isinstance(rows, FrozenEmbeddings):
        rows = rows[:]
    elif isinstance(rows, np.ndarray):
        rows = as_tensor(rows, "ref_emb")
    else:
        return rows
    return rows.to(embeddings.device)


def check_references(
    embeddings: torch.Tensor, labels: Any, ref_emb: Any, ref_labels: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return new embeddings, their labels, old embeddings and theirs, all on one device.

    Embeddings come back in float32 or better, the new ones fitted to the old width
    (:func:`pml_compat.fit_width`), the old ones detached. The two labels are never one object: PML takes one
    object for "the same embeddings" and drops the pairs of an item with itself, which are positives here.

    Args:
        embeddings: ``(N, D)``, of the model in training; the result carries its gradient.
        labels: ``(N,)``, on any device.
        ref_emb: ``(M, D_old)``, of the old model: a tensor, an array or FrozenEmbeddings.
        ref_labels: ``(M,)``, on any device; None: ``ref_emb`` are of the same rows, and ``labels`` holds for both.
    Raises:
        ValueError: ``ref_emb`` missing or on another device; embeddings empty, NaN or infinite;
            labels missing or not one a row.
    """
    if ref_emb is None:
        raise ValueError("ref_emb must be given: the old model's embeddings; got None")
    ref_emb = as_rows(ref_emb, embeddings)
    if isinstance(ref_emb, torch.Tensor):
        check_same_device(embeddings, "embeddings", ref_emb, "ref_emb")
    check_embeddings(embeddings)
    check_embeddings(ref_emb, "ref_emb")
    labels = check_labels(labels, length=len(embeddings)).to(embeddings.device)
    if ref_labels is not None:
        ref_labels = check_labels(ref_labels, "ref_labels", len(ref_emb)).to(embeddings.device)
    elif len(ref_emb) != len(embeddings):
        raise ValueError(
            f"ref_labels must be given where ref_emb has other rows than embeddings, got {len(ref_emb)} rows for "
            f"{len(embeddings)} embeddings and no ref_labels"
        )
    else:
        ref_labels = labels
    dtype = precise_dtype(embeddings.dtype)
    new = fit_width(embeddings.to(dtype), ref_emb.shape[1])
    return new, labels, ref_emb.detach().to(dtype), ref_labels.clone()


def check_row_labels(labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
    """Check that labels given for the old embeddings are those of the same rows.

    Raises:
        ValueError: they differ.
    """
    if ref_labels is None or ref_labels is labels:
        return
    error = "ref_labels must equal labels, as row i of ref_emb is the item of row i of embeddings"
    if ref_labels.shape != labels.shape:
        raise ValueError(error)

    def judge(differ: float) -> None:
        if differ:
            raise ValueError(error)

    check_values([(ref_labels.to(labels.device) != labels).any()], judge)
