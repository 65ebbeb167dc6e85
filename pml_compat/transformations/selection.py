"""Rows that a training leaves out, and what a map of the gallery is worth on them."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import normalize

_SHARE = 0.1
_FEWEST_ROWS, _MOST_ROWS = 10, 2000
_FEWEST_CLASSES = 20
_DEPTH = 10


def has_classes_to_spare(labels: torch.Tensor | None) -> bool:
    """Whether :func:`hold_out` leaves out classes, and not rows of all of them."""
    return labels is not None and len(torch.unique(labels)) >= _FEWEST_CLASSES


def hold_out(rows: int, labels: torch.Tensor | None, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows to train on, sorted, and those to judge by; none of the latter where there are too few.

    A tenth: of the classes, where there are 20 and more, as a gallery holds classes that a training has not seen; else
    of the rows, 10 at least. At most 2,000 are judged by; of classes that are left out no row is trained on.
    """
    order = torch.randperm(rows, generator=generator)
    if labels is not None and has_classes_to_spare(labels):
        classes = torch.unique(labels)
        left_out = classes[torch.randperm(len(classes), generator=generator)[: math.ceil(_SHARE * len(classes))]]
        out = torch.isin(labels, left_out)[order]
        training, judged = order[~out], order[out][:_MOST_ROWS]
    else:
        count = min(max(_FEWEST_ROWS, math.ceil(_SHARE * rows)), _MOST_ROWS)
        training, judged = order[count:], order[:count]
    if min(len(training), len(judged)) < _FEWEST_ROWS:
        return torch.arange(rows), order[:0]
    return training.sort().values, judged.sort().values


def retrieval_scores(target: torch.Tensor, mapped: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    r"""Return for each new row, as a query over the mapped ones, how good the 10 are that it finds.

    .. math:: s_i = \frac{1}{k} \sum_{j \in \operatorname{top}_k(i)} g_{ij}, \qquad j \ne i

    By cosine. :math:`g_{ij}` is 1 for a row of the same class and 0 for others; without labels, or where no class has
    two rows, what the new model itself says of the two: :math:`\cos(f_i, f_j)`.

    Args:
        target: ``(N, D)``, the new model's rows.
        mapped: ``(N, D)``, row i of the same item.
        labels: ``(N,)`` or None.
    Shape:
        - output: ``(N,)`` in [-1, 1]
    """
    queries, gallery = normalize(target.float(), dim=1), normalize(mapped.float(), dim=1)
    found = (queries @ gallery.t()).fill_diagonal_(-torch.inf).topk(min(_DEPTH, len(target) - 1)).indices
    if labels is not None and len(torch.unique(labels)) < len(labels):
        return (labels[found] == labels[:, None]).float().mean(1)
    return torch.einsum("nd,nkd->nk", queries, queries[found]).mean(1)


def is_better(scores: torch.Tensor, start: torch.Tensor, standard_errors: float) -> bool:
    """Whether scores are above those of the start by more than some standard errors of their difference."""
    gain = (scores - start).double()
    return float(gain.mean()) > standard_errors * float(gain.std()) / len(gain) ** 0.5
