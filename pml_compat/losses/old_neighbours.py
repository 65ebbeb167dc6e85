"""Stored old embeddings around each old embedding of a batch."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import check_embeddings, check_same_device
from .._rows import unit_rows_as_given
from ..frozen.embeddings import FrozenEmbeddings
from .old_rows import check_old_rows

_AT_ONCE = 2**14  # rows of a gallery that a batch is compared with at once


def as_gallery(gallery: Any) -> torch.Tensor | None:
    """Return stored old embeddings as unit rows in their dtype; None stays None: the rows of the batch alone."""
    if gallery is None:
        return None
    rows = gallery[:] if isinstance(gallery, FrozenEmbeddings) else gallery
    return unit_rows_as_given(check_embeddings(rows, "gallery").detach())


def check_rows_of_gallery(
    embeddings: torch.Tensor, ref_emb: Any, gallery: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`check_old_rows`, as wide as the gallery and where it is."""
    if gallery is None:
        return check_old_rows(embeddings, ref_emb)
    check_same_device(embeddings, "embeddings", gallery, "the loss")
    return check_old_rows(embeddings, ref_emb, width=gallery.shape[1])


@torch.no_grad()
def nearest_old_rows(old: torch.Tensor, gallery: torch.Tensor | None, count: int) -> torch.Tensor:
    """Return the ``count`` rows nearest to each old row, of the gallery, or of the other rows of the batch.

    Args:
        old: ``(N, D)`` unit rows.
        gallery: ``(M, D)`` unit rows, read in parts; None: the batch, each row left out of its own, by its position.
        count: how many, where there are as many.
    Shape:
        - output: ``(N, K, D)``, nearest first, in the dtype of ``old``
    """
    if gallery is None:
        similarities = (old @ old.t()).fill_diagonal_(-torch.inf)
        return old[similarities.topk(min(count, len(old) - 1)).indices]
    values, index = old.new_empty(len(old), 0), torch.empty(len(old), 0, dtype=torch.long, device=old.device)
    for start in range(0, len(gallery), _AT_ONCE):
        part = gallery[start : start + _AT_ONCE].to(old.dtype)
        found = (old @ part.t()).topk(min(count, len(part)))
        values, index = torch.cat([values, found.values], 1), torch.cat([index, found.indices + start], 1)
        values, best = values.topk(min(count, values.shape[1]))
        index = index.gather(1, best)
    return gallery[index].to(old.dtype)


def cosines_with_rows(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return ``(N, K)`` cosines of unit rows ``(N, D)`` with ``(N, K, D)`` unit rows of each."""
    return torch.bmm(others, rows[:, :, None])[:, :, 0]
