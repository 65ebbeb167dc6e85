"""Two embedding spaces on one sphere: the rotation between them, the way between two rows, how alike they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import normalize

from .._checks import check_matrix, stored_rows
from .._rows import second_moments, unit_rows_as_given, whitening
from ..transformations import OrthogonalTransformation

_SHORT_ARC, _NEAR_OPPOSITE = 1e-4, 2e-3  # radians
_SPHERING = 0.25  # power of both models' covariances, by which they are divided before a rotation is sought
_WHITENING = 0.35  # power of the old rows' second moments, by which such queries are divided
_AS_THEY_STAND = 0.2  # by which those are that the plain rotation gives
_ALIKE = 0.9  # share of the best rotation's cosines that rows have without one, of models trained to fit


class QueryMap(NamedTuple):
    """What takes a new model's rows into the old space.

    Args:
        matrix: ``(D_new, D_old)`` float32.
        offset: ``(D_old,)`` float32, taken from rows of length 1; as many times longer from longer ones.
    """

    matrix: torch.Tensor
    offset: torch.Tensor

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``(N, D_old)`` rows, as long as they come, on the device and in the dtype of ``rows``."""
        matrix, offset = self.matrix.to(rows), self.offset.to(rows)
        return rows @ matrix - torch.linalg.vector_norm(rows, dim=1, keepdim=True) * offset


def as_they_are(source: torch.Tensor, target: torch.Tensor) -> QueryMap:
    """Return the map to the first coordinates."""
    matrix = torch.eye(source.shape[1], target.shape[1], device=source.device)
    return QueryMap(matrix, matrix.new_zeros(target.shape[1]))


def procrustes(source: torch.Tensor, target: torch.Tensor) -> QueryMap:
    """Return the semi-orthogonal map that best takes unit rows to unit rows."""
    fitted = OrthogonalTransformation(source.shape[1], target.shape[1]).fit(source, target)
    matrix = fitted.base.to(source.device, torch.float32)
    return QueryMap(matrix, matrix.new_zeros(target.shape[1]))


def whitened(source: torch.Tensor, target: torch.Tensor) -> QueryMap:
    r"""Return :func:`procrustes` followed by :math:`C^{-0.2}`, ``C`` the second moments of ``target``.

    Cosines are mostly made of the few directions in which all rows are alike; queries have less of these then.
    """
    matrix, offset = procrustes(source, target)
    return QueryMap(matrix @ whitening(second_moments(target), _AS_THEY_STAND), offset)


def sphered(source: torch.Tensor, target: torch.Tensor) -> QueryMap:
    r"""Return the rotation of differences from the mean, found and followed by a whitening in part.

    .. math:: v = (f - m) R C^{-0.35}, \quad P Q^T = R, \quad
        C_f^{-1/4} F^T U C_u^{-1/4} = P S Q^T

    ``F`` and ``U`` are the centred rows, :math:`C_f` and :math:`C_u` their covariances and ``C`` the second moments of
    ``target``, each 1 in its largest direction. What all rows share says nothing of which are alike; and the few
    directions in which they differ most would decide alone where the others are turned to.
    """
    mean = source.mean(0)
    source, centred = source - mean, target - target.mean(0)
    first, last = (whitening(second_moments(rows), _SPHERING).double() for rows in (source, centred))
    left, _, right = torch.linalg.svd(first @ (source.t() @ centred).double() @ last, full_matrices=False)
    matrix = (left @ right @ whitening(second_moments(target), _WHITENING).double()).float()
    return QueryMap(matrix, mean @ matrix)


def stand_alike(source: torch.Tensor, target: torch.Tensor) -> bool:
    """Tell whether unit rows, as they are, have nearly the cosines to ``target`` that the best rotation would give."""
    products = (source.t() @ target).double()
    return float(products.diagonal().sum()) >= _ALIKE * float(torch.linalg.svdvals(products).sum())


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
