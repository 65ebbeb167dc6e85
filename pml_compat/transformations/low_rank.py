"""A linear map of low rank between embedding spaces."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import check_integer, check_number
from .base import Transformation
from .closed_form import ridge_solution
from .pairs import pair_moments


class LowRankTransformation(Transformation):
    r"""An affine map through a few directions, trained like any module or fitted in closed form.

    .. math:: T(f) = B A f + b, \qquad A \in \mathbb{R}^{r \times d_{in}}, \; B \in \mathbb{R}^{d_{out} \times r}

    It has ``r (d_in + d_out)`` weights where a full one has ``d_in d_out``, and leaves out what pairs tell least of.
    Untrained it passes the first ``r`` coordinates on, and zeros for the others.

    Args:
        in_features: width of the embeddings that come in.
        out_features: width of the embeddings that go out.
        rank: ``r``, from 1 to the narrower of the two widths.
    Shape:
        - ``(N, in_features) -> (N, out_features)``
    Raises:
        ValueError: ``rank`` above the narrower width.
    Example:
        >>> source = torch.randn(50, 4)
        >>> target = source[:, :1] @ torch.tensor([[1.0, 2.0, 3.0]])
        >>> torch.allclose(LowRankTransformation(4, 3, rank=1).fit(source, target)(source), target, atol=1e-4)
        True

    Reference:
        Izenman, "Reduced-rank regression for the multivariate linear model", Journal of Multivariate Analysis 1975;
        low-rank affine maps are one kind of drift adapter.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__(in_features, out_features)
        self.rank = check_integer(rank, "rank", minimum=1)
        narrower = min(self.in_features, self.out_features)
        if self.rank > narrower:
            raise ValueError(
                f"rank must be at most the narrower width, {narrower}, got {rank}; see LinearTransformation"
            )
        self.down = torch.nn.utils.skip_init(torch.nn.Linear, self.in_features, self.rank, bias=False)
        self.up = torch.nn.utils.skip_init(torch.nn.Linear, self.rank, self.out_features)
        for weight in (self.down.weight, self.up.weight):
            torch.nn.init.eye_(weight)
        torch.nn.init.zeros_(self.up.bias)

    def transform(self, embeddings: torch.Tensor, side_info: torch.Tensor | None) -> torch.Tensor:
        """Return ``B A f + b``."""
        return self.up(self.down(embeddings))

    @torch.no_grad()
    def fit(self, source: Any, target: Any, ridge: float | None = None) -> LowRankTransformation:
        r"""Fit by reduced-rank ridge regression, in place; return ``self``.

        .. math:: A^\top = W V_r, \quad B = V_r, \quad b = \bar y - B A \bar x, \qquad
            W = (X_c^\top X_c + \alpha N I)^{-1} X_c^\top Y_c, \quad W^\top X_c^\top Y_c = V \Lambda V^\top

        No other map of this rank has a smaller penalised squared error. One pass over the data, in blocks; float64.

        Args:
            source: ``(N, in_features)`` tensor, array or memory map.
            target: ``(N, out_features)``, row i of the same item as row i of ``source``.
            ridge: ``alpha``, 0 or more, in squared units of ``source``. None: what generalised cross-validation says
                of the map of full rank.
        Raises:
            ValueError: lengths or widths that differ, NaN or infinity; ``ridge`` 0 and ``source`` without full rank.
        """
        if ridge is not None:
            ridge = check_number(ridge, "ridge", minimum=0)
        moments = pair_moments(source, target, self.in_features, self.out_features, self.up.weight.device)
        solution, _ = ridge_solution(moments, ridge)
        directions = torch.linalg.eigh(solution.t() @ moments.source_target).eigenvectors[:, -self.rank :]
        down = solution @ directions
        self.down.weight.copy_(down.t())
        self.up.weight.copy_(directions)
        self.up.bias.copy_(moments.target_mean - moments.source_mean @ down @ directions.t())
        return self

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank}
