"""A rotation between embedding spaces."""

from __future__ import annotations

from typing import Any

import torch

from .._rows import at_least_float32
from .base import Transformation
from .linear import LinearTransformation
from .pairs import pair_moments


class OrthogonalTransformation(Transformation):
    r"""A map with orthonormal rows or columns: between equal widths it changes no distance and no angle.

    .. math:: T(f) = f R, \qquad R = \begin{cases} e^{A - A^\top} R_0 & d_{in} \ge d_{out} \\
        R_0 \, e^{A - A^\top} & d_{in} < d_{out} \end{cases}

    ``R_0`` is a buffer, the identity (first coordinates, or zeros appended) until :meth:`fit`; ``A`` is the
    parameter, so that the map stays orthogonal while it is trained. With ``d_in < d_out`` rows are orthonormal and
    all distances kept; with ``d_in > d_out`` columns are, and the map is a projection.

    Args:
        in_features: width of the embeddings that come in.
        out_features: width of the embeddings that go out.
    Shape:
        - ``(N, in_features) -> (N, out_features)``
    Example:
        >>> source = torch.randn(50, 2)
        >>> turned = source @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> torch.allclose(OrthogonalTransformation(2, 2).fit(source, turned)(source), turned, atol=1e-5)
        True

    Reference:
        Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 1966; the exponential
        of a skew-symmetric matrix is how orthogonal adapters are trained.
    """

    base: torch.Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        widest = max(self.in_features, self.out_features)
        self.generator = torch.nn.Parameter(torch.zeros(widest, widest))
        self.register_buffer("base", torch.eye(self.in_features, self.out_features))

    def matrix(self) -> torch.Tensor:
        """Return ``R``, ``(in_features, out_features)``."""
        with torch.autocast(self.generator.device.type, enabled=False):
            precise = at_least_float32(self.generator)
            rotation = torch.linalg.matrix_exp(precise - precise.t()).to(self.base.dtype)
            return rotation @ self.base if self.in_features >= self.out_features else self.base @ rotation

    def transform(self, embeddings: torch.Tensor, side_info: torch.Tensor | None) -> torch.Tensor:
        """Return ``f R``."""
        return embeddings @ self.matrix()

    @torch.no_grad()
    def fit(self, source: Any, target: Any) -> OrthogonalTransformation:
        r"""Fit by orthogonal Procrustes, in place; return ``self``.

        With :math:`X^\top Y = U \Sigma V^\top` (thin), :math:`R = U V^\top` maximises :math:`\sum_i \langle x_i R, y_i
        \rangle`. Nothing is centred: the origin of a cosine space means something. One pass in blocks, float64.

        Args:
            source: ``(N, in_features)`` tensor, array or memory map.
            target: ``(N, out_features)``, row i of the same item as row i of ``source``.
        Raises:
            ValueError: lengths or widths that differ, NaN or infinity.
        """
        moments = pair_moments(source, target, self.in_features, self.out_features, self.base.device)
        self.base.copy_(moments.rotation())
        self.generator.zero_()
        return self

    def folded(self) -> Transformation:
        """Return the same map as a linear one, its matrix computed once."""
        linear = LinearTransformation(self.in_features, self.out_features, bias=False).to(self.base)
        with torch.no_grad():
            linear.linear.weight.copy_(self.matrix().t())
        return linear.eval()

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"in_features": self.in_features, "out_features": self.out_features}
