"""The closed-form linear map under a network, and the units in which the network works."""

from __future__ import annotations

from typing import Any

import torch

from .closed_form import measured_ridge, ridge_solution
from .pairs import PairMoments


class LinearPath(torch.nn.Module):
    r"""A fitted linear map, held still, to which a network adds what is not linear.

    .. math:: T(x) = W x + b + e \odot \operatorname{network}(u \odot x)

    ``u`` and ``e`` are the units of the source and of what the linear map leaves: with them the network sees and gives
    numbers of about 1, whatever the scale of the embeddings, and one learning rate serves all. Buffers, so that they
    are saved, loaded and exported with the transformation, and no training spoils the closed form.

    Args:
        in_features: width of the source, side-information included.
        out_features: width of the target.
    Shape:
        - rows ``(N, in_features) -> (N, out_features)``
    """

    weight: torch.Tensor
    bias: torch.Tensor
    source_units: torch.Tensor
    error_units: torch.Tensor
    mean: torch.Tensor
    kept: torch.Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(out_features, in_features))
        self.register_buffer("bias", torch.zeros(out_features))
        self.register_buffer("source_units", torch.ones(in_features))
        self.register_buffer("error_units", torch.ones(out_features))
        self.register_buffer("mean", torch.zeros(out_features))  # that rows were drawn to, and the share they kept
        self.register_buffer("kept", torch.ones(()))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``W x + b``."""
        return torch.nn.functional.linear(rows, self.weight, self.bias)

    @torch.no_grad()
    def fit(self, moments: PairMoments, embedding_width: int) -> None:
        """Take the closed form and the units of the pairs.

        Side-information, which stands after the embedding, has a unit of its own, so that one ridge serves both; it
        is left out where generalised cross-validation says that it costs more than it tells.

        Args:
            moments: of the pairs; a target narrower than ``out_features`` leaves the other outputs at 0.
            embedding_width: how many columns of the source are the embedding.
        """
        variances = moments.source_source.diagonal().clamp(min=0) / moments.rows
        parts = [part for part in variances.tensor_split([embedding_width]) if len(part)]
        variances = torch.cat([part.mean().expand(len(part)) for part in parts])
        units = torch.where(variances > 0, variances, 1.0).rsqrt()
        scaled = moments.scaled(units)
        alone = scaled.first(embedding_width)
        used = embedding_width if len(parts) > 1 and _error(alone) <= _error(scaled) else len(units)
        solution, offset = ridge_solution(scaled.first(used))
        outputs = len(offset)
        self.weight[:outputs, :used] = (solution * units[:used, None]).t().to(self.weight)
        self.bias[:outputs] = offset.to(self.bias)
        self.source_units.copy_(units)
        # An exact map leaves rounding alone, which is no unit.
        left = max(self.variance_left(moments), 1e-6 * moments.target_energy / (moments.rows * outputs))
        self.error_units[:outputs] = left**0.5 if left > 0 else 1.0

    def variance_left(self, moments: PairMoments) -> float:
        """Return the mean squared error of a coordinate on the pairs."""
        weight = self.weight[: len(moments.target_mean)].double().t()
        explained = ((2 * moments.source_target - moments.source_source @ weight) * weight).sum()
        return max(0.0, moments.target_energy - float(explained)) / moments.source_target.shape[1] / moments.rows

    @torch.no_grad()
    def shrink(self, mean: torch.Tensor, kept: float) -> None:
        """Keep a share of what the sum of both differs by from ``mean``, in place."""
        self.mean.copy_(mean)
        self.kept.fill_(kept)
        for tensor in (self.weight, self.bias, self.error_units):
            tensor.mul_(self.kept)
        self.bias.add_(self.mean * (1 - self.kept))

    @torch.no_grad()
    def unshrink(self) -> None:
        """Undo :meth:`shrink`, in place."""
        self.bias.sub_(self.mean * (1 - self.kept))
        for tensor in (self.weight, self.bias, self.error_units):
            tensor.div_(self.kept)
        self.kept.fill_(1.0)

    def keep_output(self, column: int) -> None:
        """Give one output alone, in place."""
        kept = slice(column, column + 1 or None)
        for name in ("weight", "bias", "error_units", "mean"):
            setattr(self, name, getattr(self, name)[kept])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Load what was saved before it was kept how far rows are drawn, too."""
        before = {"mean": torch.zeros_like(self.mean), "kept": torch.ones_like(self.kept)}
        state_dict = {f"{prefix}{name}": tensor for name, tensor in before.items()} | state_dict
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _error(moments: PairMoments) -> float:
    return measured_ridge(moments.source_source, moments.source_target, moments.target_energy, moments.rows)[1]
