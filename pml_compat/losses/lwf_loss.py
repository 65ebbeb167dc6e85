"""Learning without forgetting: the old classifier's soft answers, kept by the new model."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import check_number, check_same_device
from ..frozen.old_system import OldSystem, as_classifier
from ._label_free import LabelFreeLoss
from ._reduction import per_sample
from .old_rows import check_old_rows


class LwFLoss(LabelFreeLoss):
    r"""Let the old classifier answer alike on new and on old embeddings of the same item.

    .. math:: \ell_i = -\sum_c p_{ic} \log q_{ic}, \quad p_i = \operatorname{softmax}(z(f_{o,i}) / T_{old}), \quad
        q_i = \operatorname{softmax}(z(\tau(f_{n,i})) / T)

    :math:`z` are the frozen old classifier's logits, and :math:`\tau` fits the new embedding to the old width: its
    first coordinates, or zeros appended (:func:`pml_compat.fit_width`). No labels are needed: an item of a
    class that the old classifier does not know is described by its likeness to those it knows.

    Args:
        old_classifier: the FrozenClassifier, whose tensors are buffers; or ClassCenters, or the pair
            ``(embeddings, labels)`` of stored old embeddings, of which one is made.
        temperature: ``T``, above 0. 1 by default, as the logits are the old classifier's own: those of a cosine or
            a margin classifier carry its scale already. Public code has 0.01 for bare cosines, which is a scale of
            100; here it would multiply the scale and make every target one-hot.
        old_temperature: :math:`T_{old}`, above 0; None: the same.
        **kwargs: ``reducer`` (one loss a row, default ``MeanReducer``), ``embedding_regularizer``,
            ``embedding_reg_weight``, ``collect_stats``.
    Shape:
        - embeddings ``(N, D_new)``, carries the gradient; labels are not used
        - ref_emb ``(N, D_old)``: the old model's embeddings, row i of the same item; receives no gradient
        - output: scalar, float32 or better; at least the mean entropy of the old answers, not 0
    Raises:
        ValueError: ``old_classifier`` something else; a temperature that is not above 0; ``ref_emb`` missing, of
            another length or not as wide as the old classifier; empty, NaN or infinite; another device; an
            ``indices_tuple``.
    Example:
        >>> from pml_compat.frozen import FrozenClassifier
        >>> old_classifier = FrozenClassifier(torch.eye(2))
        >>> LwFLoss(old_classifier)(torch.tensor([[2.0, 2.0]]), ref_emb=torch.tensor([[0.0, 3.0]]))
        tensor(0.6931)

    Reference:
        Li and Hoiem, "Learning without Forgetting", ECCV 2016; as a compatible loss in Shen et al., "Towards
        Backward-Compatible Representation Learning", CVPR 2020. Differs from the former in: the old classifier is
        frozen too, as one that moves no longer fits the stored embeddings; no factor :math:`T^2`.
    """

    def __init__(
        self,
        old_classifier: OldSystem,
        temperature: float = 1.0,
        old_temperature: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.old_classifier = as_classifier(old_classifier)
        self.temperature = check_number(temperature, "temperature", minimum=0, exclusive=True)
        if old_temperature is None:
            old_temperature = self.temperature
        self.old_temperature = check_number(old_temperature, "old_temperature", minimum=0, exclusive=True)
        self.add_to_recordable_attributes(list_of_names=["temperature", "old_temperature"], is_stat=False)

    def check_rows(self, embeddings: torch.Tensor, ref_emb: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return old rows as wide as the old classifier, and where it is."""
        rows = check_old_rows(embeddings, ref_emb, width=self.old_classifier.in_features)
        check_same_device(embeddings, "embeddings", self.old_classifier.rows, "the loss")
        return rows

    def compare(self, new_emb: torch.Tensor, old_emb: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Return one loss a row."""
        targets = torch.softmax(self.old_classifier.logits(old_emb) / self.old_temperature, dim=1)
        logits = self.old_classifier.logits(new_emb) / self.temperature
        losses = torch.nn.functional.cross_entropy(logits, targets.to(logits.dtype), reduction="none")
        return {"loss": per_sample(losses)}
