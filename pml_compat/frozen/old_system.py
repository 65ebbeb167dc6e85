"""What a user has of an old system, in any form, turned into the form that is needed."""

from __future__ import annotations

from typing import Any

import torch

from .check_centers import check_centers
from .class_centers import ClassCenters
from .classifier import FrozenClassifier, class_directions_of

OldSystem = ClassCenters | FrozenClassifier | tuple[Any, Any]
_HOW = (
    "make one with FrozenClassifier.from_loss(old_loss), .from_layer(old_linear) or "
    "ClassCenters.from_embeddings(embeddings, labels), or give the pair (embeddings, labels) of stored old embeddings"
)


def as_classifier(given: OldSystem, name: str = "old_classifier", scale: float | None = None) -> FrozenClassifier:
    """Return a classifier: the one that is given, or the pseudo-classifier of centres or of stored embeddings.

    Args:
        given: a FrozenClassifier, ClassCenters, or the pair ``(embeddings, labels)`` as for
            ``ClassCenters.from_embeddings``.
        name: what to call it in errors.
        scale: of the pseudo-classifier, see ``FrozenClassifier.from_centers``.
    Raises:
        ValueError: it is something else.
    """
    if isinstance(given, FrozenClassifier):
        return given
    if isinstance(given, ClassCenters) or _is_pair(given):
        return FrozenClassifier.from_centers(as_centers(given, name), scale)
    raise ValueError(f"{name} must be a FrozenClassifier, got {type(given).__name__}; {_HOW}")


def as_centers(given: OldSystem, name: str = "centers", width: int | None = None) -> ClassCenters:
    """Return class centres: those that are given, of stored embeddings, or the directions of a classifier's rows.

    A classifier says nothing of boundaries and sizes.

    Args:
        given: as for :func:`as_classifier`.
        name: what to call it in errors.
        width: the width that they must have; None: any.
    Raises:
        ValueError: it is something else, or of another width.
    """
    if isinstance(given, tuple | list) and _is_pair(given):
        given = ClassCenters.from_embeddings(*given)
    elif isinstance(given, FrozenClassifier):
        rows = class_directions_of(given.rows, given.head.centers_per_class)
        given = ClassCenters(rows, given.labels, directions=given.directions)
    elif not isinstance(given, ClassCenters):
        raise ValueError(f"{name} must be a ClassCenters, got {type(given).__name__}; {_HOW}")
    check_centers(given, name, width)
    return given


def _is_pair(given: Any) -> bool:
    return isinstance(given, tuple | list) and len(given) == 2 and not isinstance(given[0], torch.nn.Module)
