"""Queries of classes that are known, drawn to the direction of theirs."""

from __future__ import annotations

import torch

from .._rows import at_least_float32, no_autocast, unit_rows_as_given

_BLOCK = 2**24  # cosines at once


def nearest_direction(rows: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Return which of ``(C, D)`` unit rows each of ``(N, D)`` rows has the largest cosine with, ``(N,)``.

    No ``(N, C)`` tensor is held.
    """
    with no_autocast(rows):
        rows, aims = at_least_float32(rows), directions.to(at_least_float32(rows)).t()
        return torch.cat([(block @ aims).argmax(1) for block in rows.split(max(1, _BLOCK // len(directions)))])


def half_way(queries: torch.Tensor, directions: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the unit rows half way between each query and the direction chosen for it; a row of 0 stays 0."""
    unit = unit_rows_as_given(at_least_float32(queries))
    drawn = unit + directions.to(unit)[chosen]
    return unit_rows_as_given(torch.where((unit == 0).all(1, keepdim=True), unit, drawn)).to(queries.dtype)


def check_known(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return rows of classes; raise a ValueError where a label has none."""
    if bool((rows < 0).any()):
        unknown = torch.unique(labels[rows < 0]).tolist()
        raise ValueError(
            f"labels must be of classes that have a centre, got {unknown[:5]} of {len(unknown)} others; search with "
            "the queries as they are where their class is not known"
        )
    return rows
