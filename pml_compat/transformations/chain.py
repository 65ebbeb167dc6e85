"""Transformations one after another: a gallery carried over several generations of models."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from .base import Transformation, describe, from_description


class TransformationChain(Transformation):
    r"""Transformations composed: old to new to newer, without touching an image.

    .. math:: T(f) = T_k(\dots T_2(T_1(f)))

    Args:
        *transformations: in the order in which they are applied; each takes the width that the one before it gives.
    Shape:
        - ``(N, in_features of the first) -> (N, out_features of the last)``
        - side_info: what the transformations take that take any, side by side in their order:
          ``(N, sum of their side_features)``
    Raises:
        ValueError: none given, something else than a transformation, widths that do not meet.
    Example:
        >>> from pml_compat.transformations import LinearTransformation
        >>> TransformationChain(LinearTransformation(4, 6), LinearTransformation(6, 2))(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(self, *transformations: Transformation) -> None:
        for transformation in transformations:
            if not isinstance(transformation, Transformation):
                raise ValueError(f"transformations must be Transformations, got {type(transformation).__name__}")
        if not transformations:
            raise ValueError("transformations must not be empty")
        for number, (first, second) in enumerate(itertools.pairwise(transformations)):
            if first.out_features != second.in_features:
                raise ValueError(
                    f"transformations must fit each other: number {number} gives width {first.out_features}, "
                    f"number {number + 1} takes {second.in_features}"
                )
        side_features = sum(transformation.side_features or 0 for transformation in transformations)
        super().__init__(transformations[0].in_features, transformations[-1].out_features, side_features or None)
        self.steps = torch.nn.ModuleList(transformations)

    def transform(self, embeddings: torch.Tensor, side_info: torch.Tensor | None) -> torch.Tensor:
        """Apply one after another."""
        widths = [step.side_features or 0 for step in self._transformations()]
        parts: Any = [None] * len(widths) if side_info is None else side_info.split(widths, dim=1)
        for step, width, own in zip(self._transformations(), widths, parts, strict=True):
            embeddings = step.transform(embeddings, own if width else None)
        return embeddings

    def folded(self) -> Transformation:
        """Return the chain of the folded transformations."""
        return TransformationChain(*(step.folded() for step in self._transformations())).eval()

    def _transformations(self) -> list[Transformation]:
        return [step for step in self.steps if isinstance(step, Transformation)]

    def config(self) -> dict[str, Any]:
        """Return the descriptions of the transformations."""
        return {"transformations": [describe(step) for step in self._transformations()]}

    @classmethod
    def from_config(cls, **config: Any) -> TransformationChain:
        """Build the chain, untrained, from what :meth:`config` gave."""
        return cls(*(from_description(description) for description in config["transformations"]))
