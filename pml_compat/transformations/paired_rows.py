"""Stored, row-aligned embeddings as a training reads them: by batches, in one or several views."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from .._checks import check_labels, stored_rows
from .base import Transformation

_BLOCK_ROWS = 8192  # read at once: memory maps stay on disk
_FINGERPRINT_ROWS = 4096


class PairedRows:
    """The stored arrays, row-aligned, in one or several views."""

    def __init__(
        self, transformation: Transformation, source: Any, target: Any, side_info: Any, labels: Any, loss: Any
    ) -> None:
        if target is None and loss is None:
            raise ValueError("target must be given, got None; without a loss of your own, rows are regressed onto it")
        if (side_info is None) != (transformation.side_features is None):
            wanted = "None" if transformation.side_features is None else f"(N, {transformation.side_features})"
            raise ValueError(
                f"side_info must be {wanted} for this {type(transformation).__name__}, got {side_info!r:.40}"
            )
        arrays = {"source": source, "target": target, "side_info": side_info}
        widths = {
            "source": transformation.in_features,
            "target": transformation.out_features,
            "side_info": transformation.side_features,
        }
        self.arrays = {name: _as_views(value, name) for name, value in arrays.items() if value is not None}
        self.length = len(self.arrays["source"][0])
        self.views = len(self.arrays["source"])
        if self.length == 0:
            raise ValueError("source must not be empty, got 0 rows")
        for name, views in self.arrays.items():
            if len(views) not in (1, self.views):
                raise ValueError(f"{name} must have 1 or {self.views} views like source, got {len(views)}")
            for view in views:
                if len(view.shape) != 2 or view.shape[1] != widths[name]:
                    raise ValueError(f"{name} must be (N, {widths[name]}), got shape {tuple(view.shape)}")
                if len(view) != self.length:
                    raise ValueError(
                        f"{name} must have one row for each row of source, in the same order: expected {self.length}, "
                        f"got {len(view)}"
                    )
        self.labels = None if labels is None else check_labels(labels, length=self.length)
        self.weight = next(transformation.parameters())

    def read(self, name: str, index: torch.Tensor, view: torch.Tensor) -> torch.Tensor | None:
        """Return rows ``index``, each of its view, on the transformation's device."""
        views = self.arrays.get(name)
        if views is None:
            return None
        if len(views) == 1:
            rows = stored_rows(views[0], index, name)
        else:
            parts = [(view == v).nonzero()[:, 0] for v in range(len(views))]
            rows = torch.cat([stored_rows(views[v], index[part], name) for v, part in enumerate(parts) if len(part)])
            rows = rows[torch.argsort(torch.cat(parts))]
        return rows.to(self.weight.device, self.weight.dtype)

    def blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield all rows of all views as float64: the source with its side-information beside it, and the target."""
        for number in range(self.views):
            for index in torch.arange(self.length).split(_BLOCK_ROWS):
                view = torch.full((len(index),), number)
                source, target, side_info = (self.read(name, index, view) for name in ("source", "target", "side_info"))
                assert source is not None and target is not None
                inputs = source if side_info is None else torch.cat([source, side_info], dim=1)
                yield inputs.double(), target.double()

    def fingerprint(self) -> str:
        """Return a hash of up to 4,096 evenly spaced rows of every array, and of their labels."""
        digest = hashlib.sha256()
        index = torch.linspace(0, self.length - 1, min(self.length, _FINGERPRINT_ROWS), dtype=torch.float64).long()
        for name, views in self.arrays.items():
            for view in views:
                rows = stored_rows(view, index, name).to("cpu", torch.float32)
                digest.update(f"{name} {tuple(view.shape)}".encode())
                digest.update(rows.contiguous().numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels[index.to(self.labels.device)].cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def _as_views(value: Any, name: str) -> list[Any]:
    views = list(value) if isinstance(value, list | tuple) else [value]
    if not views or not all(hasattr(view, "shape") and hasattr(view, "__getitem__") for view in views):
        raise ValueError(f"{name} must be an (N, D) array or a list of them, got {[type(v).__name__ for v in views]}")
    return views
