"""The residual bottleneck transformation of cross-model compatibility."""

from __future__ import annotations

import itertools
from typing import Any, cast

import torch

from .._checks import check_integer
from .base import Transformation
from .batch_norm import BatchNorm, is_untrained
from .closed_form import ridge_solution
from .pairs import PairMoments


class ResidualBottleneckTransformation(Transformation):
    r"""Blocks that add narrow, parallel paths to a skip connection: a light map that can bend a space.

    .. math:: \operatorname{block}(x) = S x + \sum_{p=1}^{P} \operatorname{path}_p(x)

    A path is three linear layers, ``d -> hidden -> hidden -> d``, without bias, each with batch normalisation and
    PReLU after it. ``S`` is the identity; in the first block, where the widths differ, a linear projection.
    :func:`fit_transformation` puts the closed-form linear map into the first block of an untrained one.

    Args:
        in_features: width of the embeddings that come in.
        out_features: width of the embeddings that go out.
        hidden_features: width of the bottleneck.
        paths: ``P``, paths in a block.
        blocks: how many blocks.
    Shape:
        - ``(N, in_features) -> (N, out_features)``; in training a batch of one row gets the running statistics
    Raises:
        ValueError: a size below 1.
    Example:
        >>> ResidualBottleneckTransformation(6, 4)(torch.randn(3, 6)).shape
        torch.Size([3, 4])

    Reference:
        Wang et al., "Unified Representation Learning for Cross Model Compatibility", BMVC 2020 (the residual
        bottleneck transformation); Meng et al., "Learning Compatible Embeddings", ICCV 2021, uses it. Sizes and
        epsilon (2e-5) are those of LCE's public code. Differs from it in: the last normalisation of a path starts at
        0, so that the
        untrained map is its skip, :func:`pml_compat.fit_width`; the statistics' momentum is torch's 0.1, because
        at 0.9 the map at search time would be normalised by the last few batches alone; the projection is ours.
    """

    def __init__(
        self, in_features: int, out_features: int, hidden_features: int = 16, paths: int = 4, blocks: int = 4
    ) -> None:
        super().__init__(in_features, out_features)
        self.hidden_features = check_integer(hidden_features, "hidden_features", minimum=1)
        self.paths = check_integer(paths, "paths", minimum=1)
        widths = [self.in_features] + [self.out_features] * (check_integer(blocks, "blocks", minimum=1) - 1)
        self.blocks = torch.nn.Sequential(
            *(_Block(width, self.out_features, self.hidden_features, self.paths) for width in widths)
        )

    def transform(self, embeddings: torch.Tensor, side_info: torch.Tensor | None) -> torch.Tensor:
        """Return what the last block gives."""
        return self.blocks(embeddings)

    def start_from(self, moments: PairMoments) -> bool:
        """Become the closed-form linear map, held still as the first block's ``S``; a trained one stays as it is."""
        if self._has_linear_path() or not is_untrained(self):
            return False
        skip = self._add_linear_path()
        solution, offset = ridge_solution(moments)
        skip.weight.copy_(solution.t())
        skip.bias.copy_(offset)
        self.back_to_start()
        return True

    @torch.no_grad()
    def back_to_start(self) -> None:
        """Set the last normalisation of every path to 0."""
        for block in self.blocks:
            for path in cast(torch.nn.ModuleList, block.paths):
                for parameter in cast(torch.nn.Sequential, path)[-2].parameters():
                    parameter.zero_()

    def _has_linear_path(self) -> bool:
        return getattr(self.blocks[0].skip, "bias", None) is not None

    def _add_linear_path(self) -> torch.nn.Linear:
        skip = torch.nn.Linear(self.in_features, self.out_features).to(next(self.parameters()))
        self.blocks[0].skip = skip.requires_grad_(False)
        return skip

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Load what was saved with the closed-form map in it, or without."""
        if f"{prefix}blocks.0.skip.bias" in state_dict and not self._has_linear_path():
            self._add_linear_path()
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "hidden_features": self.hidden_features,
            "paths": self.paths,
            "blocks": len(self.blocks),
        }


class _Block(torch.nn.Module):
    def __init__(self, in_features: int, out_features: int, hidden_features: int, paths: int) -> None:
        super().__init__()
        self.skip: torch.nn.Module = torch.nn.Identity()
        if in_features != out_features:
            self.skip = torch.nn.Linear(in_features, out_features, bias=False)
            torch.nn.init.eye_(self.skip.weight)
        self.paths = torch.nn.ModuleList(_path(in_features, out_features, hidden_features) for _ in range(paths))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return sum((path(embeddings) for path in self.paths), self.skip(embeddings))


def _path(in_features: int, out_features: int, hidden_features: int) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    widths = [in_features, hidden_features, hidden_features, out_features]
    for before, after in itertools.pairwise(widths):
        norm = BatchNorm(after, eps=2e-5)
        layers += [torch.nn.Linear(before, after, bias=False), norm, torch.nn.PReLU(after)]
    torch.nn.init.zeros_(norm.weight)
    return torch.nn.Sequential(*layers)
