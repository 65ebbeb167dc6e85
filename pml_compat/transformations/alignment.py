"""What maps that start at the closed form are trained by, where the caller names no loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

_OWN_SHARE = 0.5


@dataclass(frozen=True)
class Alignment:
    r"""Bring mapped rows onto the target's, and their directions onto those of the target's neighbourhoods.

    .. math:: \ell_i = \frac{\lVert h_i - f_i \rVert^2}{v} + w \bigl(1 - \cos(h_i, \sum_j p_{ij} \hat f_j)\bigr),
        \qquad p_i = \operatorname{softmax}_j \frac{\langle \hat f_i, \hat f_j \rangle}{\tau}

    The first term keeps the target's lengths, for galleries that are searched by distance; the second is for those
    that are searched by cosine. Its target is the mean of the rows of the batch near :math:`f_i`, so that what the new
    model says of one image, and the old embedding cannot know, is averaged out. No labels are read.

    Args:
        variance: ``v``, of the target's rows about their mean: the loss does not depend on the target's unit.
        temperature: :math:`\tau`, of cosines: see :func:`neighborhood_temperature`.
        weight: ``w``.
    Shape:
        - mapped, target ``(N, D)``; output: a scalar of the mapped rows' dtype
    """

    variance: float
    temperature: float
    weight: float = 3.0

    def __call__(self, mapped: torch.Tensor, labels: object = None, *, ref_emb: torch.Tensor) -> torch.Tensor:
        """Return the mean over the rows."""
        with torch.autocast(mapped.device.type, enabled=False):
            mapped, target = mapped.to(ref_emb.dtype), ref_emb.detach()
            unit = normalize(target, dim=1)
            smooth = normalize((unit @ unit.t() / self.temperature).softmax(1) @ unit, dim=1)
            squared = (mapped - target).square().sum(1).mean() / self.variance
            return squared + self.weight * (1 - (normalize(mapped, dim=1) * smooth).sum(1)).mean()


@torch.no_grad()
def neighborhood_temperature(target: torch.Tensor) -> float:
    r"""Return the :math:`\tau` at which rows have half of the weight in their own neighbourhood, in the mean.

    .. math:: \frac{1}{N} \sum_i \operatorname{softmax}_j(\langle \hat f_i, \hat f_j \rangle / \tau)_i = \frac{1}{2}

    How close the rows of a model lie is a matter of its loss and width: a constant would mix whole classes in one
    space and nothing in another. By bisection from 0.001 to 1; spaces with many copies of a row end at 0.001.

    Args:
        target: ``(N, D)``, as many as in a batch.
    """
    unit = normalize(target.double(), dim=1)
    cosines = unit @ unit.t()
    lowest, highest = 1e-3, 1.0
    for _ in range(30):
        middle = (lowest * highest) ** 0.5
        if float((cosines / middle).softmax(1).diagonal().mean()) > _OWN_SHARE:
            lowest = middle
        else:
            highest = middle
    return (lowest * highest) ** 0.5
