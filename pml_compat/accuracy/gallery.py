"""The gallery's rows: all here, or a part of them in each process of a group."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ..distributed import gathered, gathered_parts
from .items import as_values

_BLOCK = 2**19  # numbers turned to float64 at once


class Gallery:
    """What ranking asks of the gallery: products with queries, and the lengths of its rows.

    Args:
        rows: ``(N, D)``; with ``group``, this process's part.
        group: a ``torch.distributed`` process group. Every process asks for the same products, and gets them against
            the rows of all of them, in the order of the ranks.
    """

    def __init__(self, rows: torch.Tensor, group: Any = None) -> None:
        self.rows, self.group = rows, group
        self._norms: torch.Tensor | None = None
        self.sizes = [len(rows)] if group is None else gathered(len(rows), group)
        self.rows32 = rows.float()
        half_norms = _half_norms(self.rows32)
        low, high = half_norms.min(), half_norms.max()
        if group is not None:
            low, high = torch.stack(gathered(low.cpu(), group)).min(), torch.stack(gathered(high.cpu(), group)).max()
        self.half_longest = high.to(rows.device)
        # Rows of unit length differ by their rounding; without them a query's scores keep their order.
        same_length = bool(high - low <= 8 * torch.finfo(torch.float32).eps * high)
        self.half_norms = None if same_length else half_norms

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.device

    @property
    def exact_rows(self) -> torch.Tensor:
        """The rows as they were given, in float32 or float64: NumPy has no bfloat16."""
        return self.rows if self.rows.dtype == torch.float64 else self.rows32

    def scores(self, query: torch.Tensor, out: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """Put half the squared distances less the query's share of them, in float32, into the ``(q, N)`` ``out``.

        Without a group, ``columns`` asks for some of the rows alone.
        """

        def product(out: torch.Tensor) -> torch.Tensor:
            rows = self.rows32[columns].t()
            with torch.autocast(query.device.type, enabled=False):
                if self.half_norms is None:
                    return torch.mm(-query, rows, out=out)
                return torch.addmm(self.half_norms[columns], query, rows, alpha=-1, out=out)

        if self.group is None:
            return product(out)
        return self._joined(product(out.new_empty(len(query), len(self.rows))), out)

    def largest_scores(self, query: torch.Tensor) -> torch.Tensor:
        """Return what a query's :meth:`scores` are at most, in absolute value, ``(Q, 1)``."""
        return query.norm(dim=1, keepdim=True) * self.half_longest.mul(2).sqrt() + self.half_longest

    def rounding(self, query: torch.Tensor) -> torch.Tensor | None:
        """Return by how much a query's :meth:`scores` may be off, ``(Q, 1)``; None where that is not known."""
        size = self.largest_scores(query)
        precise = torch.get_float32_matmul_precision() == "highest" and query.device.type != "mps"
        if not (precise and bool(torch.isfinite(size).all()) and float(size.min()) > 1e-20):
            return None
        # The error of a product grows with the square root of its terms; then inputs may have been rounded, unit rows
        # differ in length by as much, and scores are rounded once more when they are scaled.
        return (5 + math.sqrt(query.shape[1]) / 4) * torch.finfo(torch.float32).eps * size

    def squared_distances(self, query: torch.Tensor) -> torch.Tensor:
        """Return ``(q, N)`` squared Euclidean distances less each query's own norm, in float64.

        Within a row the order, which is all that ranks need, is that of the Euclidean distance.
        """
        dtype = torch.float32 if query.device.type == "mps" else torch.float64
        query = query.to(dtype)
        distances = query.new_empty(len(query), len(self.rows))
        new = self._norms is None
        norms = query.new_empty(len(self.rows)) if self._norms is None else self._norms
        size = max(1, _BLOCK // self.rows.shape[1])
        for first in range(0, len(self.rows), size):
            block = self.rows[first : first + size].to(dtype)
            if new:
                norms[first : first + size] = block.square().sum(1)
            distances[:, first : first + size] = torch.addmm(norms[first : first + size], query, block.t(), alpha=-2)
        self._norms = norms  # asked for a few queries at a time
        return distances if self.group is None else self._joined(distances, None)

    def _joined(self, part: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """Set the columns of all processes side by side."""
        columns = gathered_parts(part, self.sizes, self.group, dim=1)
        return torch.cat(columns, dim=1) if out is None else torch.cat(columns, dim=1, out=out)


def galleries_to_mix(old: torch.Tensor, new: torch.Tensor) -> tuple[Gallery, Gallery]:
    """Return two galleries whose scores can be compared with each other."""
    pair = Gallery(old), Gallery(new)
    longest = torch.maximum(*(one.half_longest for one in pair))
    shortest = torch.minimum(*(one.half_longest for one in pair))
    alike = bool(longest - shortest <= 8 * torch.finfo(torch.float32).eps * longest)
    for one in pair:
        one.half_longest = longest
        if not alike or any(other.half_norms is not None for other in pair):
            one.half_norms = _half_norms(one.rows32)
    return pair


def _half_norms(rows: torch.Tensor) -> torch.Tensor:
    """Return half the squared length of each row, exact for small whole numbers."""
    blocks = rows.split(max(1, _BLOCK // rows.shape[1]))
    return torch.cat([block.square().sum(1) for block in blocks]).mul_(0.5)


def joined(part: Any, group: Any) -> torch.Tensor | np.ndarray | None:
    """Set the ``(n,)`` labels, ids or cameras of all processes one after the other; None where no process has any."""
    parts = gathered(part.cpu() if isinstance(part, torch.Tensor) else part, group)
    if all(one is None for one in parts):
        return None
    if any(one is None for one in parts):
        raise ValueError("reference_ids and reference_cameras must be given in every process of gallery_group, or none")
    if all(isinstance(one, torch.Tensor) for one in parts):
        return torch.cat(parts)
    return np.concatenate([as_values(one, "reference_ids and reference_cameras") for one in parts])
