"""Linear regression that stays within reach of a rotation."""

from __future__ import annotations

import torch

from .pairs import PairMoments

_SHARPNESS = 10.0
_STEPS = 300


@torch.enable_grad()
def lambda_orthogonal_solution(
    moments: PairMoments, deviation: float, *, centred: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Return the map ``x W + b`` of the smallest error whose distance from a rotation costs from ``deviation`` on.

    .. math:: \frac{\lVert X W + b - Y \rVert^2}{\lVert Y \rVert^2}
        + \sigma\bigl(a (\delta - \lambda)\bigr) \, \delta, \qquad \delta = \lVert W^\top W - I \rVert_F, \quad a = 10

    With fewer rows than columns :math:`W W^\top` stands for :math:`W^\top W`. By L-BFGS on the moments, from the
    rotation of orthogonal Procrustes on: no row is read again.

    Args:
        moments: of the paired rows.
        deviation: :math:`\lambda`, 0 or more.
        centred: whether there is a ``b``; without it ``X`` and ``Y`` count as they are.
    Shape:
        - output: ``W`` ``(D_in, D_out)`` and ``b`` ``(D_out,)``, float64
    Reference:
        "Lambda-orthogonality regularization for compatible representation learning", arXiv:2509.16664, 2025. Differs
        in: the error is relative to the target's size, and the whole of the data is one batch.
    """
    gram, cross, energy = moments.source_source, moments.source_target, moments.target_energy
    if not centred:
        gram, cross = moments.raw_source_source(), moments.raw_source_target()
        energy += moments.rows * float(moments.target_mean.square().sum())
    gram, cross = (sums / energy if energy > 0 else sums for sums in (gram, cross))
    left, _, right = torch.linalg.svd(cross, full_matrices=False)
    weight = (left @ right).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=_STEPS, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        error = (weight * (gram @ weight - 2 * cross)).sum()
        distance = distance_from_rotation(weight)
        loss = error + torch.sigmoid(_SHARPNESS * (distance - deviation)) * distance
        loss.backward()
        return loss

    optimizer.step(objective)
    weight = weight.detach()
    offset = moments.target_mean - moments.source_mean @ weight
    return weight, offset if centred else torch.zeros_like(offset)


def distance_from_rotation(weight: torch.Tensor) -> torch.Tensor:
    r"""Return :math:`\lVert W^\top W - I \rVert_F` of a matrix, by its shorter side; its slope at 0 is 0."""
    product = weight.t() @ weight if len(weight) >= weight.shape[1] else weight @ weight.t()
    product.diagonal().sub_(1)
    return (product.square().sum() + 1e-12).sqrt()
