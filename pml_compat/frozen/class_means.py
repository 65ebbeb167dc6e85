"""Means of each class's old embeddings, not brought to unit length, and how far each sample lies from its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize as unit

from .._checks import check_embeddings, check_labels, check_matrix
from .._rows import precise_dtype
from .measured_classes import largest_without_outliers

_BATCH_ROWS = 8192  # an array is read in pieces, so that a memory map stays on disk


@dataclass(frozen=True)
class ClassMeans:
    """What :func:`class_means` measures, all on the device of the embeddings.

    Args:
        labels: ``(C,)`` in ascending order.
        counts: ``(C,)`` samples.
        means: ``(C, D)``, float32 or better; of unit rows they are at most 1 long.
        rows: ``(N,)`` the row of each sample's class in the others.
        distances: ``(N,)`` of each sample to the mean of its class, float64.
    """

    labels: torch.Tensor
    counts: torch.Tensor
    means: torch.Tensor
    rows: torch.Tensor
    distances: torch.Tensor

    def radii(self) -> torch.Tensor:
        """Return each class's largest distance up to Q3 + 1.5 (Q3 - Q1), ``(C,)``; of fewer than four samples, of all.

        The quartiles are the sorted distances number n // 4 and 3 n // 4, counted from 0.
        """
        return largest_without_outliers(self.distances, self.rows, self.counts)

    def variances(self) -> torch.Tensor:
        """Return each class's mean squared distance, ``(C,)`` float64; a class without spread has that of all samples.

        Equal rows are apart by their rounding, which is no spread.
        """
        squares = self.distances.square()
        found = squares.new_zeros(len(self.counts)).index_add_(0, self.rows, squares) / self.counts
        found = torch.where(found > 1e-12 * squares.mean(), found, squares.mean())
        return found.clamp_(min=torch.finfo(squares.dtype).tiny)


def class_means(embeddings: Any, labels: Any, *, normalize: bool = True) -> ClassMeans:
    r"""Measure :math:`m_y = \operatorname{mean}_{i: y_i = y} \hat f_i` and :math:`\lVert \hat f_i - m_{y_i} \rVert`.

    The embeddings are read twice, in pieces; memory is O(C D + N). Sums are float64.

    Args:
        embeddings: ``(N, D)`` tensor, array, memory map or :class:`FrozenEmbeddings`, finite.
        labels: ``(N,)`` integers.
        normalize: take unit rows; False takes the rows as they are.
    Raises:
        ValueError: empty, not ``(N, D)``, NaN or infinite; labels of another length.
    """
    if isinstance(embeddings, torch.Tensor):
        check_matrix(embeddings, "embeddings")
    elif getattr(embeddings, "ndim", None) != 2:
        raise ValueError(f"embeddings must be an (N, D) tensor or array, got {type(embeddings).__name__}")
    labels = check_labels(labels, length=len(embeddings))
    if len(labels) == 0:
        raise ValueError("embeddings must not be empty, got none")
    device = embeddings.device if isinstance(embeddings, torch.Tensor) else torch.device("cpu")
    labels, rows, counts = torch.unique(labels.to(device), return_inverse=True, return_counts=True)
    means = torch.zeros(len(labels), embeddings.shape[1], dtype=torch.float64, device=device)
    for start, piece in pieces(embeddings, normalize):
        means.index_add_(0, rows[start : start + len(piece)], piece)
    means /= counts[:, None]
    distances = torch.empty(len(rows), dtype=torch.float64, device=device)
    for start, piece in pieces(embeddings, normalize):
        own = slice(start, start + len(piece))
        distances[own] = torch.linalg.vector_norm(piece - means[rows[own]], dim=1)
    dtype = precise_dtype(check_embeddings(embeddings[:1]).dtype)
    return ClassMeans(labels, counts, means.to(dtype), rows, distances)


def pieces(embeddings: Any, normalize: bool, size: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
    """Give ``embeddings`` in float64, ``size`` rows at a time, each piece with the number of its first row."""
    size = size or _BATCH_ROWS
    for start in range(0, len(embeddings), size):
        piece = check_embeddings(embeddings[start : start + size]).detach().double()
        yield start, unit(piece, dim=1) if normalize else piece
