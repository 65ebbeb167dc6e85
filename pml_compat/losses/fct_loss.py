"""Forward-compatible training: transformed old embeddings onto new ones."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import mse_loss

from .._checks import check_labels, check_number
from .._host import BaseDistance, CosineSimilarity, LpDistance, indices_tuple_not_supported
from .._rows import no_autocast, unit_rows
from ._base import NamedTermsLoss
from ._reduction import is_mean, per_sample, reduced
from .old_rows import check_old_rows
from .supervised_contrast import supervised_contrast


class FCTLoss(NamedTermsLoss):
    r"""Bring every transformed old embedding onto the new embedding of the same item.

    .. math:: \ell_i = \frac{1}{d} \lVert h_i - f_{n,i} \rVert^2

    Their mean is the mean squared error over all ``N d`` entries. With ``distance=CosineSimilarity()``
    :math:`\ell_i = 1 - \cos(h_i, f_{n,i})`, for galleries that are searched by cosine and models whose embeddings
    have no meaningful length. No labels are needed, and the new model is not touched.

    With a ``contrast_weight`` :math:`\lambda` each new embedding has to find the transformed ones of its class, too:

    .. math:: \ell_i \mathrel{+}= - \lambda \operatorname{mean}_{j: y_j = y_i} \log \operatorname{softmax}_j
        \cos(f_{n,i}, h_j) / \tau

    With ``torch.arange(N)`` for labels of the whole training set, each row is a class of its own, and the contrast asks
    for the row of the same item alone.

    Args:
        contrast_weight: :math:`\lambda`, 0 or more; above 0 labels are needed. In O(N^2 D) for a batch of N. Only for
            galleries of the classes that it is trained on (``docs/open_set.md``).
        temperature: :math:`\tau`, above 0, of cosines; the smaller, the more only the nearest rows of a query count.
        **kwargs: ``distance``: ``LpDistance(normalize_embeddings=False, p=2, power=2)`` by default, the squared error;
            with ``normalize_embeddings=True`` on unit rows; or ``CosineSimilarity()``. ``reducer`` (one loss a row,
            default ``MeanReducer``), ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``.
    Shape:
        - embeddings ``(N, D_new)``: what the transformation gives, carries the gradient; labels ``(N,)``, read by the
          contrast alone
        - ref_emb ``(N, D_new)``: the new model's embeddings, row i of the same item; receives no gradient
        - output: scalar, float32 or better
    Raises:
        ValueError: ``contrast_weight`` < 0, ``temperature`` not above 0; another distance; ``ref_emb`` missing, of
            another shape or device; empty, NaN or infinite; an ``indices_tuple``; labels missing for the contrast.
    Example:
        >>> FCTLoss()(torch.tensor([[3.0, 0.0]]), ref_emb=torch.tensor([[0.0, 4.0]]))
        tensor(12.5000)

    Reference:
        Ramanujan et al., "Forward Compatible Training for Large-Scale Embedding Retrieval Systems", CVPR 2022.
        The cosine form is ours. The contrast is the supervised one of Khosla et al., NeurIPS 2020; between transformed
        and new embeddings it is in Ricci et al., arXiv:2509.16664, 2025.
    """

    tells_by_its_value = True

    def __init__(self, contrast_weight: float = 0.0, temperature: float = 0.02, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.contrast_weight = check_number(contrast_weight, "contrast_weight", minimum=0)
        self.temperature = check_number(temperature, "temperature", minimum=0, exclusive=True)
        self.add_to_recordable_attributes(list_of_names=["contrast_weight", "temperature"], is_stat=False)
        distance: BaseDistance = self.distance
        power = 2 if isinstance(distance, LpDistance) else 1
        known = isinstance(distance, LpDistance | CosineSimilarity)
        if not known or distance.p != 2 or distance.power != power:
            raise ValueError(
                "distance must be LpDistance(p=2, power=2) or CosineSimilarity(), got "
                f"{type(distance).__name__}(p={distance.p}, power={distance.power})"
            )

    @property
    def needs_ref_emb(self) -> bool:
        """Always, the new model's embeddings."""
        return True

    @property
    def needs_labels(self) -> bool:
        """Whether there is a contrast of classes."""
        return self.contrast_weight > 0

    def get_default_distance(self) -> BaseDistance:
        """Squared error on embeddings as they are."""
        return LpDistance(normalize_embeddings=False, p=2, power=2)

    def compute_loss(
        self, embeddings: torch.Tensor, labels: Any, indices_tuple: Any, ref_emb: torch.Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        """Return one loss a row."""
        indices_tuple_not_supported(indices_tuple)
        one, other = check_old_rows(embeddings, ref_emb, fit=False, whose="the new model's embeddings")
        distance = self.distance
        with no_autocast(embeddings):
            plain = not (distance.normalize_embeddings or distance.is_inverted or self.contrast_weight > 0)
            if plain and is_mean(self.reducer, "loss"):  # one pass over the entries, forward and backward
                return {"loss": reduced(mse_loss(one, other))}
            if distance.normalize_embeddings or self.contrast_weight > 0:
                unit, other_unit = unit_rows(one, embeddings.dtype), unit_rows(other)
            if distance.normalize_embeddings:
                one, other = unit, other_unit
            if distance.is_inverted:
                losses = 1 - (one * other).sum(1)
            else:  # not mean(1), whose gradient is one pass more over all entries
                losses = mse_loss(one, other, reduction="none").sum(1) / one.shape[1]
            if self.contrast_weight > 0:
                if labels is None:
                    raise ValueError(
                        "labels must be given with a contrast_weight, got None; where there are none, torch.arange(N) "
                        "over the training set makes each row find its own"
                    )
                labels = check_labels(labels, length=len(one)).to(one.device)
                losses = losses + self.contrast_weight * supervised_contrast(
                    other_unit, unit, labels, labels, self.temperature
                )
        return {"loss": per_sample(losses)}
