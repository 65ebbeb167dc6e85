"""A classifier that never moves, so that models that never saw each other put their classes in the same places."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy, normalize

from .._checks import check_integer, check_labels
from .._host import convert_to_weights
from .._rows import at_least_float32, no_autocast
from ._base import NamedTermsLoss
from ._reduction import per_sample
from ._task import check_label_range


class CoReSLoss(NamedTermsLoss):
    r"""Train by a fixed classifier whose rows are the corners of a simplex, as many as there will ever be classes.

    .. math:: \ell_i = -\log \frac{e^{w_{y_i} \cdot f_i}}{\sum_c e^{w_c \cdot f_i}}, \qquad
        w_c \cdot w_{c'} = -\frac{1}{C - 1}, \quad \lVert w_c \rVert = 1

    Every model that is trained by it has class c in the direction :math:`w_c`, on any data and from any start, so that
    galleries of all of them are searched by the queries of all. Start with it, at the first model; it does not fit a
    gallery that another loss has filled (take :class:`BCTLoss` there). New classes take rows that stood free.

    Args:
        num_classes: C, of all classes there will ever be, 2 or more. The embedding is C - 1 wide.
        **kwargs: ``reducer``, ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``.
    Shape:
        - embeddings ``(N, C - 1)``, as the network gives them: not of unit length; labels ``(N,)`` from 0 to C - 1;
          indices_tuple: weighs rows by how often a miner took them, as PML's classification losses do
        - output: scalar, float32 or better
    Raises:
        ValueError: ``num_classes`` < 2; embeddings of another width, empty, NaN or infinite; labels missing or out of
            range.
    Example:
        >>> loss_func = CoReSLoss(num_classes=3)
        >>> float(loss_func(torch.zeros(2, 2), torch.tensor([0, 2]))) - torch.tensor(3.0).log().item() < 1e-6
        True

    Reference:
        Biondi et al., "CoReS: Compatible Representations via Stationarity", TPAMI 2023: a d-simplex fixed classifier.
        Differs from it in: the network's last layer, from its features to C - 1 numbers, is the user's.
    """

    simplex: torch.Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = check_integer(num_classes, "num_classes", minimum=2)
        self.register_buffer("simplex", simplex(num_classes), persistent=False)
        self.add_to_recordable_attributes(name="num_classes", is_stat=False)

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Check that they are classes."""
        check_label_range(labels, self.num_classes)

    def compute_loss(
        self, embeddings: torch.Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any
    ) -> dict[str, Any]:
        """Return one loss a row."""
        labels = check_labels(labels, length=len(embeddings))
        if embeddings.shape[1] != self.num_classes - 1:
            raise ValueError(
                f"embeddings must be num_classes - 1 wide: expected {self.num_classes - 1}, got {embeddings.shape[1]}"
            )
        with no_autocast(embeddings):
            rows = at_least_float32(embeddings)
            losses = cross_entropy(rows @ self.simplex.to(rows).t(), labels, reduction="none")
            if indices_tuple is not None:  # how often a miner took each row, as in PML's classification losses
                losses = losses * convert_to_weights(indices_tuple, labels, dtype=losses.dtype)
        return {"loss": per_sample(losses)}


def simplex(count: int) -> torch.Tensor:
    """Return the ``(count, count - 1)`` corners of a regular simplex, of length 1, around 0."""
    n = count - 1
    corners = torch.cat([torch.eye(n, dtype=torch.float64), torch.full((1, n), (1 - (1 + n) ** 0.5) / n).double()])
    return normalize(corners - corners.mean(0), dim=1).float()
