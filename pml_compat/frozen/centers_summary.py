"""What class centres are good for, before a training relies on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .class_directions import Found, Prospects

_BLOCK_ELEMENTS = 2**24  # cosines held at once
_SHOWN = 10


@dataclass(frozen=True)
class CentersSummary:
    """The audit that :meth:`ClassCenters.summary` makes; ``print`` it, or read its tensors, one entry a class.

    Args:
        features: width of the old embeddings.
        labels: ``(C,)``.
        counts: ``(C,)`` samples, None where they are not known.
        boundaries: ``(C,)`` radians, None where none were measured.
        nearest_labels: ``(C,)`` label of the nearest other centre; -1 where there is no other.
        nearest_angles: ``(C,)`` radians to it; infinity where there is no other.
        prospects: what new queries can expect to find among the old embeddings; None where these were not seen.
    """

    features: int
    labels: torch.Tensor
    counts: torch.Tensor | None
    boundaries: torch.Tensor | None
    nearest_labels: torch.Tensor
    nearest_angles: torch.Tensor
    prospects: Prospects | None = None

    @property
    def collapsed(self) -> torch.Tensor:
        """``(C,)`` bool: the nearest other centre lies inside the class's own boundary."""
        if self.boundaries is None:
            return torch.zeros_like(self.labels, dtype=torch.bool)
        return self.nearest_angles < self.boundaries

    @property
    def single(self) -> torch.Tensor:
        """``(C,)`` bool: the class has one sample, so that its boundary, 0, says nothing."""
        return torch.zeros_like(self.labels, dtype=torch.bool) if self.counts is None else self.counts == 1

    def __str__(self) -> str:
        lines = [f"{len(self.labels)} classes, {self.features} features"]
        if self.counts is not None:
            low, high = int(self.counts.min()), int(self.counts.max())
            lines[0] += f", {int(self.counts.sum())} samples ({low} to {high} a class)"
        if self.boundaries is None:
            lines.append("no boundaries measured")
        else:
            lines.append(
                f"{int(self.collapsed.sum())} collapsed: another class's centre lies inside their boundary, "
                "which cannot keep the two apart"
            )
            lines += self._table()
        if bool(self.single.any()):
            labels = self.labels[self.single].tolist()
            more = ", ..." if len(labels) > _SHOWN else ""
            lines.append(
                f"{len(labels)} of one sample, without a boundary: {', '.join(map(str, labels[:_SHOWN]))}{more}"
            )
        if self.prospects is not None:
            lines += _expectations(self.prospects)
        return "\n".join(lines)

    def _table(self) -> list[str]:
        assert self.boundaries is not None
        slack = torch.where(self.collapsed, self.boundaries - self.nearest_angles, -math.inf)
        worst = torch.argsort(slack, descending=True)[: min(_SHOWN, int(self.collapsed.sum()))].tolist()
        lines = [f"{'label':>9} {'boundary':>9} {'nearest centre':>15}"] if worst else []
        for row in worst:
            boundary, angle = (math.degrees(float(values[row])) for values in (self.boundaries, self.nearest_angles))
            lines.append(
                f"{int(self.labels[row]):>9} {boundary:>8.1f}° {angle:>14.1f}° (label {int(self.nearest_labels[row])})"
            )
        if len(worst) < int(self.collapsed.sum()):
            lines.append(f"{'...':>9}")
        return lines


def _expectations(prospects: Prospects) -> list[str]:
    def percent(found: Found) -> str:
        return f"{100 * found.precision_at_1:.1f} / {100 * found.mean_average_precision:.1f}"

    return [
        "P@1 / mAP in percent among old embeddings that nothing was fitted to, of",
        f"  the old model's queries {percent(prospects.old)}",
        f"  queries on their class's mean {percent(prospects.at_means)}, on its direction "
        f"{percent(prospects.at_directions)}",
        f"  queries near their direction, as a trained model's: {percent(prospects.near_directions)}",
    ]


def nearest_centers(centers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row of the nearest other centre and the angle to it, in blocks; -1 and infinity where none is.

    Args:
        centers: ``(C, D)`` unit rows.
    Shape:
        - output: ``(C,)`` rows; ``(C,)`` radians, float64
    """
    if len(centers) == 1:
        return torch.tensor([-1], device=centers.device), centers.new_full((1,), math.inf, dtype=torch.float64)
    size = max(1, _BLOCK_ELEMENTS // len(centers))
    found = []
    for start in range(0, len(centers), size):
        cosines = centers[start : start + size] @ centers.t()
        cosines.diagonal(start).fill_(-math.inf)
        found.append(cosines.argmax(1))
    rows = torch.cat(found)
    # by the chord: near 1 the cosine has no digits left for the angle
    chord = torch.linalg.vector_norm(centers.double() - centers[rows].double(), dim=1)
    return rows, 2 * (chord / 2).clamp_(max=1).arcsin_()
