"""The one rule for embedding spaces of different widths that are compared without a transformation."""

from __future__ import annotations

import torch


def fit_width(embeddings: torch.Tensor, width: int) -> torch.Tensor:
    r"""Fit embeddings to another space's width: the first ``width`` coordinates, or zeros appended.

    It is BCT's rule (``losses.BCTLoss`` trains by it) and so the rule of every cross-test between models of
    different widths. A wider new model is served to an old gallery as ``fit_width(new, d_old)``.

    Args:
        embeddings: ``(N, D)``.
        width: the width wanted, 1 or more.
    Shape:
        - output: ``(N, width)``; ``embeddings`` itself where ``D == width``.
    Example:
        >>> fit_width(torch.tensor([[1.0, 2.0, 3.0]]), 2)
        tensor([[1., 2.]])
        >>> fit_width(torch.tensor([[1.0, 2.0, 3.0]]), 4)
        tensor([[1., 2., 3., 0.]])

    Reference:
        Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020, as in its public code.
    """
    missing = width - embeddings.shape[1]
    if missing == 0:
        return embeddings
    return embeddings[:, :width] if missing < 0 else torch.nn.functional.pad(embeddings, (0, missing))


def as_wide(
    embeddings: torch.Tensor, other: torch.Tensor, fit: bool, names: tuple[str, str] = ("query", "reference")
) -> torch.Tensor:
    """Return embeddings that can be compared with ``other``: as they are, or, if asked, by :func:`fit_width`.

    Args:
        embeddings: ``(Q, D)``.
        other: ``(N, D_other)``.
        fit: whether the caller asked for :func:`fit_width`.
        names: what to call the two in the error message.
    Raises:
        ValueError: widths that differ, without ``fit``.
    """
    if embeddings.shape[1] != other.shape[1] and not fit:
        raise ValueError(
            f"{names[0]} must be as wide as {names[1]}, got widths {embeddings.shape[1]} and {other.shape[1]}; map one "
            "into the other's space with a transformation, or, where the new model was trained to serve the old "
            "gallery with its first coordinates (as BCT does), say so with fit_width=True"
        )
    return fit_width(embeddings, other.shape[1])
