"""A new model and a linear map back into the space of the one before it, trained together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._checks import check_matrix
from .._rows import cosines_with, no_autocast, unit_rows
from ..frozen import class_weights
from ..frozen.old_references import check_row_labels
from ..transformations import (
    LinearTransformation,
    LowRankTransformation,
    OrthogonalTransformation,
    ScaledOrthogonalTransformation,
    Transformation,
    TransformationChain,
)
from ._base import check_weight
from ._reduction import per_sample
from ._task import Given, TaskAndTermsLoss
from .class_weight_length import CLASS_WEIGHT_LENGTH
from .old_rows import check_old_rows
from .transformation_widths import check_widths

_LINEAR = (LinearTransformation, LowRankTransformation, OrthogonalTransformation, ScaledOrthogonalTransformation)


class BCAlignerLoss(TaskAndTermsLoss):
    r"""Train a new model together with a map of its embeddings back to those of the model before it.

    .. math:: L = L_{task}(z_k, y) + \lambda \operatorname{mean}_i \frac{1}{k} \sum_{j=0}^{k-1} \frac{1}{d_{k-1-j}}
        \lVert A_j z_{k-1,i} - A_j B_k z_{k,i} \rVert^2, \qquad A_0 = I, \quad A_j = B_{k-j} \cdots B_{k-1}

    Only the newest embeddings :math:`z_k` are stored. Who still uses an older version gets it by the maps, one after
    another: :math:`B_k z_k` stands for version k - 1, :math:`B_{k-1} B_k z_k` for k - 2. With the older maps given, an
    error counts as it arrives at every version. New queries search a gallery of an older version in the same way. By
    default a term is :math:`1 - \cos(A_j B_k z_k, A_j z_{k-1})`, as searches compare by angles, and all of them draw
    as strongly as the task loss does (:class:`GradientBalance`).

    Args:
        loss: the task loss, any PML loss; it keeps its own reducer, and its parameters are in ``parameters()``.
        backward_transformation: ``B_k``, from the new width to that of the version before, whichever is wider; the
            paper's is ``LinearTransformation(d_new, d_old, bias=False)``; ``OrthogonalTransformation(d_new, d_old)``
            keeps the angles of what is mapped, as queries need. Its parameters are in ``parameters()``.
        weight: ``lambda``, 0 or more, for the paper's squared error (its code: 16); None: the default.
        previous_maps: the older maps, from version k - 1 down: one, or a ``TransformationChain`` of them, newest first;
            linear. Copied, as buffers; None for the version before alone.
        class_weight_length: see :func:`shorten_class_weights`; None leaves the class weights as they are.
        **kwargs: ``reducer`` (of the alignment, one loss a sample; default ``MeanReducer``), ``embedding_regularizer``,
            ``embedding_reg_weight``, ``collect_stats``.
    Shape:
        - embeddings ``(N, d_new)``, carries the gradient, as do the map's parameters; labels ``(N,)``, where the task
          loss needs them; indices_tuple and what else the call is given: for the task loss
        - ref_emb ``(N, d_old)``: embeddings of the version before, row i of the same item; no gradient
        - output: scalar, float32 or better; ``terms``: ``task_loss``, ``align_loss``
    Raises:
        ValueError: ``weight`` < 0; a ``backward_transformation`` that is none, or of another width than the task loss's
            class weights; ``previous_maps`` that are not linear, or start from another width than the map ends at; in
            a call: ``ref_emb`` missing, or of another shape or device; ``ref_labels`` that are not ``labels``;
            embeddings empty, NaN or infinite.
    Example:
        >>> from pytorch_metric_learning.losses import ArcFaceLoss
        >>> to_previous = LinearTransformation(16, 8, bias=False)
        >>> loss_func = BCAlignerLoss(ArcFaceLoss(num_classes=10, embedding_size=16), to_previous)
        >>> loss = loss_func(torch.randn(4, 16), torch.tensor([0, 3, 7, 9]), ref_emb=torch.randn(4, 8))
        >>> TransformationChain(loss_func.backward_transformation, LinearTransformation(8, 4)).out_features
        4

    Reference:
        Hu et al., "Learning Backward Compatible Embeddings", KDD 2022 (BC-Aligner). Differs from it in: the default;
        any task loss, where the paper aligns users and both items of a triplet; the map starts at the first
        coordinates.
    """

    old_matrix: torch.Tensor | None
    old_offset: torch.Tensor | None

    def __init__(
        self,
        loss: torch.nn.Module,
        backward_transformation: Transformation,
        weight: float | None = None,
        previous_maps: Transformation | None = None,
        *,
        class_weight_length: float | None = CLASS_WEIGHT_LENGTH,
        **kwargs: Any,
    ) -> None:
        balanced = ("align_loss",) if weight is None else ()
        super().__init__(loss, balanced=balanced, class_weight_length=class_weight_length, **kwargs)
        self.weight = check_weight(weight, "weight")
        if backward_transformation is None:
            raise ValueError(
                "backward_transformation must be given: LinearTransformation(d_new, d_old, bias=False), got None"
            )
        old_width = getattr(backward_transformation, "out_features", 0)  # check_widths refuses what has none
        check_widths(None, backward_transformation, old_width, _task_width(loss))
        self.backward_transformation = backward_transformation
        matrices, offsets = _composed(previous_maps, old_width)
        self.versions = [old_width, *(len(offset) for offset in offsets)]
        self.register_buffer("old_matrix", torch.cat(matrices, 1) if matrices else None)
        self.register_buffer("old_offset", torch.cat(offsets) if offsets else None)
        if weight is not None:
            self.add_to_recordable_attributes(name="weight", is_stat=False)

    def _sub_loss_names(self) -> list[str]:
        return ["task_loss", "align_loss"]

    @property
    def needs_ref_emb(self) -> bool:
        """Always."""
        return True

    @property
    def needs_labels(self) -> bool:
        """Never: the alignment is without; a task loss with classes asks by itself."""
        return False

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Check that both rows are of the same item."""
        super().look_at_labels(labels, ref_labels)
        check_row_labels(labels, ref_labels)

    def task_references(self, given: Given) -> tuple[Any, Any]:
        """Return the old embeddings where the task loss asks for them."""
        asks = getattr(self.loss, "needs_ref_emb", False)
        return (given.ref_emb, given.ref_labels) if asks else (None, None)

    def parts(self, given: Given) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embeddings, and those of the version before."""
        check_matrix(given.embeddings, "embeddings", self.backward_transformation.in_features)
        return given.embeddings, check_old_rows(given.embeddings, given.ref_emb, width=self.versions[0])[1]

    def compute_terms(self, given: Given, rest: torch.Tensor) -> dict[str, Any]:
        """Return one loss a sample, the mean over the versions."""
        if self.weight == 0:
            return {"align_loss": self.zero_loss()}
        with no_autocast(rest):
            mapped = self.at_own_pace(self.backward_transformation, "align_loss")(given.embeddings)
            pairs = zip(self._as_versions(mapped), self._as_versions(rest), strict=True)
            if self.weight is None:
                errors = [1 - cosines_with(new, unit_rows(old), given.dtype) for new, old in pairs]
            else:
                errors = [self.weight * (old - new).square().mean(1) for new, old in pairs]
            return {"align_loss": per_sample(torch.stack(errors).mean(0))}

    def _as_versions(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return rows of version k - 1 as every version has them, down to the first that there is a map to."""
        if self.old_matrix is None or self.old_offset is None:
            return [rows]
        older = torch.addmm(self.old_offset.to(rows), rows, self.old_matrix.to(rows))
        return [rows, *older.split(self.versions[1:], dim=1)]


def _composed(maps: Any, width: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the matrix ``(width, d_j)`` and the offset ``(d_j,)`` from the newest version to each older one."""
    rows = torch.cat([torch.zeros(1, width), torch.eye(width)])
    matrices, offsets = [], []
    for number, older in enumerate(_one_by_one(maps)):
        if not isinstance(older, _LINEAR):
            known = ", ".join(kind.__name__ for kind in _LINEAR)
            raise ValueError(f"previous_maps must be linear, {known} or a chain of these, got {type(older).__name__}")
        if number == 0 and older.in_features != width:
            raise ValueError(
                f"previous_maps must start where backward_transformation ends, at width {width}, newest map first; got "
                f"one from width {older.in_features} to {older.out_features}"
            )
        with torch.no_grad():
            weight = next(older.parameters())
            rows = older(rows.to(weight)).to(torch.float32)
        offsets.append(rows[0])
        matrices.append(rows[1:] - rows[0])
    return matrices, offsets


def _one_by_one(maps: Any) -> Iterator[Any]:
    if isinstance(maps, TransformationChain):
        for step in maps.steps:
            yield from _one_by_one(step)
    elif maps is not None:
        yield maps


def _task_width(loss: torch.nn.Module) -> int | None:
    try:
        return class_weights(loss).shape[1]
    except ValueError:
        return None  # pair and triplet losses take any width
