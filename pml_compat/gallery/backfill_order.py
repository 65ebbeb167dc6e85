"""Which rows of a transformed gallery to embed anew first, from the gallery and its labels alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._checks import check_finite, check_labels, check_matrix
from .._rows import unit_rows
from ..frozen import ClassCenters

_BATCH_ROWS = 8192  # read at once for the class means
_BLOCK_ELEMENTS = 2**24  # of rows, and of their cosines to all classes, held at once


@torch.no_grad()
def backfill_scores(gallery: Any, labels: Any, by: str = "margin") -> torch.Tensor:
    r"""Score how badly each row of a gallery lies among its classes: the highest are embedded anew first.

    .. math:: s_i = \max_{c \ne y_i} \cos(g_i, \mu_c) - \cos(g_i, \mu_{y_i}), \qquad \text{or} \qquad
        s_i = 1 - \cos(g_i, \mu_{y_i})

    with :math:`\mu_c` the mean of the gallery's unit rows of class :math:`c`. It needs no model and no training, and
    no other labels than those that the gallery answers with. ``backfill_curve(order=backfill_scores(...))`` measures
    what the order is worth.

    **Only for a gallery in the new model's space**, as FCT and other transformations map it, ranked by its cosines as
    they are. Where the gallery is untouched (BCT, LCE), or calibrated by :class:`MixedGallery`, new vectors of the
    worst items stand in front, and a random order is better (``docs/open_set.md``).

    Args:
        gallery: ``(N, D)`` tensor, array or memory map of the transformed old embeddings; of any length, finite. Not of
            a map that was trained with ``FCTLoss``'s contrast: new vectors among such rows harm, these most.
        labels: ``(N,)``, of the gallery.
        by: ``"margin"``, the first formula, in O(N C D) for C classes; ``"distance"``, the second, in O(N D).
    Shape:
        - output: ``(N,)`` float32 on the device of ``gallery``, in [-2, 2] by margin and in [0, 2] by distance
    Raises:
        ValueError: another ``by``; one class alone, by margin; empty, NaN or infinite, lengths that differ; a class
            whose rows cancel out.
    Example:
        >>> gallery = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.6, 0.8]])
        >>> backfill_scores(gallery, torch.tensor([0, 0, 1, 1, 0])).argmax().item()  # between the classes
        4

    Reference:
        The distance: Ricci et al., "λ-Orthogonality Regularization for Compatible Representation Learning",
        arXiv:2509.16664, 2025. The margin is ours.
    """
    if by not in ("margin", "distance"):
        raise ValueError(f'by must be "margin" or "distance", got {by!r}')
    if getattr(gallery, "ndim", None) != 2 or 0 in gallery.shape:
        got = type(gallery).__name__ if getattr(gallery, "shape", None) is None else f"shape {tuple(gallery.shape)}"
        raise ValueError(f"gallery must be a non-empty (N, D) tensor or array, got {got}")
    labels = check_labels(labels, length=len(gallery))
    batches = ((rows, labels[start : start + len(rows)]) for start, rows in _blocks(gallery, _BATCH_ROWS))
    classes = ClassCenters.from_batches(batches, boundary=None)
    if by == "margin" and len(classes) < 2:
        raise ValueError(f'labels must have two classes or more by "margin", got {len(classes)}; give by="distance"')
    centers = classes.centers
    own = classes.index_of(labels.to(centers.device))
    block = max(1, _BLOCK_ELEMENTS // max(centers.shape if by == "margin" else centers.shape[1:]))
    scores = []
    for start, rows in _blocks(gallery, block):
        rows, mine = unit_rows(rows.to(centers.dtype), centers.dtype), own[start : start + block, None]
        if by == "distance":
            scores.append(1 - (rows * centers[mine[:, 0]]).sum(1))
            continue
        cosines = rows @ centers.t()
        own_cosines = cosines.gather(1, mine)[:, 0]
        scores.append(cosines.scatter_(1, mine, -torch.inf).amax(1) - own_cosines)
    return torch.cat(scores).float()


def _blocks(gallery: Any, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Read a gallery in pieces, so that a memory map stays on disk."""
    for start in range(0, len(gallery), size):
        rows = check_matrix(gallery[start : start + size], "gallery")
        check_finite(rows, "gallery", start)
        yield start, rows
