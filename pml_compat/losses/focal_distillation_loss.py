"""Focal distillation, of positive-congruent training: follow the old model most where it is right."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.nn.functional import normalize

from .._checks import check_labels, check_matrix, check_number, check_same_device
from .._host import indices_tuple_not_supported
from .._rows import no_autocast
from ..frozen.old_references import check_row_labels
from ..frozen.old_system import OldSystem, as_classifier
from ._base import NamedTermsLoss
from ._reduction import per_sample
from .old_rows import check_old_rows, check_row_values


class FocalDistillationLoss(NamedTermsLoss):
    r"""Stay near the old model, most of all on the samples that it gets right.

    .. math:: \ell_i = (\alpha + \beta \, 1[\text{the old model is right on } i]) \, D_i

    :math:`D_i` is, with ``kind="features"``, the mean squared difference :math:`\lVert f_{n,i} - f_{o,i} \rVert^2 / D`
    of the embeddings as they are; with ``kind="logits"``, the divergence
    :math:`\operatorname{KL}(p_i \Vert q_i)` of the frozen old classifier's answers to the old and to the new embedding,
    both :math:`\operatorname{softmax}(z / T)`.

    The *old* model is right where, on the old embedding,

    - ``old_classifier`` is a FrozenClassifier: its largest logit is the label's;
    - it is ClassCenters: the nearest centre by cosine is the label's;
    - it is None: the nearest other old embedding in the batch, by cosine, has the label.

    A label that ``old_classifier`` does not know is not right. Who knows better passes ``old_correct``.

    Args:
        old_classifier: a FrozenClassifier, ClassCenters, the pair ``(embeddings, labels)`` of stored old embeddings, or
            None; its tensors are buffers.
        alpha: the weight of every sample; 0 or more.
        beta: what a sample weighs more where the old model is right; 0 or more.
        kind: ``"features"`` or ``"logits"``; the latter needs an ``old_classifier``.
        temperature: ``T``, above 0, for ``kind="logits"``; a high one needs larger weights (no factor :math:`T^2`).
        **kwargs: ``reducer`` (one loss a row, default ``MeanReducer``), ``embedding_regularizer``,
            ``embedding_reg_weight``, ``collect_stats``; with it the share of samples on which the old model is right
            is recorded as ``old_correct_fraction``.
    Shape:
        - embeddings ``(N, D_new)``, carries the gradient; labels ``(N,)``, not needed with ``old_correct``
        - ref_emb ``(N, D_old)``: the old model's embeddings, row i of the same item; receives no gradient; new
          embeddings are fitted to their width (:func:`pml_compat.fit_width`)
        - old_correct: ``(N,)`` bool, a keyword of the call that PML's wrappers and :class:`CompatibleLoss` do not pass
          on: where the old model is right, instead of this loss finding out
        - output: scalar, float32 or better
    Raises:
        ValueError: ``old_classifier`` of another type, or None with ``kind="logits"``; a hyper-parameter out of its
            range; labels missing; ``ref_labels`` that are not ``labels``; ``ref_emb`` missing or of another shape;
            ``old_correct`` that is no ``(N,)`` bool tensor; embeddings empty, NaN, infinite or on another device; an
            ``indices_tuple``.
    Example:
        >>> from pml_compat.frozen import ClassCenters
        >>> new_emb, old_emb, labels = torch.zeros(2, 2), torch.eye(2), torch.tensor([0, 0])
        >>> centers = ClassCenters(torch.eye(2), torch.tensor([0, 1]))  # right on the first: (6 + 1) / 2 times 1/2
        >>> FocalDistillationLoss(centers)(new_emb, labels, ref_emb=old_emb)
        tensor(1.7500)
        >>> FocalDistillationLoss()(new_emb, ref_emb=old_emb, old_correct=torch.tensor([True, True]))
        tensor(3.)

    Reference:
        Yan et al., "Positive-Congruent Training: Towards Regression-Free Model Updates", CVPR 2021. Differs from
        public code for retrieval in: "right" is the old model's answer, where that code looks at the new one's. The
        weights 1 and 5 are that code's; centres and neighbours, for models without a classifier, are ours.
    """

    def __init__(
        self,
        old_classifier: OldSystem | None = None,
        *,
        alpha: float = 1.0,
        beta: float = 5.0,
        kind: Literal["features", "logits"] = "features",
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if kind not in ("features", "logits"):
            raise ValueError(f"kind must be 'features' or 'logits', got {kind!r}")
        if kind == "logits" and old_classifier is None:
            raise ValueError("old_classifier must be given with kind='logits', got None")
        # Of centres, the nearest by cosine is the largest logit.
        self.old_classifier = None if old_classifier is None else as_classifier(old_classifier)
        self.alpha = check_number(alpha, "alpha", minimum=0)
        self.beta = check_number(beta, "beta", minimum=0)
        self.kind = kind
        self.temperature = check_number(temperature, "temperature", minimum=0, exclusive=True)
        self.add_to_recordable_attributes(list_of_names=["alpha", "beta"], is_stat=False)
        self.add_to_recordable_attributes(name="old_correct_fraction", is_stat=True)

    @property
    def needs_ref_emb(self) -> bool:
        """Always."""
        return True

    def check_given(
        self,
        embeddings: torch.Tensor,
        labels: Any,
        indices_tuple: Any,
        ref_emb: Any,
        ref_labels: Any,
        *,
        old_correct: torch.Tensor | None = None,
        **others: Any,
    ) -> None:
        """Check embeddings alone where labels are not needed."""
        if old_correct is None:
            super().check_given(embeddings, labels, indices_tuple, ref_emb, ref_labels, **others)
        else:
            check_row_values(embeddings, ref_emb)

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Check that both rows are of the same item."""
        check_row_labels(check_labels(labels), ref_labels)

    def compute_loss(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        indices_tuple: Any,
        ref_emb: torch.Tensor,
        ref_labels: torch.Tensor | None,
        *,
        old_correct: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Return one loss a row."""
        indices_tuple_not_supported(indices_tuple)
        classifier = self.old_classifier
        new_emb, old_emb = check_old_rows(embeddings, ref_emb)
        if old_correct is None:
            labels = check_labels(labels, length=len(embeddings))
        else:
            old_correct = _check_mask(old_correct, len(embeddings)).to(embeddings.device)
        with no_autocast(embeddings):
            if classifier is None:
                right = nearest_has_the_label(old_emb, labels) if old_correct is None else old_correct
                distances = feature_distances(new_emb, old_emb)
            else:
                check_matrix(old_emb, "ref_emb", classifier.in_features)
                check_same_device(embeddings, "embeddings", classifier.rows, "the loss")
                answers = classifier.logits(old_emb)
                # An unknown label is class -1, which is nobody's answer.
                right = answers.argmax(1) == classifier.index_of(labels) if old_correct is None else old_correct
                if self.kind == "features":
                    distances = feature_distances(new_emb, old_emb)
                else:
                    new_answers = classifier.logits(new_emb)
                    distances = divergences(answers, new_answers, self.temperature)
            losses = (self.alpha + self.beta * right.to(distances.dtype)) * distances
        if self.collect_stats:
            self.old_correct_fraction = right.float().mean().item()
        return {"loss": per_sample(losses)}


def nearest_has_the_label(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return, for each row, whether the nearest other row by cosine has its label; ``(N,)`` bool."""
    rows = normalize(embeddings, dim=1)
    cosines = (rows @ rows.t()).fill_diagonal_(-torch.inf)
    nearest = cosines.argmax(1)
    another = nearest != torch.arange(len(labels), device=labels.device)  # a row that is alone finds itself
    return another & (labels[nearest] == labels)


def feature_distances(new_emb: torch.Tensor, old_emb: torch.Tensor) -> torch.Tensor:
    """Return ``(N,)`` mean squared differences of rows as they are."""
    return (new_emb - old_emb).square().mean(1)


def divergences(old_logits: torch.Tensor, new_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return ``(N,)`` KL divergences of the old answers, softmax(logits / T), to the new ones."""
    old, new = torch.log_softmax(old_logits / temperature, 1), torch.log_softmax(new_logits / temperature, 1)
    return (old.exp() * (old - new)).sum(1)


def _check_mask(value: Any, length: int) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.shape != (length,):
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"old_correct must be a bool tensor with one entry a row, ({length},), got {got}")
    return value
