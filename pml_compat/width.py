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
