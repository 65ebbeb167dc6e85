"""Queries of classes that are known, drawn to the direction of the one they are most like."""

from __future__ import annotations

import torch

from .._rows import at_least_float32, no_autocast, unit_rows_as_given

_BLOCK = 2**24  # cosines at once


def half_way_to_nearest(queries: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    r"""Return the unit rows half way between each query and the direction with which its cosine is largest.

    Args:
        queries: ``(N, D)``; a row of 0 stays 0.
        directions: ``(C, D)`` unit rows.
    Shape:
        - output: ``(N, D)``, in the dtype of the queries; no ``(N, C)`` tensor is held
    """
    with no_autocast(queries):
        unit = unit_rows_as_given(at_least_float32(queries))
        directions = directions.to(unit)
        blocks = unit.split(max(1, _BLOCK // len(directions)))
        drawn = torch.cat([block + directions[(block @ directions.t()).argmax(1)] for block in blocks])
        return unit_rows_as_given(torch.where((unit == 0).all(1, keepdim=True), unit, drawn)).to(queries.dtype)
