"""The old model's embeddings that a loss is called with, checked."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.utils import common_functions as c_f

from ..checks import check_embeddings, check_same_device


def check_old_rows(
    embeddings: torch.Tensor, ref_emb: Any, *, same_width: bool = True, whose: str = "the old model's embeddings"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the batch and the other model's embeddings of the same items, in float32 or better.

    Args:
        embeddings: ``(N, D)``, of the model in training; the result carries its gradient.
        ref_emb: ``(N, D)``, row i of the same item; the result is detached.
        same_width: whether both must have the same ``D``.
        whose: what to call ``ref_emb`` in errors.
    Raises:
        ValueError: ``ref_emb`` missing (``None``, or ``embeddings`` itself, which PML puts in its place), of another
            shape or on another device; either one empty, NaN or infinite.
    """
    if ref_emb is None or ref_emb is embeddings:
        raise ValueError(f"ref_emb must be given: {whose} of the same items, row by row; got None or embeddings itself")
    if not isinstance(ref_emb, torch.Tensor):
        raise ValueError(f"ref_emb must be a torch.Tensor, got {type(ref_emb).__name__}")
    check_same_device(embeddings, "embeddings", ref_emb, "ref_emb")
    check_embeddings(embeddings)
    check_embeddings(ref_emb, "ref_emb")
    if len(ref_emb) != len(embeddings) or (same_width and ref_emb.shape[1] != embeddings.shape[1]):
        expected = tuple(embeddings.shape) if same_width else f"{len(embeddings)} rows"
        raise ValueError(
            f"ref_emb must be shaped like embeddings, row i of the same item: expected {expected}, "
            f"got {tuple(ref_emb.shape) if same_width else len(ref_emb)}"
        )
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    return embeddings.to(dtype), ref_emb.detach().to(dtype)


def check_row_labels(labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
    """Check that labels given for the old embeddings are those of the same rows.

    Raises:
        ValueError: they differ.
    """
    if ref_labels is None or ref_labels is labels:
        return
    if ref_labels.shape != labels.shape or not torch.equal(c_f.to_device(ref_labels, labels), labels):
        raise ValueError("ref_labels must equal labels, as row i of ref_emb is the item of row i of embeddings")
