"""The supervised contrast between two models, without a mask of all pairs."""

from __future__ import annotations

import torch


def supervised_contrast(
    queries: torch.Tensor, gallery: torch.Tensor, labels: torch.Tensor, gallery_labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    r"""Return what each query misses of the gallery's rows of its class.

    .. math:: \ell_i = \log \sum_j e^{s_{ij} / \tau} - \operatorname{mean}_{j: y_j = y_i} s_{ij} / \tau, \quad s_{ij} =
        \langle q_i, g_j \rangle

    The mean of a query's scores within its class is its score with their mean, so that no mask of all pairs is needed.

    Args:
        queries: ``(N, D)`` unit rows.
        gallery: ``(M, D)`` unit rows.
        labels: ``(N,)`` of the queries.
        gallery_labels: ``(M,)``.
        temperature: above 0.
    Shape:
        - output: ``(N,)``; 0 where the gallery has no row of the class
    Reference:
        Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020.
    """
    ordered = gallery_labels.sort().values
    first, end = torch.searchsorted(ordered, labels), torch.searchsorted(ordered, labels, right=True)
    # The sum of a class stands at the place of its first row in order: nothing is asked of the device.
    sums = torch.zeros_like(gallery).index_add(0, torch.searchsorted(ordered, gallery_labels), gallery)
    counts = (end - first).to(queries.dtype)
    wanted = (queries * sums.index_select(0, first.clamp(max=len(gallery) - 1))).sum(1) / counts.clamp(min=1)
    losses = (queries @ gallery.t() / temperature).logsumexp(1) - wanted / temperature
    return torch.where(counts > 0, losses, 0.0)
