"""BT²: train a model free of the old one, and turn the basis of its embedding until a part of it fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .._checks import check_finite, check_matrix, check_number, check_same_device, count_rows, rows_where
from .._rows import unit_rows
from ..frozen import FrozenClassifier
from ..frozen.old_references import as_rows, check_row_labels
from ..frozen.old_system import OldSystem, as_centers
from ..heads import BasisTransformation
from ._reduction import per_sample
from ._task import Given, TaskAndTermsLoss, check_task_width

_NAMES = ("old", "independent")


class BT2Loss(TaskAndTermsLoss):
    r"""Train the embedding of a :class:`~pml_compat.heads.BasisTransformation`, each part for what it is for.

    .. math:: L = L_{task}(f, y) + \lambda_1 \operatorname{mean}_i \big(1 - \langle f_i, f^*_i \rangle\big)
        + \lambda_2 \operatorname{mean}_{i: y_i \text{ known}} \ell_{CE}(s \, t_i A_o^\top, y_i)
        + \lambda_3 \operatorname{mean}_i \big(1 - \langle t_i, f_{o,i} \rangle\big)

    :math:`f` and :math:`t` are the free and the old part of the embedding ``z`` (``basis.free_part``,
    ``basis.old_part``), :math:`f^*` is what a model trained with no thought of the old one gives, :math:`f_o` the old
    model's embedding and :math:`A_o` the centres of its classes; all of them have length 1. Samples whose label the
    centres do not know take no part in the third term.

    The basis is the model's: it is in neither ``parameters()`` nor ``state_dict()`` of the loss. Copy or pickle the two
    in one go, ``copy.deepcopy((model, loss))``. In several processes take :class:`GatheredLoss`: under PML's
    ``DistributedLossWrapper`` the task would turn the basis.

    Args:
        loss: the task loss, any PML loss, for embeddings ``basis.new_features`` wide; it keeps its own reducer, and
            its parameters are in ``parameters()``.
        basis: the model's.
        centers: of the old embeddings of the new training set: ClassCenters, the pair ``(embeddings, labels)`` or a
            FrozenClassifier; copied, as buffers.
        match_weight: the multiplier :math:`\lambda_1`; 0 or more. At 0 no independent embeddings are needed.
        class_weight: the multiplier :math:`\lambda_2`; 0 or more.
        point_weight: the multiplier :math:`\lambda_3`; 0 or more. At 0 no old embeddings are needed.
        scale: :math:`s` of the class logits, above 0; 1 in the public code. A larger one wants a smaller
            ``class_weight``.
        **kwargs: ``reducer`` (for the three added terms, one loss a row; default ``MeanReducer``),
            ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``, which also records
            ``known_fraction``, the share of the batch that the centres know.
    Shape:
        - embeddings ``(N, basis.out_features)``, ``z`` as the basis gives it, carries the gradient; labels ``(N,)``
          of the new training set; indices_tuple: for the task loss
        - ref_emb ``(N, basis.old_features)``: the old model's embeddings of the same rows; no gradient
        - target_emb ``(N, basis.new_features)``: the independent model's; no gradient. Where only ``ref_emb`` can be
          passed, as by trainers, that is ``{"old": ..., "independent": ...}``
        - output: scalar, float32 or better; ``terms``: ``task_loss``, ``match_loss``, ``class_loss``, ``point_loss``
    Raises:
        ValueError: ``basis`` no BasisTransformation; a task loss or centres of another width than its parts; a weight
            < 0 or ``scale`` not above 0; in a call: old or independent embeddings missing or given twice, or of
            another shape or device; embeddings empty, NaN, infinite, of another width or not this basis's; labels
            missing, negative or past the task loss's classes; ``ref_labels`` of other rows.
    Example:
        >>> from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
        >>> old, independent, labels = torch.randn(40, 8), torch.randn(40, 16), torch.arange(40) % 10
        >>> basis = BasisTransformation(new_features=16, old_features=8, extra_features=4)
        >>> model = torch.nn.Sequential(torch.nn.Linear(12, basis.in_features), basis)
        >>> task_loss = NormalizedSoftmaxLoss(num_classes=10, embedding_size=16)
        >>> loss_func = BT2Loss(task_loss, basis, (old, labels))
        >>> z, rows = model(torch.randn(4, 12)), torch.arange(4)  # of a batch
        >>> loss = loss_func(z, labels[rows], ref_emb=old[rows], target_emb=independent[rows])

    Reference:
        Zhou et al., "BT²: Backward-compatible Training with Basis Transformation", ICCV 2023. Differs from the public
        code in: old and independent embeddings come with the call, of whichever view the caller means; labels without
        a centre are left out; the task loss is any PML loss; centres have length 1, where the code has class means as
        they are, shorter the wider a class is, which pulls harder towards narrow classes.
    """

    own_arguments = ("target_emb",)
    basis: BasisTransformation

    def __init__(
        self,
        loss: torch.nn.Module,
        basis: BasisTransformation,
        centers: OldSystem,
        match_weight: float = 1.0,
        class_weight: float = 10.0,
        point_weight: float = 5.0,
        scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, **kwargs)
        if not isinstance(basis, BasisTransformation):
            raise ValueError(
                f"basis must be the model's BasisTransformation, got {type(basis).__name__}; make one with "
                "pml_compat.heads.BasisTransformation(new_features, old_features) and end the model with it"
            )
        check_task_width(loss, basis.new_features, "basis.new_features")
        centers = as_centers(centers, width=basis.old_features)
        # Past nn.Module's registration: it is the model's, and would be optimised and saved twice.
        self.__dict__["basis"] = basis
        self.old_classifier = FrozenClassifier.from_centers(centers, scale)
        self.match_weight = check_number(match_weight, "match_weight", minimum=0)
        self.class_weight = check_number(class_weight, "class_weight", minimum=0)
        self.point_weight = check_number(point_weight, "point_weight", minimum=0)
        self.add_to_recordable_attributes(list_of_names=["match_weight", "class_weight", "point_weight"], is_stat=False)
        self.add_to_recordable_attributes(name="known_fraction", is_stat=True)

    def _sub_loss_names(self) -> list[str]:
        return ["task_loss", "match_loss", "class_loss", "point_loss"]

    @property
    def needs_ref_emb(self) -> bool:
        """Whether another model's embeddings have a weight."""
        return self.match_weight > 0 or self.point_weight > 0

    @property
    def needs_labels(self) -> bool:
        """Whether the old classes have a weight."""
        return self.class_weight > 0

    def check_given(
        self,
        embeddings: torch.Tensor,
        labels: Any,
        indices_tuple: Any,
        ref_emb: Any,
        ref_labels: Any,
        *,
        target_emb: Any = None,
        **others: Any,
    ) -> None:
        """Check the values of those rows that have a weight, and that the basis is the model's."""
        check_matrix(embeddings, "embeddings", self.basis.out_features)
        self.basis.check_made(embeddings)
        given = _by_name(ref_emb, target_emb, embeddings)
        super().check_given(embeddings, labels, indices_tuple, None, ref_labels, **others)
        for name, weight in zip(_NAMES, (self.point_weight, self.match_weight), strict=True):
            called, rows = given[name]
            if weight > 0 and isinstance(rows, torch.Tensor):
                check_finite(rows, called)

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Check that all rows are of the same item, and count those that the centres know."""
        super().look_at_labels(labels, ref_labels)
        check_row_labels(labels, ref_labels)
        if self.class_weight > 0:
            count_rows(self, self.old_classifier.index_of(labels) >= 0)

    def parts(self, given: Given) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Return the free part, and both parts."""
        free, old_part = self.basis.free_part(given.embeddings), self.basis.old_part(given.embeddings)
        return free, (free, old_part)

    def task_references(self, given: Given) -> tuple[Any, Any]:
        """Return none: the task loss sees the free part alone."""
        return None, None

    def compute_terms(self, given: Given, rest: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
        """Return the added terms, of the two parts of ``z``."""
        free, old_part = rest
        references = _by_name(given.ref_emb, given.own["target_emb"], free)
        return {
            "match_loss": self._apart(free, references, "independent", self.match_weight, "match_weight"),
            "class_loss": self._misclassified(old_part, given.labels),
            "point_loss": self._apart(old_part, references, "old", self.point_weight, "point_weight"),
        }

    def _apart(
        self, part: torch.Tensor, references: Mapping[str, tuple[str, Any]], name: str, weight: float, argument: str
    ) -> dict[str, Any]:
        """How far a part of ``z`` is from another model's embeddings, ``1 - cosine``, one loss a row."""
        if weight == 0:
            return self.zero_loss()
        rows = _check_rows(part, *references[name], name, argument)
        losses = weight * (1 - (part * rows).sum(1))
        return per_sample(losses)

    def _misclassified(self, old_part: torch.Tensor, labels: Any) -> dict[str, Any]:
        """The cross-entropy over the old centres, one loss a known sample."""
        if self.class_weight == 0:
            return self.zero_loss()
        check_same_device(old_part, "embeddings", self.old_classifier.rows, "the loss")
        targets = self.old_classifier.index_of(labels)
        index = rows_where(self, targets >= 0)
        if self.collect_stats:
            self.known_fraction = len(index) / len(labels)
        if len(index) == 0:
            return self.zero_loss()
        losses = self.old_classifier.losses_at(old_part[index], targets[index])
        return per_sample(self.class_weight * losses, index)


def _by_name(ref_emb: Any, target_emb: Any, embeddings: torch.Tensor) -> dict[str, tuple[str, Any]]:
    """Return, of the old and the independent embeddings, what to call them in errors and the rows or None."""
    target_emb = as_rows(target_emb, embeddings)
    if not isinstance(ref_emb, Mapping):
        return {"old": ("ref_emb", ref_emb), "independent": ("target_emb", target_emb)}
    if not set(ref_emb) <= set(_NAMES):
        raise ValueError(f"ref_emb must have no other names than {list(_NAMES)}, got {list(ref_emb)}")
    if target_emb is not None and "independent" in ref_emb:
        raise ValueError("target_emb must be None where ref_emb has 'independent', got both")
    named = {name: (f"ref_emb[{name!r}]", ref_emb.get(name)) for name in _NAMES}
    return named if target_emb is None else named | {"independent": ("target_emb", target_emb)}


def _check_rows(part: torch.Tensor, called: str, rows: Any, name: str, weight: str) -> torch.Tensor:
    """Return the other model's embeddings at length 1, detached, in the dtype of ``part``."""
    if rows is None:
        raise ValueError(
            f"{called} must be given: the {name} model's embeddings of the same items, row by row; got None; "
            f"none are needed with {weight}=0"
        )
    if isinstance(rows, torch.Tensor):
        check_same_device(part, "embeddings", rows, called)
    rows = check_matrix(rows, called, width=part.shape[1])
    if len(rows) != len(part):
        raise ValueError(
            f"{called} must have one row an embedding, of the same item: expected {len(part)} rows, got {len(rows)}"
        )
    return unit_rows(rows.detach().to(part), part.dtype)
