"""How far embeddings lie outside the boundaries of their classes."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import relu

from ..frozen import ClassCenters

BoundaryForm = Literal["angle", "cosine"]  # in what is compared; ClassCenters knows how boundaries are measured
_NEAR_ONE = 1 - 1e-6  # arccos has an infinite slope at 1


def check_boundary_form(boundary: BoundaryForm, centers: ClassCenters, name: str, weight: float | None) -> BoundaryForm:
    """Return ``boundary``; raise a ValueError where it is unknown, or has a weight and ``centers`` no boundaries."""
    if boundary not in ("angle", "cosine"):
        raise ValueError(f"boundary must be 'angle' or 'cosine', got {boundary!r}")
    if weight and centers.boundaries is None:
        raise ValueError(
            f"{name} must have boundaries, got none; measure them with boundary='max' or 'iqr', "
            "or pass boundary_weight=0"
        )
    return boundary


def with_boundary(centers: ClassCenters) -> torch.Tensor:
    """Return which classes have a boundary that says something, ``(C,)`` bool: not those of one sample."""
    return torch.ones_like(centers.labels, dtype=torch.bool) if centers.counts is None else centers.counts > 1


def outside_boundary(cosines: torch.Tensor, boundaries: torch.Tensor, kind: BoundaryForm) -> torch.Tensor:
    """Return by how much each sample lies outside: ``(N,)`` angles in radians, or differences of cosines, 0 inside.

    Args:
        cosines: ``(N,)``, of each sample with the centre of its class.
        boundaries: ``(N,)``, the angle in radians of its class's boundary.
        kind: ``"angle"`` or ``"cosine"``.
    """
    if kind == "angle":
        return relu(cosines.clamp(-_NEAR_ONE, _NEAR_ONE).arccos() - boundaries)
    return relu(boundaries.cos() - cosines)
