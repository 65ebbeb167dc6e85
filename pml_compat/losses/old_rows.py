"""The old model's embeddings that a loss is called with, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .._checks import check_finite, check_matrix, check_same_device
from .._rows import fit_width, precise_dtype


def check_row_values(embeddings: torch.Tensor, ref_emb: Any) -> None:
    """Raise a ValueError where embeddings, or the rows that are given of another model, are not finite."""
    check_finite(embeddings, "embeddings")
    if isinstance(ref_emb, Mapping):
        several = len({id(rows) for rows in ref_emb.values()}) > 1
        for rows, key in {id(rows): (rows, key) for key, rows in ref_emb.items()}.values():
            if isinstance(rows, torch.Tensor):
                check_finite(rows, f"ref_emb[{key!r}]" if several else "ref_emb")
    elif isinstance(ref_emb, torch.Tensor):
        check_finite(ref_emb, "ref_emb")


def check_old_rows(
    embeddings: torch.Tensor,
    ref_emb: Any,
    *,
    width: int | None = None,
    fit: bool = True,
    whose: str = "the old model's embeddings",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the batch, fitted to the width of the other model's, and that one's embeddings of the same items.

    Both come in float32 or better.

    Args:
        embeddings: ``(N, D)``, of the model in training, checked; the result carries its gradient.
        ref_emb: ``(N, D_old)``, row i of the same item; the result is detached.
        width: the width that ``ref_emb`` must have; None: any.
        fit: fit the batch to the width of ``ref_emb`` (:func:`pml_compat.fit_width`); without, both must have
            the same.
        whose: what to call ``ref_emb`` in errors.
    Raises:
        ValueError: ``ref_emb`` missing, of another shape or on another device; either one empty.
    """
    if ref_emb is None or ref_emb is embeddings:
        raise ValueError(f"ref_emb must be given: {whose} of the same items, row by row; got None or embeddings itself")
    if not isinstance(ref_emb, torch.Tensor):
        raise ValueError(
            f"ref_emb must be a torch.Tensor, a numpy.ndarray or FrozenEmbeddings, got {type(ref_emb).__name__}"
        )
    check_same_device(embeddings, "embeddings", ref_emb, "ref_emb")
    check_matrix(ref_emb, "ref_emb", width)
    if len(ref_emb) != len(embeddings) or (not fit and ref_emb.shape[1] != embeddings.shape[1]):
        expected = f"{len(embeddings)} rows" if fit else tuple(embeddings.shape)
        raise ValueError(
            f"ref_emb must be shaped like embeddings, row i of the same item: expected {expected}, "
            f"got {len(ref_emb) if fit else tuple(ref_emb.shape)}"
        )
    dtype = precise_dtype(embeddings.dtype)
    old = ref_emb.detach().to(dtype)
    return fit_width(embeddings.to(dtype), old.shape[1]), old
