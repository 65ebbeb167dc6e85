"""Ridge regression from second moments, with a penalty that the data choose."""

from __future__ import annotations

import torch

from .pairs import PairMoments

_FEWEST_ROWS = 10


def ridge_solution(
    moments: PairMoments, ridge: float | None = None, *, centred: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Return the map ``x W + b`` that minimises :math:`\lVert X W + b - Y \rVert^2 + \alpha N \lVert W \rVert^2`.

    .. math:: W = (X_c^\top X_c + \alpha N I)^{-1} X_c^\top Y_c, \qquad b = \bar y - \bar x W

    Args:
        moments: of the paired rows.
        ridge: :math:`\alpha`, 0 or more, in squared units of the source; None: what :func:`measured_ridge` says.
        centred: whether there is a ``b``; without it ``X`` and ``Y`` count as they are.
    Shape:
        - output: ``W`` ``(D_in, D_out)`` and ``b`` ``(D_out,)``, float64
    Raises:
        ValueError: ``ridge`` is 0 and the source has not full rank.
    """
    gram, cross, energy = moments.source_source, moments.source_target, moments.target_energy
    if not centred:
        gram = moments.raw_source_source()
        cross = moments.raw_source_target()
        energy = energy + moments.rows * float(moments.target_mean.square().sum())
    if ridge is None:
        ridge, _ = measured_ridge(gram, cross, energy, moments.rows, centred=centred)
    penalised = gram.clone()
    penalised.diagonal().add_(ridge * moments.rows)
    factor, failed = torch.linalg.cholesky_ex(penalised)
    if bool(failed) or not bool((factor.diagonal() > 1e-12 * factor.diagonal().max()).all()):
        raise ValueError(
            f"ridge must be above 0 here, got {ridge:g}: the {moments.rows} rows of source span fewer than "
            f"{len(gram)} dimensions"
        )
    weight = torch.cholesky_solve(cross, factor)
    offset = torch.zeros_like(moments.target_mean)
    return weight, moments.target_mean - moments.source_mean @ weight if centred else offset


def measured_ridge(
    gram: torch.Tensor, cross: torch.Tensor, energy: float, rows: int, *, centred: bool = True
) -> tuple[float, float]:
    r"""Return the ridge :math:`\alpha` of the smallest error by generalised cross-validation, and that error.

    .. math:: \operatorname{GCV}(\alpha) = \frac{\lVert Y - \hat Y_\alpha \rVert^2 / N}{(1 - \nu_\alpha / N)^2},
        \qquad \nu_\alpha = \sum_i \frac{\lambda_i}{\lambda_i + \alpha N}

    It stands for the error on rows left out one by one, and takes one eigendecomposition. Five values a decade are
    tried, from 1e-9 to 100 times the mean eigenvalue: the choice does not depend on the unit of the source or target.
    Fewer than 10 rows say too little of their own error, and get the smallest.

    Args:
        gram: :math:`X^\top X`, ``(D_in, D_in)`` float64.
        cross: :math:`X^\top Y`, ``(D_in, D_out)`` float64.
        energy: :math:`\lVert Y \rVert^2`.
        rows: ``N``.
        centred: whether the means were taken off, which costs :math:`\nu` one more.
    Reference:
        Golub, Heath and Wahba, "Generalized cross-validation as a method for choosing a good ridge parameter",
        Technometrics 1979.
    """
    eigenvalues, vectors = torch.linalg.eigh(gram)
    eigenvalues = eigenvalues.clamp(min=0)
    if not bool(eigenvalues.any()):
        return 1.0, energy / rows  # a constant source: any penalty gives the map to the mean
    present = eigenvalues > 1e-12 * eigenvalues.max()
    explained = torch.where(present, (vectors.t() @ cross).square().sum(1) / eigenvalues, 0.0)
    penalties = torch.logspace(-9, 2, 56, dtype=gram.dtype, device=gram.device)[:, None] * eigenvalues.mean()
    shrunk = penalties / (eigenvalues + penalties)
    # Sums of what is left, not differences: where as many rows as directions are there both go to 0 together.
    spare = max(0, rows - int(centred) - int(present.sum()))
    unexplained = max(0.0, energy - float(explained.sum())) if spare else 0.0
    residual = unexplained + (explained * shrunk.square()).sum(1)
    left = spare + (shrunk * present).sum(1)
    errors = rows * residual / left.square()
    best = int(errors.argmin()) if rows >= _FEWEST_ROWS else 0
    return float(penalties[best, 0]) / rows, float(errors[best])
