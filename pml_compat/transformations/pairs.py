"""Second moments of paired embeddings, in one pass and bounded memory: what the closed-form maps are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .._checks import check_embeddings

_BLOCK_ROWS = 8192  # rows read at once, so that a memory map stays on disk


@dataclass(frozen=True)
class PairMoments:
    """Means ``(D_in,)``, ``(D_out,)``; sums of outer products about them, ``source_source`` ``(D_in, D_in)`` and
    ``source_target`` ``(D_in, D_out)``; all float64. ``target_energy``: the sum of squares about the target's mean."""

    rows: int
    source_mean: torch.Tensor
    target_mean: torch.Tensor
    source_source: torch.Tensor
    source_target: torch.Tensor
    target_energy: float

    def scaled(self, units: torch.Tensor) -> PairMoments:
        """Return the moments of the source times ``units``, ``(D_in,)``."""
        gram = self.source_source * torch.outer(units, units)
        cross = self.source_target * units[:, None]
        return replace(self, source_mean=self.source_mean * units, source_source=gram, source_target=cross)

    def first(self, width: int) -> PairMoments:
        """Return the moments of the first ``width`` columns of the source."""
        gram, cross = self.source_source[:width, :width], self.source_target[:width]
        return replace(self, source_mean=self.source_mean[:width], source_source=gram, source_target=cross)

    def raw_source_target(self) -> torch.Tensor:
        """Return the sum of outer products about 0 instead of about the means."""
        return self.source_target + self.rows * torch.outer(self.source_mean, self.target_mean)

    def raw_source_source(self) -> torch.Tensor:
        """Return the same of the source with itself."""
        return self.source_source + self.rows * torch.outer(self.source_mean, self.source_mean)

    def rotation(self) -> torch.Tensor:
        """Return the ``(D_source, D_target)`` semi-orthogonal map that best takes source to target (Procrustes)."""
        left, _, right = torch.linalg.svd(self.raw_source_target(), full_matrices=False)
        return left @ right


def pair_moments(source: Any, target: Any, in_features: int, out_features: int, device: torch.device) -> PairMoments:
    """Read row-aligned ``source`` and ``target`` (tensors, arrays, memory maps) once, in blocks, and sum in float64.

    Raises:
        ValueError: lengths that differ, no rows, other widths, NaN or infinity.
    """
    if len(source) != len(target):
        raise ValueError(
            f"target must have one row for each row of source, in the same order: expected {len(source)}, "
            f"got {len(target)}"
        )
    return moments_of(_blocks(source, target, in_features, out_features, device))


def moments_of(blocks: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> PairMoments:
    """Sum float64 blocks of row-aligned ``(rows, D_in)`` and ``(rows, D_out)``; one at least, none of them empty."""
    n, shifts = 0, None
    for x, y in blocks:
        if shifts is None:  # sums about a point near the mean lose nothing when the mean is taken off
            shifts = x.mean(0), y.mean(0)
            sum_x, sum_y = torch.zeros_like(shifts[0]), torch.zeros_like(shifts[1])
            xx, xy = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1], y.shape[1])
            yy = x.new_zeros(())
        n += len(x)
        x, y = x - shifts[0], y - shifts[1]
        sum_x += x.sum(0)
        sum_y += y.sum(0)
        xx.addmm_(x.t(), x)
        xy.addmm_(x.t(), y)
        yy += y.square().sum()
    assert shifts is not None
    xx -= torch.outer(sum_x, sum_x) / n
    xy -= torch.outer(sum_x, sum_y) / n
    energy = max(0.0, float(yy - sum_y.square().sum() / n))
    return PairMoments(n, shifts[0] + sum_x / n, shifts[1] + sum_y / n, xx, xy, energy)


def _blocks(
    source: Any, target: Any, in_features: int, out_features: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, max(1, len(source)), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        x = check_embeddings(source[rows], f"source (from row {start})", in_features)
        y = check_embeddings(target[rows], f"target (from row {start})", out_features)
        yield x.detach().to(device).double(), y.detach().to(device).double()
