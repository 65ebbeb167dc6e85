"""FastFill: a transformation trained with a predicted error, and by what the new classifier makes of its output."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import check_finite, check_labels, check_matrix, check_number, check_same_device, count_rows, rows_where
from .._host import BaseDistance, LpDistance, indices_tuple_not_supported
from .._rows import no_autocast, unit_rows
from ..frozen import FrozenClassifier
from ..frozen.old_references import check_row_labels
from ..frozen.old_system import OldSystem, as_classifier
from ..transformations.fastfill import gaussian_losses
from ._base import NamedTermsLoss
from ._reduction import per_sample
from .old_rows import check_old_rows


class FastFillLoss(NamedTermsLoss):
    r"""Bring transformed old embeddings onto new ones, and learn how far from them each one stays.

    .. math:: L = \operatorname{mean}_i \frac{1}{d} \Bigl( \frac{1}{2} e^{-s_i} \lVert f_{n,i} - h_i \rVert^2
        + \frac{d}{2} s_i \Bigr) + w \operatorname{mean}_{i: y_i \text{ known}} \ell_{new}(h_i, y_i)

    The first term is the negative log-likelihood, without its constant, of Gaussian errors with the variance
    :math:`e^s` in every coordinate; it may be below 0, and at :math:`s = 0` it is half of :class:`FCTLoss`.
    :math:`\ell_{new}` is the new model's own classification loss with its weights frozen.

    The likelihood gives up items that are hard to map. To train ``h`` by :class:`FCTLoss` and only the variance by this
    loss, take ``FastFillTransformation(..., variance_gradient=False)`` and, for ``fit_transformation(loss=...)``::

        def loss(mapped, labels=None, *, ref_emb, log_var):
            return fct(mapped, ref_emb=ref_emb) + fastfill(mapped.detach(), ref_emb=ref_emb, log_var=log_var)

    Args:
        new_classifier: the new model's, frozen: ``FrozenClassifier.from_loss(new_task_loss)``; or ClassCenters, or the
            pair ``(embeddings, labels)`` of stored new embeddings. None: no second term.
        classifier_weight: the multiplier ``w``; 0 or more, no unit.
        **kwargs: ``distance``: ``LpDistance(normalize_embeddings=False, p=2, power=2)`` by default, errors as they are;
            with ``normalize_embeddings=True`` those of unit rows, for galleries that are searched by cosine.
            ``reducer`` (one loss a row, default ``MeanReducer``), ``embedding_regularizer``, ``embedding_reg_weight``,
            ``collect_stats``.
    Shape:
        - embeddings ``(N, D_new)`` and log_var ``(N,)``: what ``FastFillTransformation.with_log_variance`` gives,
          both carry the gradient; log_var is a keyword of the call, which PML's wrappers and :class:`CompatibleLoss` do
          not pass on; labels ``(N,)``, needed with ``new_classifier`` alone
        - ref_emb ``(N, D_new)``: the new model's embeddings, row i of the same item; receives no gradient
        - output: scalar, float32 or better; ``terms``: ``likelihood_loss`` and, with ``new_classifier``,
          ``classification_loss``
    Raises:
        ValueError: ``new_classifier`` something else, or of another width; ``classifier_weight`` < 0; another
            distance; ``ref_emb`` or ``log_var`` missing, or not one row (one entry) an embedding; empty, NaN or
            infinite; another device; ``labels`` missing where they are needed; an ``indices_tuple``.
    Example:
        >>> mapped, new_emb = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
        >>> FastFillLoss()(mapped, ref_emb=new_emb, log_var=torch.zeros(1))
        tensor(6.2500)

    Reference:
        Jaeckle et al., "FastFill: Efficient Compatible Model Update", ICLR 2023. Ours are: the division by the
        width, the weight 1, unit rows, and that labels which the classifier does not know are left out.
    """

    def __init__(self, new_classifier: OldSystem | None = None, classifier_weight: float = 1.0, **kwargs: Any) -> None:
        classifier = None if new_classifier is None else as_classifier(new_classifier, "new_classifier")
        self._classifies = classifier is not None  # before PML's __init__, which asks for the names of the terms
        super().__init__(**kwargs)
        distance: BaseDistance = self.distance
        if not isinstance(distance, LpDistance) or (distance.p, distance.power) != (2, 2):
            raise ValueError(
                "distance must be LpDistance(p=2, power=2), with normalize_embeddings=True for cosines, got "
                f"{type(distance).__name__}(p={distance.p}, power={distance.power})"
            )
        self.new_classifier = classifier
        self.classifier_weight = check_number(classifier_weight, "classifier_weight", minimum=0)
        self.add_to_recordable_attributes(list_of_names=["classifier_weight"], is_stat=False)

    def _sub_loss_names(self) -> list[str]:
        return ["likelihood_loss", "classification_loss"] if self._classifies else ["likelihood_loss"]

    def get_default_distance(self) -> BaseDistance:
        """Squared error on embeddings as they are."""
        return LpDistance(normalize_embeddings=False, p=2, power=2)

    @property
    def needs_ref_emb(self) -> bool:
        """Always, the new model's embeddings."""
        return True

    @property
    def needs_labels(self) -> bool:
        """Whether there is a classifier."""
        return self._classifies

    def check_given(
        self,
        embeddings: torch.Tensor,
        labels: Any,
        indices_tuple: Any,
        ref_emb: Any,
        ref_labels: Any,
        *,
        log_var: Any = None,
        **others: Any,
    ) -> None:
        """Check the predicted variances, too."""
        super().check_given(embeddings, labels, indices_tuple, ref_emb, ref_labels, **others)
        if isinstance(log_var, torch.Tensor):
            check_finite(log_var, "log_var")

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Check that both rows are of the same item, and count those that the new classifier knows."""
        if self.new_classifier is not None:
            check_row_labels(check_labels(labels), ref_labels)
            count_rows(self, self.new_classifier.index_of(labels) >= 0)

    def compute_loss(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor | None,
        indices_tuple: Any,
        ref_emb: torch.Tensor,
        ref_labels: torch.Tensor | None,
        *,
        log_var: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Return both terms."""
        indices_tuple_not_supported(indices_tuple)
        mapped, target = check_old_rows(embeddings, ref_emb, fit=False, whose="the new model's embeddings")
        log_var = _check_log_var(log_var, embeddings).to(mapped.dtype)
        with no_autocast(embeddings):
            one, other = mapped, target
            if self.distance.normalize_embeddings:
                one, other = (unit_rows(rows, embeddings.dtype) for rows in (mapped, target))
            likelihood = gaussian_losses(one, other, log_var)
        terms = {"likelihood_loss": per_sample(likelihood)}
        if self.new_classifier is not None:
            labels = check_labels(labels, length=len(embeddings))
            terms["classification_loss"] = self._classification(self.new_classifier, mapped, labels)
        return terms

    def _classification(
        self, classifier: FrozenClassifier, mapped: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, Any]:
        if self.classifier_weight == 0:
            return self.zero_loss()
        check_same_device(mapped, "embeddings", classifier.rows, "the loss")
        targets = classifier.index_of(labels)
        index = rows_where(self, targets >= 0)
        if len(index) == 0:
            return self.zero_loss()
        check_matrix(mapped, width=classifier.in_features)
        losses = classifier.losses_at(mapped[index], targets[index])
        return per_sample(losses * self.classifier_weight, index)


def _check_log_var(value: Any, embeddings: torch.Tensor) -> torch.Tensor:
    if value is None:
        raise ValueError(
            "log_var must be given: the predicted log variance of each row, as "
            "FastFillTransformation.with_log_variance gives it; got None"
        )
    length = len(embeddings)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.shape != (length,):
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"log_var must be a floating point tensor with one entry a row, ({length},), got {got}")
    check_same_device(embeddings, "embeddings", value, "log_var")
    return value
