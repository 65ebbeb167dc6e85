"""Old embeddings as references of new ones: what a cross-model loss or miner is called with, checked."""

from __future__ import annotations

from typing import Any

import torch

from .checks import check_embeddings, check_labels, check_same_device


def check_references(
    embeddings: torch.Tensor, labels: Any, ref_emb: Any, ref_labels: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return new embeddings, their labels, old embeddings and theirs, all on one device.

    Embeddings come back in float32 or better, the old ones detached. The two labels are never one object: PML takes
    one object for "the same embeddings" and drops the pairs of an item with itself, which are positives here.

    Args:
        embeddings: ``(N, D)``, of the model in training; the result carries its gradient.
        labels: ``(N,)``, on any device.
        ref_emb: ``(M, D)``, of the old model.
        ref_labels: ``(M,)``, on any device; None: ``ref_emb`` are of the same rows, and ``labels`` holds for both.
    Raises:
        ValueError: ``ref_emb`` missing, of another width or on another device; embeddings empty, NaN or infinite;
            labels missing or not one a row.
    """
    if ref_emb is None:
        raise ValueError("ref_emb must be given: the old model's embeddings; got None")
    if isinstance(ref_emb, torch.Tensor):
        check_same_device(embeddings, "embeddings", ref_emb, "ref_emb")
    check_embeddings(embeddings)
    check_embeddings(ref_emb, "ref_emb")
    width = embeddings.shape[1]
    if ref_emb.shape[1] != width:
        raise ValueError(
            f"ref_emb must be as wide as embeddings: expected {width}, got {ref_emb.shape[1]}; map one of them with a "
            "transformation (pml_compat.transformations), or pass "
            f"pml_compat.width.fit_width(embeddings, {ref_emb.shape[1]})"
        )
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
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    return embeddings.to(dtype), labels, ref_emb.detach().to(dtype), ref_labels.clone()
