"""Gallery items that count neither as right nor as wrong for a query, as the landmark protocols have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .matches import Matches


class Junk(Matches):
    """Gallery rows that each query names.

    Args:
        junk: a sequence of one list, array or tensor of gallery rows a query; they may be empty.
        sizes: the numbers of queries and of gallery items.
        device: where the lists go.
    Raises:
        ValueError: another number of lists; entries that are no rows of the gallery.
    """

    def __init__(self, junk: Any, sizes: tuple[int, int], device: torch.device) -> None:
        lists = [np.asarray(one.cpu() if isinstance(one, torch.Tensor) else one).reshape(-1) for one in junk]
        if len(lists) != sizes[0]:
            raise ValueError(f"junk must have one list of gallery rows a query: expected {sizes[0]}, got {len(lists)}")
        rows = np.concatenate([np.zeros(0, dtype=np.int64), *(one for one in lists if len(one))])
        if rows.dtype.kind not in "iu" or (len(rows) and not 0 <= rows.min() <= rows.max() < sizes[1]):
            wrong = rows[(rows < 0) | (rows >= sizes[1])][:1].tolist() if rows.dtype.kind in "iuf" else []
            got = wrong[0] if wrong else f"values of type {rows.dtype}"
            raise ValueError(f"junk must be rows of the gallery, integers from 0 to {sizes[1] - 1}, got {got}")
        lists = [np.unique(one) for one in lists]  # ascending, and each once
        rows = np.concatenate([np.zeros(0, dtype=np.int64), *(one for one in lists if len(one))])
        self.rows = torch.from_numpy(rows.astype(np.int64)).to(device)
        self.count = torch.tensor([len(one) for one in lists], dtype=torch.long, device=device)
        self.start = self.count.cumsum(0) - self.count

    def lists(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows that each query names."""
        count = self.count[queries]
        place = torch.arange(int(count.max()), device=count.device)
        last = max(0, len(self.rows) - 1)
        return self.rows[(self.start[queries, None] + place).clamp_max_(last)], place < count[:, None]
