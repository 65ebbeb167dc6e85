"""A rotation between embedding spaces, and a scale for each coordinate after it."""

from __future__ import annotations

from typing import Any

import torch

from .base import Transformation
from .linear import LinearTransformation
from .orthogonal import OrthogonalTransformation
from .pairs import pair_moments


class ScaledOrthogonalTransformation(Transformation):
    r"""A rotation whose coordinates are then stretched or shrunk, each by its own factor.

    .. math:: T(f) = s \odot f R

    ``R`` is :class:`OrthogonalTransformation`'s, its own parameter and buffer included, and may change the width.
    Coordinates of the other space that a rotation cannot foretell get a small factor, so that they do not count.
    Angles are not kept: for queries that have to keep them there is the rotation alone.

    Args:
        in_features: width of the embeddings that come in.
        out_features: width of the embeddings that go out.
    Shape:
        - ``(N, in_features) -> (N, out_features)``
    Example:
        >>> source = torch.randn(50, 2)
        >>> turned = source @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> torch.allclose(ScaledOrthogonalTransformation(2, 2).fit(source, 3 * turned)(source), 3 * turned, atol=1e-4)
        True

    Reference:
        Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 1966; drift adapters
        put a diagonal scaling after it.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.rotation = OrthogonalTransformation(self.in_features, self.out_features)
        self.scale = torch.nn.Parameter(torch.ones(self.out_features))

    def transform(self, embeddings: torch.Tensor, side_info: torch.Tensor | None) -> torch.Tensor:
        """Return ``s * (f R)``."""
        return self.rotation.transform(embeddings, None) * self.scale

    @torch.no_grad()
    def fit(self, source: Any, target: Any) -> ScaledOrthogonalTransformation:
        r"""Fit the rotation by orthogonal Procrustes, then each scale by least squares, in place; return ``self``.

        .. math:: X^\top Y = U \Sigma V^\top, \quad R = U V^\top, \quad
            s_k = \frac{(R^\top X^\top Y)_{kk}}{(R^\top X^\top X R)_{kk}} \ge 0

        Nothing is centred; a coordinate that is 0 in every row keeps the factor 1. One pass in blocks, float64.

        Args:
            source: ``(N, in_features)`` tensor, array or memory map.
            target: ``(N, out_features)``, row i of the same item as row i of ``source``.
        Raises:
            ValueError: lengths or widths that differ, NaN or infinity.
        """
        moments = pair_moments(source, target, self.in_features, self.out_features, self.scale.device)
        cross, gram, rotation = moments.raw_source_target(), moments.raw_source_source(), moments.rotation()
        shared, own = (rotation * cross).sum(0), (rotation * (gram @ rotation)).sum(0)
        self.rotation.base.copy_(rotation)
        self.rotation.generator.zero_()
        self.scale.copy_(torch.where(own > 0, shared / own, 1.0).clamp(min=0))
        return self

    @torch.no_grad()
    def folded(self) -> Transformation:
        """Return the same map as a linear one, its matrix computed once."""
        linear = LinearTransformation(self.in_features, self.out_features, bias=False).to(self.scale)
        linear.linear.weight.copy_((self.rotation.matrix() * self.scale).t())
        return linear.eval()

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"in_features": self.in_features, "out_features": self.out_features}
