"""New embeddings that lie outside their class's old boundary."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch.nn.functional import normalize

from .._checks import check_integer, check_number, check_same_device
from ..frozen.old_system import OldSystem, as_centers
from .base import CrossModelMiner
from .cross_model_miner import farthest

_ROUNDING = 1e-6  # radians: the sample that set a boundary does not violate it


class BoundaryViolationMiner(CrossModelMiner):
    r"""Take as anchors the new embeddings outside the angle that their class kept to in the old space.

    .. math:: A = \{ i : \angle(f_{n,i}, c_{y_i}) > \theta_{y_i} + m \}

    An anchor comes with every old positive and its ``k`` nearest old negatives. As the new model moves into the old
    boundaries, fewer embeddings are left to learn from; with none, the tuple is empty and PML's losses give 0.

    Args:
        centers: centres and boundaries of the old embeddings; a copy is kept, as buffers.
        margin: radians added to every boundary; below 0 an embedding counts as outside before it is. At least -pi.
        k: how many of the nearest negatives; 1 or more. None takes all.
        **kwargs: ``distance`` (for the nearest negatives, default ``LpDistance(p=2)``: unit rows), ``collect_stats``:
            then the share of the batch that became anchors is recorded as ``outside_fraction``.
    Shape:
        - embeddings ``(N, D)``, as wide as the centres; labels ``(N,)``; ref_emb ``(M, D)``, old; ref_labels ``(M,)``,
          or None for labels
        - output: (anchors, positives, anchors, negatives), indices; anchors into ``embeddings``, others into
          ``ref_emb``. Labels without a centre, or whose class has one sample and so no boundary, give no anchors
    Raises:
        ValueError: ``centers`` something else, or without boundaries; ``margin`` < -pi; ``k`` < 1; in a call:
            embeddings not as wide as the centres, on another device; see also :class:`CrossModelMiner`.
    Example:
        >>> from pml_compat.frozen import ClassCenters
        >>> centers = ClassCenters(torch.eye(2), torch.tensor([0, 1]), boundaries=torch.tensor([0.5, 0.5]))
        >>> new, old = torch.tensor([[0.9, 0.1], [0.7, 0.7]]), torch.eye(2)
        >>> BoundaryViolationMiner(centers)(new, torch.tensor([0, 1]), old)
        (tensor([1]), tensor([1]), tensor([1]), tensor([0]))

    Reference:
        The boundary is that of Meng et al., "Learning Compatible Embeddings", ICCV 2021; mining by it is ours.
    """

    new_anchors_only = True

    def __init__(self, centers: OldSystem, margin: float = 0.0, *, k: int | None = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        centers = as_centers(centers)
        if centers.boundaries is None:
            raise ValueError("centers must have boundaries, got none; measure them with boundary='max' or 'iqr'")
        self.margin = check_number(margin, "margin", minimum=-math.pi)
        self.k = None if k is None else check_integer(k, "k", minimum=1)
        self.old_centers = copy.deepcopy(centers)
        self.add_to_recordable_attributes(name="margin", is_stat=False)
        self.add_to_recordable_attributes(name="outside_fraction", is_stat=True)

    def mine(
        self, embeddings: torch.Tensor, labels: torch.Tensor, ref_emb: torch.Tensor, ref_labels: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return the pairs of the anchors."""
        check_same_device(embeddings, "embeddings", self.old_centers.centers, "the miner")
        width = self.old_centers.centers.shape[1]
        if embeddings.shape[1] != width:
            raise ValueError(
                f"embeddings must be as wide as centers: expected {width}, got {embeddings.shape[1]}; map one of them "
                "with a transformation (pml_compat.transformations), or with pml_compat.fit_width"
            )
        anchors = self.outside(embeddings, labels).nonzero()[:, 0]
        if self.collect_stats:
            self.outside_fraction = len(anchors) / len(labels)
        distances = self.distances(embeddings[anchors], ref_emb)
        same = labels[anchors, None] == ref_labels
        a1, p = farthest(distances, same, None)
        a2, n = farthest(-distances, ~same, self.k)
        return anchors[a1], p, anchors[a2], n

    def outside(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return which embeddings lie outside their class's boundary, ``(N,)`` bool."""
        centers = self.old_centers
        rows = centers.index_of(labels)
        assert centers.boundaries is not None  # seen to at construction
        bounded = rows >= 0 if centers.counts is None else (rows >= 0) & (centers.counts[rows] > 1)
        one, own = normalize(embeddings, dim=1), centers.centers[rows].to(embeddings.dtype)
        # Exact for small angles too, where the cosine has no digits left; 90 degrees for a row of length 0.
        angles = 2 * torch.atan2((one - own).norm(dim=1), (one + own).norm(dim=1))
        return bounded & (angles > centers.boundaries[rows] + self.margin + _ROUNDING)
