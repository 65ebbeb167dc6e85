"""Two embedding spaces on one sphere: the rotation between them, the way between two rows, how alike they are."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import normalize

from .._checks import check_matrix, stored_rows
from .._rows import second_moments, unit_rows_as_given, whitening
from ..transformations import OrthogonalTransformation

_SHORT_ARC, _NEAR_OPPOSITE = 1e-4, 2e-3  # radians
_POWER = 0.2  # of the old rows' second moments, by which whitened queries are divided


def procrustes(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the ``(D_source, D_target)`` semi-orthogonal map that best takes unit rows to unit rows, float32."""
    fitted = OrthogonalTransformation(source.shape[1], target.shape[1]).fit(source, target)
    return fitted.base.to(source.device, torch.float32)


def whitened(rotation: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return a rotation to the space of ``target`` times the power -0.2 of its rows' second moments, float32.

    Cosines are mostly made of the few directions in which all rows are alike; queries have less of these then.
    """
    return rotation @ whitening(second_moments(target), _POWER).to(rotation)


def interpolate(u: torch.Tensor, v: torch.Tensor, share: float) -> torch.Tensor:
    """Return the unit rows at ``share`` of the way from ``u`` to ``v`` on the great circle."""
    if share in (0.0, 1.0):
        return v if share else u
    first, second = coefficients((u * v).sum(1, keepdim=True), share)
    return unit_rows_as_given(first * u + second * v)


def coefficients(cosine: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the two ends weigh, but for a factor: along the chord of a short arc; of opposite ends the first."""
    angle = cosine.clamp(-1, 1).arccos()
    short, opposite = angle < _SHORT_ARC, angle > torch.pi - _NEAR_OPPOSITE
    first = torch.where(short, 1 - share, torch.sin((1 - share) * angle))
    second = torch.where(short, share, torch.sin(share * angle))
    return torch.where(opposite, 1.0, first), torch.where(opposite, 0.0, second)


def alignability(old: Any, new: Any, *, max_rows: int = 2048, seed: int = 0) -> float:
    r"""Measure how far two models disagree about which items are alike, before anything is fitted.

    .. math:: \sqrt{\operatorname{mean}_{i \ne j} (\langle u_i, u_j \rangle - \langle v_i, v_j \rangle)^2}

    over unit rows: 0 where one space is a rotation of the other. The error of the best rotation is bounded by it.

    Args:
        old: ``(N, D_old)`` tensor, array or memory map.
        new: ``(N, D_new)``, row i of the same item.
        max_rows: of more items, that many are drawn at random.
        seed: of that draw.
    Raises:
        ValueError: lengths that differ, fewer than two rows, NaN or infinity.
    Reference:
        arXiv:2510.13406, 2025.
    """
    if len(old) != len(new) or len(old) < 2:
        raise ValueError(f"old and new must have the same two items or more, got {len(old)} and {len(new)} rows")
    index = torch.randperm(len(old), generator=torch.Generator().manual_seed(seed))[:max_rows]
    u, v = (unit_embeddings(stored_rows(rows, index, name), name) for rows, name in ((old, "old"), (new, "new")))
    difference = u @ u.t() - v @ v.t()
    difference.fill_diagonal_(0)
    return float((difference.square().sum() / (len(u) * (len(u) - 1))).sqrt())


def unit_embeddings(rows: Any, name: str) -> torch.Tensor:
    """Return checked rows of length 1, in float32."""
    return normalize(check_matrix(rows, name).detach().float(), dim=1)
