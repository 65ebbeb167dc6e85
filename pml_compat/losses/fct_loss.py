"""Forward-compatible training: transformed old embeddings onto new ones."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.utils import common_functions as c_f
from torch.nn.functional import normalize

from .old_rows import check_old_rows
from .task_and_terms import per_sample


class FCTLoss(BaseMetricLossFunction):
    r"""Bring every transformed old embedding onto the new embedding of the same item.

    .. math:: \ell_i = \frac{1}{d} \lVert h_i - f_{n,i} \rVert^2

    Their mean is the mean squared error over all ``N d`` entries. With ``distance=CosineSimilarity()``
    :math:`\ell_i = 1 - \cos(h_i, f_{n,i})`, for galleries that are searched by cosine and models whose embeddings
    have no meaningful length. No labels are needed, and the new model is not touched.

    Args:
        **kwargs: ``distance``: ``LpDistance(normalize_embeddings=False, p=2, power=2)`` by default, the squared error;
            with ``normalize_embeddings=True`` on unit rows; or ``CosineSimilarity()``. ``reducer`` (one loss a row,
            default ``MeanReducer``), ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``.
    Shape:
        - embeddings ``(N, D_new)``: what the transformation gives, carries the gradient; labels are not used
        - ref_emb ``(N, D_new)``: the new model's embeddings, row i of the same item; receives no gradient
        - output: scalar of ``embeddings.dtype``
    Raises:
        ValueError: another distance; ``ref_emb`` missing, or not of the same shape; empty, NaN or infinite; another
            device; an ``indices_tuple``.
    Example:
        >>> FCTLoss()(torch.tensor([[3.0, 0.0]]), ref_emb=torch.tensor([[0.0, 4.0]]))
        tensor(12.5000)

    Reference:
        Ramanujan et al., "Forward Compatible Training for Large-Scale Embedding Retrieval Systems", CVPR 2022.
        The cosine form is ours.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        distance: BaseDistance = self.distance
        power = 2 if isinstance(distance, LpDistance) else 1
        known = isinstance(distance, LpDistance | CosineSimilarity)
        if not known or distance.p != 2 or distance.power != power:
            raise ValueError(
                "distance must be LpDistance(p=2, power=2) or CosineSimilarity(), got "
                f"{type(distance).__name__}(p={distance.p}, power={distance.power})"
            )

    def get_default_distance(self) -> BaseDistance:
        """Squared error on embeddings as they are."""
        return LpDistance(normalize_embeddings=False, p=2, power=2)

    def compute_loss(
        self, embeddings: torch.Tensor, labels: Any, indices_tuple: Any, ref_emb: torch.Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        """Return one loss a row."""
        c_f.indices_tuple_not_supported(indices_tuple)
        one, other = check_old_rows(embeddings, ref_emb, whose="the new model's embeddings")
        with torch.autocast(embeddings.device.type, enabled=False):
            if self.distance.normalize_embeddings:
                # The slope at a zero row is 1 / eps, which has to be a number of the embeddings' dtype too.
                eps = max(1e-12, torch.finfo(embeddings.dtype).tiny)
                one, other = normalize(one, dim=1, eps=eps), normalize(other, dim=1, eps=eps)
            losses = 1 - (one * other).sum(1) if self.distance.is_inverted else (one - other).square().mean(1)
            losses = losses.to(embeddings.dtype)
        return {"loss": per_sample(losses, c_f.torch_arange_from_size(embeddings))}
