"""The explicit map from labels to rows: -1 means unknown to the old system."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import check_labels


class LabelMap(torch.nn.Module):
    """Looks up the row of each label; the labels need not be 0 to C-1, nor sorted.

    Args:
        labels: ``(C,)`` integers, 0 or more, no duplicates; ``labels[i]`` is the label of row ``i``.
    Raises:
        ValueError: a negative or a duplicate label, not one-dimensional, not integers.
    """

    labels: torch.Tensor
    _sorted: torch.Tensor
    _rows: torch.Tensor
    _table: torch.Tensor | None
    gapless: int

    def __init__(self, labels: Any) -> None:
        super().__init__()
        labels = check_labels(labels).clone()
        if len(labels) == 0:
            raise ValueError("labels must not be empty")
        if int(labels.min()) < 0:
            raise ValueError(f"labels must be 0 or more, got {int(labels.min())}; -1 stands for 'unknown', in answers")
        ordered, rows = torch.sort(labels)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            raise ValueError(f"labels must not repeat, got {int(twice[0])} more than once; one row a class")
        self.register_buffer("labels", labels)
        self.register_buffer("_sorted", ordered, persistent=False)
        self.register_buffer("_rows", rows, persistent=False)
        self.register_buffer("_table", _table(ordered, rows), persistent=False)
        self.gapless = _gapless(ordered)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the ``(N,)`` row of each label, -1 where the label is unknown."""
        labels = check_labels(labels).to(self._sorted.device)
        if self._table is not None:
            return self._table.index_select(0, (labels + 1).clamp_(0, len(self._table) - 1))
        position = torch.searchsorted(self._sorted, labels.contiguous()).clamp_(max=len(self._sorted) - 1)
        return torch.where(self._sorted[position] == labels, self._rows[position], -1)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._sorted, self._rows = torch.sort(self.labels)
        self._table, self.gapless = _table(self._sorted, self._rows), _gapless(self._sorted)

    def __len__(self) -> int:
        return len(self.labels)


def _table(ordered: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """Return the row of each label from -1 to one past the last; None where most labels in between are unknown."""
    if ordered.device.type == "meta" or int(ordered[-1]) > 4 * len(ordered) + 1024:
        return None
    table = torch.full((int(ordered[-1]) + 3,), -1, device=ordered.device)
    return table.index_copy_(0, ordered + 1, rows)


def _gapless(ordered: torch.Tensor) -> int:
    """Return for how many labels 0, 1, 2, ... there is a row without a gap."""
    if ordered.device.type == "meta":
        return 0
    return int((ordered == torch.arange(len(ordered), device=ordered.device)).cumprod(0).sum())
