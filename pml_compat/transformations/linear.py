"""A linear map between embedding spaces."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import check_number
from .base import Transformation
from .closed_form import ridge_solution
from .lambda_orthogonal import lambda_orthogonal_solution
from .pairs import pair_moments


class LinearTransformation(Transformation):
    r"""An affine map, trained like any module or fitted in closed form.

    .. math:: T(f) = W f + b

    For a gallery. Queries that are mapped into an old space are rotated instead
    (:class:`~pml_compat.serving.QueryBlend`, :class:`OrthogonalTransformation`): a regression draws them to the mean.

    Untrained it is :func:`pml_compat.fit_width`: the first coordinates, or zeros appended.

    Args:
        in_features: width of the embeddings that come in.
        out_features: width of the embeddings that go out.
        bias: whether there is a ``b``.
    Shape:
        - ``(N, in_features) -> (N, out_features)``
    Example:
        >>> source = torch.randn(50, 3)
        >>> transformation = LinearTransformation(3, 2).fit(source, source[:, :2] + 1)
        >>> torch.allclose(transformation(source), source[:, :2] + 1, atol=1e-4)
        True

    Reference:
        The closed form is ridge regression on paired embeddings, as drift adapters use it. ``deviation`` is after
        "Lambda-orthogonality regularization", arXiv:2509.16664, 2025.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features)
        self.linear = torch.nn.utils.skip_init(torch.nn.Linear, self.in_features, self.out_features, bias=bias)
        torch.nn.init.eye_(self.linear.weight)
        if bias:
            torch.nn.init.zeros_(self.linear.bias)

    def transform(self, embeddings: torch.Tensor, side_info: torch.Tensor | None) -> torch.Tensor:
        """Return ``W f + b``."""
        return self.linear(embeddings)

    @torch.no_grad()
    def fit(
        self, source: Any, target: Any, ridge: float | None = None, *, deviation: float | None = None
    ) -> LinearTransformation:
        r"""Fit by least squares with a ridge penalty, in place; return ``self``.

        .. math:: W^\top = (X_c^\top X_c + \alpha N I)^{-1} X_c^\top Y_c, \qquad b = \bar y - W \bar x

        ``X_c`` and ``Y_c`` are centred, where there is a bias. One pass over the data, in blocks; sums and Cholesky
        solve in float64.

        Args:
            source: ``(N, in_features)`` tensor, array or memory map.
            target: ``(N, out_features)``, row i of the same item as row i of ``source``.
            ridge: ``alpha``, 0 or more, in squared units of ``source``; more shrinks the map where pairs are few or
                noisy. None: what generalised cross-validation over the pairs says, at any scale of the embeddings.
            deviation: in place of a ridge, how far ``W`` may be from a rotation before it costs: lambda, which the
                Frobenius norm of :math:`W^\top W - I` is held to, 0 or more. For rows of length 1 whose angles have to
                be kept, nearly; 0 is all but a rotation, and :class:`OrthogonalTransformation` is one.
        Raises:
            ValueError: lengths or widths that differ, NaN or infinity; ``ridge`` 0 and ``source`` without full rank;
                ``ridge`` and ``deviation`` together.
        """
        if ridge is not None:
            ridge = check_number(ridge, "ridge", minimum=0)
        if deviation is not None:
            deviation = check_number(deviation, "deviation", minimum=0)
            if ridge is not None:
                raise ValueError(f"deviation must be None where ridge is given, got {deviation:g} and ridge {ridge:g}")
        weight, bias = self.linear.weight, self.linear.bias
        moments = pair_moments(source, target, self.in_features, self.out_features, weight.device)
        if deviation is None:
            solution, offset = ridge_solution(moments, ridge, centred=bias is not None)
        else:
            solution, offset = lambda_orthogonal_solution(moments, deviation, centred=bias is not None)
        weight.copy_(solution.t())
        if bias is not None:
            bias.copy_(offset)
        return self

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        bias = self.linear.bias is not None
        return {"in_features": self.in_features, "out_features": self.out_features, "bias": bias}
