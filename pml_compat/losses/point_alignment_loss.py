"""Point-to-point alignment: each new embedding onto the old embedding of the same item."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import mse_loss

from .._checks import check_number
from .._host import BaseDistance, LpDistance
from .._rows import unit_rows
from ._label_free import LabelFreeLoss
from ._reduction import per_sample


class PointAlignmentLoss(LabelFreeLoss):
    r"""Pull every new embedding onto the old embedding of the same item, or to within a distance of it.

    .. math:: \ell_i = w \, [d(a_i, o_i) - t]_+^2, \qquad \text{or, with } \texttt{squared=False}, \qquad
        \ell_i = w \, [d(a_i, o_i) - t]_+

    It is the strictest of the compatible losses: it asks the new model to repeat the old one's mistakes. The
    "weakened L2" ``PointAlignmentLoss(10.0, threshold=0.2, squared=False)`` leaves each sample a ball to move in.
    No labels are needed.

    A mean squared error over all ``N D`` entries, as other code has it, is this loss divided by ``D``:
    ``PointAlignmentLoss(1 / D)``.

    Args:
        weight: the multiplier ``w``; 0 or more, no unit.
        threshold: the distance ``t`` up to which a sample has no loss; 0 or more, in the unit of the distance.
        squared: whether what is beyond the threshold is squared.
        **kwargs: ``distance``: ``LpDistance(p=2)`` by default (unit rows, so d is in [0, 2]), or with
            ``normalize_embeddings=False`` on the embeddings as they are. ``reducer`` (one loss a row, default
            ``MeanReducer``), ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``.
    Shape:
        - embeddings ``(N, D)``, carries the gradient, fitted to the old width (:func:`pml_compat.fit_width`);
          labels are not used
        - ref_emb ``(N, D_old)``: the old model's embeddings, row i of the same item; receives no gradient
        - output: scalar, float32 or better
    Raises:
        ValueError: ``weight`` or ``threshold`` < 0; another distance; ``ref_emb`` missing, or of another length;
            empty, NaN or infinite; another device; an ``indices_tuple``.
    Example:
        >>> PointAlignmentLoss(weight=0.5)(torch.tensor([[3.0, 0.0]]), ref_emb=torch.tensor([[0.0, 2.0]]))
        tensor(1.)

    Reference:
        The L2 baseline of Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020; the weakened
        form and its 10 and 0.2 are of the public code of MixBCT. Differs from public code in: the sum over
        coordinates instead of their mean. Where a distance is 0, and at rows of length 0, the gradient is 0.
    """

    tells_by_its_value = True

    def __init__(self, weight: float = 1.0, threshold: float = 0.0, squared: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        distance: BaseDistance = self.distance
        if not isinstance(distance, LpDistance) or distance.p != 2 or distance.power != 1:
            raise ValueError(
                "distance must be LpDistance(p=2), squared by the argument squared, got "
                f"{type(distance).__name__}(p={distance.p}, power={distance.power})"
            )
        self.weight = check_number(weight, "weight", minimum=0)
        self.threshold = check_number(threshold, "threshold", minimum=0)
        self.squared = squared
        self.add_to_recordable_attributes(list_of_names=["weight", "threshold"], is_stat=False)

    def get_default_distance(self) -> BaseDistance:
        """Euclidean distance of unit rows."""
        return LpDistance(p=2)

    def compare(self, new_emb: torch.Tensor, old_emb: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Return one loss a row."""
        if self.distance.normalize_embeddings:
            new_emb, old_emb = (unit_rows(rows, dtype) for rows in (new_emb, old_emb))
        losses = hinged_distances(new_emb, old_emb, self.threshold, self.squared)
        if self.weight != 1:
            losses = self.weight * losses
        return {"loss": per_sample(losses)}


def hinged_distances(one: torch.Tensor, other: torch.Tensor, threshold: float, squared: bool) -> torch.Tensor:
    """Return how far each row's distance is beyond ``threshold``, squared or not; finite slope at distance 0."""
    if squared and threshold == 0:
        return mse_loss(one, other, reduction="none").sum(1)
    beyond = torch.relu(torch.linalg.vector_norm(one - other, dim=1) - threshold)
    return beyond.square() if squared else beyond
