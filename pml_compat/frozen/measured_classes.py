"""How the classes of old embeddings are measured: sums, sizes and boundaries, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch

from .._checks import as_tensor, check_embeddings, check_finite, check_labels, check_matrix
from .._rows import precise_dtype
from .label_map import LabelMap

Boundary = Literal["max", "iqr"]
SAMPLE_ROWS = 2**15  # of the embeddings, kept until directions are fitted to them
_BATCH_ROWS = 8192  # an array is read in pieces, so that a memory map stays on disk


def unit_directions(embeddings: torch.Tensor) -> torch.Tensor:
    """Unit rows in float64; rows of length 0 stay 0."""
    return torch.nn.functional.normalize(embeddings.double(), dim=1, eps=0.0).nan_to_num_(nan=0.0)


def sampled(length: int) -> torch.Tensor:
    """Return which of stored rows are a sample, where all are there at once."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(0))[:SAMPLE_ROWS]


class Sample:
    """Some of the embeddings that go by, each as likely as any other: those that drew the lowest numbers."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.rows: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []
        self.drawn: list[torch.Tensor] = []
        self.held = 0

    def add(self, rows: torch.Tensor, labels: torch.Tensor) -> None:
        """Take rows that go by, and let go of some where there are too many."""
        self.rows.append(rows.to(torch.float32))
        self.labels.append(labels)
        self.drawn.append(torch.rand(len(rows), generator=self.generator, dtype=torch.float64))
        self.held += len(rows)
        if self.held > 2 * SAMPLE_ROWS:
            self._drop()

    def _drop(self) -> None:
        drawn = torch.cat(self.drawn)
        kept = drawn.argsort()[:SAMPLE_ROWS].sort().values
        on_device = kept.to(self.rows[0].device)
        self.rows, self.labels = [torch.cat(self.rows)[on_device]], [torch.cat(self.labels)[on_device]]
        self.drawn, self.held = [drawn[kept]], len(kept)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sampled unit rows, ``(n, D)`` float32, and their labels."""
        self._drop()
        return self.rows[0], self.labels[0]


def sum_classes(
    batches: Iterable[tuple[Any, Any]], normalize: bool, sample: Sample
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype]:
    """One pass: the sum and the number of each class's embeddings, in label order. Sums are float64, so that the
    result does not depend on how the samples were batched."""
    rows: dict[int, int] = {}
    sums: torch.Tensor | None = None
    counts = torch.zeros(0, dtype=torch.long)
    dtype = torch.float32
    for embeddings, labels in batches:
        embeddings = check_embeddings(embeddings, width=None if sums is None else sums.shape[1]).detach()
        labels = check_labels(labels, length=len(embeddings)).to(embeddings.device)
        unique, inverse, n = torch.unique(labels, return_inverse=True, return_counts=True)
        row = torch.tensor([rows.setdefault(label, len(rows)) for label in unique.tolist()], device=embeddings.device)
        if sums is None:
            dtype = precise_dtype(embeddings.dtype)
            sums = embeddings.new_zeros((len(rows), embeddings.shape[1]), dtype=torch.float64)
            counts = torch.zeros(len(rows), dtype=torch.long, device=embeddings.device)
        if len(rows) > len(sums):  # doubling keeps the copies of a growing table O(C)
            grow = max(len(rows), 2 * len(sums)) - len(sums)
            sums = torch.cat([sums, sums.new_zeros(grow, sums.shape[1])])
            counts = torch.cat([counts, counts.new_zeros(grow)])
        directions = unit_directions(embeddings)
        sample.add(directions, labels)
        sums.index_add_(0, row[inverse], directions if normalize else embeddings.double())
        counts.index_add_(0, row, n)
    if sums is None:
        raise ValueError("batches must not be empty, got none")
    labels = torch.tensor(list(rows), device=sums.device)
    sums, counts = sums[: len(rows)], counts[: len(rows)]
    order = torch.argsort(labels)
    return sums[order], labels[order], counts[order], dtype


def check_boundary_rule(boundary: Any) -> None:
    """Raise a ValueError where ``boundary`` is no way to measure one."""
    if boundary not in ("max", "iqr", None):
        raise ValueError(f"boundary must be 'max', 'iqr' or None, got {boundary!r}")


def in_pieces(embeddings: Any, labels: Any) -> list[tuple[Any, torch.Tensor]]:
    """Return slices of stored embeddings with their labels; those of a memory map stay on disk until they are read."""
    if isinstance(embeddings, torch.Tensor):
        check_matrix(embeddings, "embeddings")
    elif len(getattr(embeddings, "shape", ())) != 2:
        raise ValueError(f"embeddings must be an (N, D) tensor or array, got {type(embeddings).__name__}")
    labels = check_labels(labels, length=len(embeddings))
    starts = range(0, len(embeddings), _BATCH_ROWS)
    return [(embeddings[s : s + _BATCH_ROWS], labels[s : s + _BATCH_ROWS]) for s in starts]


def measure_boundaries(
    batches: Iterable[tuple[Any, Any]],
    centers: torch.Tensor,
    label_map: LabelMap,
    counts: torch.Tensor,
    boundary: Boundary,
) -> torch.Tensor:
    """The second pass: the angle of every sample to its centre, and each class's largest (kept) one."""
    largest = centers.new_zeros(len(centers))
    seen = torch.zeros_like(counts)
    all_angles, all_rows = [], []
    for embeddings, labels in batches:
        embeddings = check_embeddings(embeddings, width=centers.shape[1]).detach()
        row = label_map(check_labels(labels, length=len(embeddings))).to(embeddings.device)
        if int(row.min()) < 0:
            raise ValueError("batches must give the same samples at both readings, the second has a new label")
        directions = unit_directions(embeddings)
        angles = (directions * centers[row]).sum(1).clamp_(-1, 1).arccos_()
        angles[(directions == 0).all(1)] = 0.0  # a row of length 0 has no angle and moves no boundary
        seen.index_add_(0, row, torch.ones_like(row))
        largest.scatter_reduce_(0, row, angles, "amax")
        if boundary == "iqr":
            all_angles.append(angles)
            all_rows.append(row.int())
    if not torch.equal(seen, counts):
        raise ValueError(
            f"batches must give the same samples at both readings, got {int(counts.sum())} and then {int(seen.sum())}, "
            "or other labels; switch shuffling with replacement and drop_last off"
        )
    if boundary == "max":
        return largest
    return largest_without_outliers(torch.cat(all_angles), torch.cat(all_rows).long(), counts)


def largest_without_outliers(angles: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The largest angle of each class up to Q3 + 1.5 (Q3 - Q1); classes of fewer than four samples keep all.

    The quartiles are the sorted angles number n // 4 and 3 n // 4, counted from 0.
    """
    angles, order = torch.sort(angles)
    rows, by_class = torch.sort(rows[order], stable=True)
    angles = angles[by_class]
    start = torch.cumsum(counts, 0) - counts
    q1, q3 = angles[start + counts // 4], angles[start + (3 * counts) // 4]
    limit = torch.where(counts >= 4, q3 + 1.5 * (q3 - q1), torch.inf)
    kept = angles <= limit[rows]
    return angles.new_zeros(len(counts)).scatter_reduce_(0, rows[kept], angles[kept], "amax")


def check_boundaries(boundaries: Any, length: int) -> torch.Tensor:
    """Return a copy of one angle a class, checked."""
    boundaries = as_tensor(boundaries, "boundaries").detach()
    if boundaries.shape != (length,) or not boundaries.is_floating_point():
        raise ValueError(
            f"boundaries must be floating point of shape ({length},), got {boundaries.dtype} {tuple(boundaries.shape)}"
        )
    check_finite(boundaries, "boundaries")
    if not bool(((boundaries >= 0) & (boundaries <= math.pi + 1e-6)).all()):
        raise ValueError(
            "boundaries must be angles in radians in [0, pi], got values in "
            f"[{float(boundaries.min()):.4g}, {float(boundaries.max()):.4g}]"
        )
    return boundaries.clone()


def check_counts(counts: Any, length: int) -> torch.Tensor:
    """Return a copy of one number of samples a class, checked."""
    counts = check_labels(counts, "counts", length).clone()
    if int(counts.min()) < 1:
        raise ValueError(f"counts must be 1 or more, got {int(counts.min())}; leave the class out")
    return counts


def unit_centers(means: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return rows of length 1, float64; one of length 0 is an error."""
    norms = torch.linalg.vector_norm(means.double(), dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        label = int(labels[int((norms[:, 0] == 0).nonzero()[0])])
        raise ValueError(f"centers must not be 0, the centre of label {label} is: its samples cancel out or are all 0")
    return means.double() / norms
