"""What has to be class centres, and of which width."""

from __future__ import annotations

from typing import Any

from .class_centers import ClassCenters


def check_centers(centers: Any, name: str = "centers", width: int | None = None) -> None:
    """Raise a ValueError where ``centers`` is no ClassCenters, or not ``width`` wide."""
    if not isinstance(centers, ClassCenters):
        raise ValueError(
            f"{name} must be a ClassCenters, got {type(centers).__name__}; "
            "make one with ClassCenters.from_embeddings(embeddings, labels)"
        )
    if width is not None and centers.centers.shape[1] != width:
        raise ValueError(f"{name} must be {width} wide, got width {centers.centers.shape[1]}")
