"""The explicit map from labels to rows: -1 means unknown to the old system."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_labels


class LabelMap(torch.nn.Module):
    """Looks up the row of each label by binary search; the labels need not be 0 to C-1, nor sorted.

    Args:
        labels: ``(C,)`` integers, 0 or more, no duplicates; ``labels[i]`` is the label of row ``i``.
    Raises:
        ValueError: a negative or a duplicate label, not one-dimensional, not integers.
    """

    labels: torch.Tensor
    _sorted: torch.Tensor
    _rows: torch.Tensor

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

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the ``(N,)`` row of each label, -1 where the label is unknown."""
        labels = check_labels(labels).to(self._sorted.device).contiguous()
        position = torch.searchsorted(self._sorted, labels).clamp_(max=len(self._sorted) - 1)
        return torch.where(self._sorted[position] == labels, self._rows[position], -1)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._sorted, self._rows = torch.sort(self.labels)

    def __len__(self) -> int:
        return len(self.labels)
