"""The old space with its noise made round: what to aim at in it, and how to search it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import normalize

from .._checks import check_embeddings, check_labels, check_matrix, check_number, check_same_device
from .._rows import precise_dtype, unit_rows_times

_BLOCK = 2**16  # rows at once


class WithinClassWhitening(torch.nn.Module):
    r"""Whiten old embeddings by their scatter within classes, and search the untouched gallery with what is whitened.

    .. math:: w(o) = (n(o) - \mu) A, \qquad A = (S_w + \lambda \tfrac{\operatorname{tr} S_w}{d} I)^{-1/2}, \qquad
        q(w) = n(w A)

    :math:`\mu` and :math:`S_w` are the mean of the old model's unit rows :math:`n(o)`, and their covariance within
    classes. In the whitened space the directions in which items of one class differ count little, and those that tell
    classes apart count much. The gallery stays as it is: up to a number for each query
    :math:`\langle w(x), w(o) \rangle = \langle w(x) A, n(o) \rangle`, so :meth:`query` turns a whitened row into one
    that ranks stored unit rows by their whitened inner product.

    Args:
        mean: ``(D,)``.
        matrix: ``(D, D)``, symmetric.
    Shape:
        - forward: old embeddings ``(N, D)`` of any length, to whitened rows ``(N, D)`` in their dtype
    Raises:
        ValueError: shapes that do not fit; in a call: another width or device.
    Example:
        >>> old, labels = torch.randn(100, 4), torch.arange(100) % 5
        >>> whitening = WithinClassWhitening.from_embeddings(old, labels)
        >>> whitened = whitening(old[:2])
        >>> whitening.query(whitened).shape
        torch.Size([2, 4])

    Reference:
        Hatch et al., "Within-Class Covariance Normalization for SVM-based Speaker Recognition", Interspeech 2006.
        Differs in: the gallery, which is stored as it is, is not whitened, and the query twice.
    """

    mean: torch.Tensor
    matrix: torch.Tensor

    def __init__(self, mean: torch.Tensor, matrix: torch.Tensor) -> None:
        super().__init__()
        check_matrix(matrix, "matrix", len(matrix))
        if mean.shape != matrix.shape[:1]:
            raise ValueError(f"mean must be one row as wide as matrix, ({len(matrix)},), got shape {tuple(mean.shape)}")
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("matrix", matrix.detach().clone())

    @classmethod
    def from_embeddings(cls, embeddings: Any, labels: Any = None, *, shrinkage: float = 0.1) -> WithinClassWhitening:
        r"""Measure the old model's embeddings of labelled items: of the new training set, as ``ClassCenters`` does.

        One pass over the rows, by blocks, in float64: :math:`O(N D^2)`.

        Args:
            embeddings: ``(N, D)``, of any length.
            labels: ``(N,)``; None takes all for one class, which whitens by the covariance as a whole.
            shrinkage: :math:`\lambda`, of the mean variance, added to every direction's; above 0.
        Raises:
            ValueError: NaN or infinity, lengths that differ, ``shrinkage`` not above 0; no two items of one class
                differ.
        """
        embeddings = check_embeddings(embeddings).detach()
        shrinkage = check_number(shrinkage, "shrinkage", minimum=0, exclusive=True)
        n, width = embeddings.shape
        code = torch.zeros(n, dtype=torch.long, device=embeddings.device)
        if labels is not None:
            code = torch.unique(check_labels(labels, length=n).to(embeddings.device), return_inverse=True)[1]
        sums = torch.zeros(int(code.max()) + 1, width, dtype=torch.float64, device=embeddings.device)
        scatter = torch.zeros(width, width, dtype=torch.float64, device=embeddings.device)
        for rows, codes in zip(embeddings.split(_BLOCK), code.split(_BLOCK), strict=True):
            unit = normalize(rows.double(), dim=1)
            sums.index_add_(0, codes, unit)
            scatter.addmm_(unit.t(), unit)
        within = (scatter - (sums / torch.bincount(code)[:, None]).t() @ sums) / n
        variance = float(within.trace()) / width
        if not variance > 1e-12:
            raise ValueError("embeddings must differ within classes, got no two different rows of one label")
        values, vectors = torch.linalg.eigh(within)
        matrix = (vectors * (values.clamp_min(0) + shrinkage * variance).rsqrt()) @ vectors.t()
        return cls((sums.sum(0) / n).float(), matrix.float())

    @property
    def features(self) -> int:
        """The width of the old space."""
        return len(self.mean)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return whitened rows."""
        self._check(embeddings)
        with torch.autocast(embeddings.device.type, enabled=False):
            precise = precise_dtype(embeddings.dtype)
            unit = normalize(embeddings.to(precise), dim=1)
            return ((unit - self.mean.to(precise)) @ self.matrix.to(precise)).to(embeddings.dtype)

    def query(self, whitened: torch.Tensor) -> torch.Tensor:
        """Return unit rows to search stored old unit rows with, by inner product or cosine."""
        self._check(whitened)
        return unit_rows_times(whitened, self.matrix)

    def _check(self, rows: torch.Tensor) -> None:
        check_matrix(rows, "embeddings", self.features)
        check_same_device(rows, "embeddings", self.mean, "the WithinClassWhitening")

    def extra_repr(self) -> str:
        """Show the width."""
        return f"features={self.features}"
