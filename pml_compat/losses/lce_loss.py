"""Learning compatible embeddings: class centres aligned, new embeddings inside the old classes' boundaries."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch.nn.functional import mse_loss

from .._checks import check_same_device, count_rows, rows_where
from .._rows import cosines_with, no_autocast, unit_rows
from ..frozen import ClassCenters, class_weights
from ..frozen.class_weights import class_weight_parameter
from ..frozen.old_system import OldSystem, as_centers
from ..transformations import Transformation
from ._base import check_weight
from ._reduction import per_sample, reduced
from ._task import Given, TaskAndTermsLoss
from .boundaries import BoundaryForm, check_boundary_form, outside_boundary, with_boundary
from .class_weight_length import CLASS_WEIGHT_LENGTH
from .direction_error import direction_error
from .transformation_widths import check_widths


class LCELoss(TaskAndTermsLoss):
    r"""Train a new model whose classes lie where the old model's classes lie.

    .. math:: L = L_{task}(f_n, y; W) + \lambda_a \frac{1}{C d} \sum_{j} \lVert \hat w_j - c_j \rVert^2
        + \lambda_b \operatorname{mean}_i \max(0, \angle(f_{n,i}, c_{y_i}) - \theta_{y_i})

    draws the task loss's class weights :math:`w_j` onto the old class centres :math:`c_j`, and each new embedding into
    the boundary :math:`\theta` of its class. By default both are drawn onto ``ClassCenters.directions``, the embeddings
    by :math:`1 - \cos(f_n, t_y)`, as strongly as the task loss draws (:class:`GradientBalance`). With maps of the old
    space (:math:`T_f`) or into it (:math:`T_b`) the alignment is the mean of :math:`\operatorname{mse}(\hat w, T_f(c))`
    and :math:`\operatorname{mse}(T_b(\hat w), c)`, and :math:`T_b(f_n)` or, without it, :math:`T_f(c)` is compared.

    Args:
        loss: the task loss, a PML loss with class weights; with ``align_weight=0`` any. It keeps its own reducer, and
            its parameters are in ``parameters()``.
        centers: of the old embeddings of the new training set: ClassCenters, the pair ``(embeddings, labels)``, or a
            FrozenClassifier, which has no boundaries. Copied, as buffers.
        align_weight: ``lambda_a``, 0 or more, for the paper's alignment (its code: 100); None: the default's.
        boundary_weight: ``lambda_b``, 0 or more, for the paper's hinge (its code: 1); None: the default's.
        boundary: in what the hinge compares: ``"angle"``, radians, or ``"cosine"``. How far the boundary itself lies is
            measured by ``ClassCenters.from_embeddings(boundary="max" or "iqr")``.
        forward_transformation: old space to new; trained with this loss, it then maps the stored gallery.
        backward_transformation: new space to old; it then maps the queries.
        class_weight_length: above 0, see :func:`shorten_class_weights`; None leaves class weights as they are.
        **kwargs: ``reducer`` (of the boundary term, one loss a sample; default ``MeanReducer``),
            ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``, which also records the shares
            ``bounded_fraction`` (of the batch) and ``outside_fraction`` (of those with a boundary).
    Shape:
        - embeddings ``(N, D_new)``, carries the gradient; labels ``(N,)``, needed unless ``boundary_weight=0``
        - output: scalar, float32 or better; ``terms``: ``task_loss``, ``align_loss``, ``boundary_loss``
    Raises:
        ValueError: a weight < 0; widths that differ without a map, or that the maps do not fit; no boundaries or class
            weights where they are needed; embeddings empty, NaN, infinite or on another device; labels missing,
            negative or past the task loss's classes, in ``centers`` too.
    Warns:
        UserWarning: ``classes_without_center`` (left out) or ``classes_without_boundary``, of one sample (no hinge).
    Example:
        >>> from pytorch_metric_learning.losses import ArcFaceLoss
        >>> centers = ClassCenters.from_embeddings(torch.randn(40, 8), torch.arange(40) % 10)
        >>> loss_func = LCELoss(ArcFaceLoss(num_classes=10, embedding_size=8), centers)
        >>> loss = loss_func(torch.randn(4, 8), torch.tensor([0, 3, 7, 9]))

    Reference:
        Meng et al., "Learning Compatible Embeddings", ICCV 2021. Differs from the paper in: the default; short class
        weights; classes without a centre or a boundary are left out of the terms that need it.
    """

    def __init__(
        self,
        loss: torch.nn.Module,
        centers: OldSystem,
        align_weight: float | None = None,
        boundary_weight: float | None = None,
        boundary: BoundaryForm = "angle",
        forward_transformation: Transformation | None = None,
        backward_transformation: Transformation | None = None,
        *,
        class_weight_length: float | None = CLASS_WEIGHT_LENGTH,
        **kwargs: Any,
    ) -> None:
        weights = {"align_loss": align_weight, "boundary_loss": boundary_weight}
        balanced = tuple(name for name, weight in weights.items() if weight is None)
        super().__init__(loss, balanced=balanced, class_weight_length=class_weight_length, **kwargs)
        centers = as_centers(centers)
        self.align_weight = check_weight(align_weight, "align_weight")
        self.boundary_weight = check_weight(boundary_weight, "boundary_weight")
        self.boundary = check_boundary_form(boundary, centers, "centers", self.boundary_weight)
        self.forward_transformation = forward_transformation
        self.backward_transformation = backward_transformation
        if balanced and forward_transformation is None:
            centers.directions  # noqa: B018 (fitted once, for the copy too)
        self.old_centers = copy.deepcopy(centers)
        self.register_buffer("old_bounded", with_boundary(centers))
        if self.num_classes is None:
            self._check_without_class_weights(centers)
        else:
            self._check_class_weights(centers)
        self.register_load_state_dict_post_hook(_derive)
        _derive(self)
        self._report_left_out()
        given = [name for name in ("align_weight", "boundary_weight") if getattr(self, name) is not None]
        self.add_to_recordable_attributes(list_of_names=given, is_stat=False)
        self.add_to_recordable_attributes(list_of_names=["bounded_fraction", "outside_fraction"], is_stat=True)

    def _check_without_class_weights(self, centers: ClassCenters) -> None:
        if self.align_weight is None:
            self.align_weight = 0.0
        if self.align_weight > 0:
            raise ValueError(
                f"loss must have class weights to align, {type(self.loss).__name__} has none; take a classification or "
                "proxy loss, or leave align_weight out, or pass 0, to keep the boundary term alone"
            )
        check_widths(self.forward_transformation, self.backward_transformation, centers.centers.shape[1], None)

    def _check_class_weights(self, centers: ClassCenters) -> None:
        with torch.no_grad():
            weights = class_weights(self.loss)
        highest = int(centers.labels.max())
        if highest >= len(weights):
            raise ValueError(
                f"centers must have labels in [0, {len(weights) - 1}], the task loss's classes, got {highest}; a label "
                "is one of the new training set"
            )
        old_width, new_width = centers.centers.shape[1], weights.shape[1]
        check_widths(self.forward_transformation, self.backward_transformation, old_width, new_width)
        if self.forward_transformation is None and self.backward_transformation is None and weights.stride(0) == 1:
            # A copy that lies in memory as the weights do, (D, C), for the alignment that goes through both whole; the
            # boundary term picks rows, which would miss the cache there the more, the more classes there are.
            self.register_buffer("old_columns", None, persistent=False)

    def _report_left_out(self) -> None:
        """Say once, loudly, which classes a term does without."""
        labels = self.old_centers.labels
        said = [
            f"{len(found)} {what}: {', '.join(map(str, found[:10]))}{', ...' if len(found) > 10 else ''}"
            for found, what in (
                (self.classes_without_center, "without a centre (neither aligned nor bounded)"),
                (self.classes_without_boundary, "of one sample (not bounded)"),
            )
            if found
        ]
        if said:
            total = self.num_classes or len(labels)
            warnings.warn(f"LCELoss leaves out, of {total} classes, {'; '.join(said)}", stacklevel=3)

    def _sub_loss_names(self) -> list[str]:
        return ["task_loss", "align_loss", "boundary_loss"]

    @property
    def needs_labels(self) -> bool:
        """Whether there is a boundary term, which is that of the label's class."""
        return self.boundary_weight != 0

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Count the samples that the boundary term is for, where these are not all."""
        super().look_at_labels(labels, ref_labels)
        if self.boundary_weight != 0 and not self._for_all:
            count_rows(self, self._known(self.old_centers.index_of(labels)))

    @property
    def _for_all(self) -> bool:
        known = self.num_classes is not None and self.old_centers.label_map.gapless >= self.num_classes
        return known and (self.boundary_weight is None or not self.classes_without_boundary)

    def _known(self, rows: torch.Tensor) -> torch.Tensor:
        """Return which of the centres' rows, -1 for none, the boundary term has something to say about."""
        return rows >= 0 if self.boundary_weight is None else (rows >= 0) & self.old_bounded[rows.clamp(min=0)]

    def compute_terms(self, given: Given, rest: torch.Tensor) -> dict[str, Any]:
        """Return the alignment, one number, and the boundary term, one loss a sample that has a boundary."""
        embeddings, labels = rest, given.labels
        centers = self.old_centers.centers
        check_same_device(embeddings, "embeddings", centers, "the loss")
        check_widths(self.forward_transformation, self.backward_transformation, centers.shape[1], embeddings.shape[1])
        with no_autocast(embeddings):
            terms = {"align_loss": self.zero_loss(), "boundary_loss": self.zero_loss()}
            if self.align_weight is None:
                terms["align_loss"] = reduced(self._alignment(self._aims(embeddings.dtype)))
            elif self.align_weight > 0:
                terms["align_loss"] = reduced(self.align_weight * self._alignment(centers.to(embeddings.dtype)))
            if self.boundary_weight is None:
                terms["boundary_loss"] = self._draw(embeddings, labels, self._aims(embeddings.dtype))
            elif self.boundary_weight > 0:
                boundary = self._boundary(embeddings, labels, centers.to(embeddings.dtype), self.boundary_weight)
                terms["boundary_loss"] = boundary
        return terms

    def drawn_by(self, name: str, embeddings: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return the class weights for the alignment, which does not touch the embeddings."""
        return class_weight_parameter(self.loss) if name == "align_loss" else (embeddings, 0)

    def _aims(self, dtype: torch.dtype) -> torch.Tensor:
        """Return where classes are drawn in the old space; what a map of the gallery is trained on is the gallery's."""
        old = self.old_centers
        return (old.directions if self.forward_transformation is None else old.centers).to(dtype)

    def _alignment(self, aims: torch.Tensor) -> torch.Tensor:
        weights = class_weights(self.loss).to(aims.dtype)
        if self.classes_without_center or not self._in_order:
            weights = weights[self.old_centers.labels]
        if self.forward_transformation is None and self.backward_transformation is None:
            columns = getattr(self, "old_columns", None)
            return direction_error(weights, aims if columns is None else columns.t().to(aims.dtype))
        directions = unit_rows(weights)
        errors = []
        if self.forward_transformation is not None:
            errors.append(mse_loss(directions, self.at_own_pace(self.forward_transformation, "align_loss")(aims)))
        if self.backward_transformation is not None:
            errors.append(mse_loss(self.at_own_pace(self.backward_transformation, "align_loss")(directions), aims))
        return torch.stack(errors).mean()

    def _draw(self, embeddings: torch.Tensor, labels: torch.Tensor, aims: torch.Tensor) -> dict[str, Any]:
        rows = self.old_centers.index_of(labels)
        return self._of_known(1 - self._cosines(embeddings, rows.clamp(min=0), aims), rows)

    def _boundary(
        self, embeddings: torch.Tensor, labels: torch.Tensor, centers: torch.Tensor, weight: float
    ) -> dict[str, Any]:
        rows = self.old_centers.index_of(labels)
        cosines = self._cosines(embeddings, rows.clamp(min=0), centers)
        boundaries = self.old_centers.boundaries
        assert boundaries is not None  # seen to at construction
        outside = outside_boundary(cosines, boundaries[rows.clamp(min=0)].to(cosines.dtype), self.boundary)
        return self._of_known(weight * outside, rows)

    def _cosines(self, embeddings: torch.Tensor, rows: torch.Tensor, aims: torch.Tensor) -> torch.Tensor:
        """Return each embedding's cosine with the aim of its class, ``(N,)``, in the space that is searched."""
        if self.backward_transformation is not None:
            mapped = self.at_own_pace(self.backward_transformation, "boundary_loss")(unit_rows(embeddings))
            return cosines_with(mapped, aims.index_select(0, rows))
        if self.forward_transformation is None:
            return cosines_with(embeddings, aims.index_select(0, rows))
        aims = unit_rows(self.at_own_pace(self.forward_transformation, "boundary_loss")(aims))
        return (unit_rows(embeddings) * aims.index_select(0, rows)).sum(1)

    def _of_known(self, losses: torch.Tensor, rows: torch.Tensor) -> dict[str, Any]:
        index = None
        if not self._for_all:
            index = rows_where(self, self._known(rows))
            if len(index) < len(losses):
                losses = losses[index]
        if self.collect_stats:
            self.bounded_fraction = len(losses) / len(rows)
            self.outside_fraction = (losses > 0).float().mean().item() if len(losses) else 0.0
        if len(losses) == 0:
            return self.zero_loss()
        return per_sample(losses, index)


def _derive(loss: LCELoss, _: Any = None) -> None:
    """Make anew what follows from the centres, which may have been loaded."""
    labels = loss.old_centers.labels
    loss.classes_without_center = sorted(set(range(loss.num_classes or 0)) - set(labels.tolist()))
    loss.classes_without_boundary = labels[~loss.old_bounded].tolist()
    loss._in_order = labels.equal(torch.arange(len(labels), device=labels.device))
    if hasattr(loss, "old_columns"):
        aims = loss.old_centers.directions if loss.align_weight is None else loss.old_centers.centers
        loss.old_columns = aims.t().contiguous()
