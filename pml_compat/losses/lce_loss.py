"""Learning compatible embeddings: class centres aligned, new embeddings inside the old classes' boundaries."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

import torch
from pytorch_metric_learning.utils import common_functions as c_f
from torch.nn.functional import mse_loss, normalize, relu

from ..checks import check_number, check_same_device
from ..frozen import ClassCenters, class_weights
from ..frozen.class_centers import check_centers
from ..frozen.heads import rescale_class_weights_
from ..transformations import Transformation
from .direction_error import direction_error
from .task_and_terms import TaskAndTermsLoss, per_sample, reduced

Boundary = Literal["angle", "cosine"]
_NEAR_ONE = 1 - 1e-6  # arccos has an infinite slope at 1


class LCELoss(TaskAndTermsLoss):
    r"""Train a new model whose classes lie where the old model's classes lie.

    .. math:: L = L_{task}(f_n, y; W) + \lambda_a \frac{1}{C d} \sum_{j} \lVert \hat w_j - c_j \rVert^2
        + \lambda_b \operatorname{mean}_i \max(0, \angle(f_{n,i}, c_{y_i}) - \theta_{y_i})

    The class weights :math:`w_j` of the task loss (:func:`pml_compat.frozen.class_weights`) are drawn onto the old
    class centres :math:`c_j`, and each new embedding into the boundary :math:`\theta` of its class's old embeddings.
    Features, class weights and centres are unit rows. With transformations, old space to new (:math:`T_f`) and new to
    old (:math:`T_b`), the widths may differ and the alignment is
    :math:`\frac12 [\operatorname{mse}(\hat w, T_f(c)) + \operatorname{mse}(T_b(\hat w), c)]`, or the one of the two
    that is there. The boundary term compares :math:`T_b(\hat f_n)` with :math:`c`; with :math:`T_f` alone,
    :math:`f_n` with :math:`T_f(c)`.

    After training, queries by the new model search the old gallery as they are (direct), mapped by
    ``backward_transformation``, or as they are in a gallery mapped by ``forward_transformation``.

    Which knob governs it: the class weights must get to the centres, and they turn the slower the longer they are.
    PML draws their entries from N(0, 1), so they are sqrt(d) long, and an optimizer such as Adam, whose steps do not
    depend on the size of the gradient, leaves them where they are: on scikit-learn's digits, in the setting of
    ``pml-compat demo``, they end 61 degrees from the centres, and new/old P@1 / mAP is 61.5 / 48.3 % against
    91.9 / 63.1 % old/old, whatever the weights of the terms. This loss therefore gives them length 0.1 once, which
    changes nothing in a task loss that only uses their directions; with the same weights of the terms they end
    5 degrees from the centres, and new/old is 96.8 / 82.3 %. With ArcFace (scale 16, margin 0.1 rad) it is
    94.7 / 76.8 % instead of 36.9 / 36.5 % (``python benchmarks/lce_settings.py``, mean of seeds 10 to 12).
    The boundary term seldom acts: the largest angle of a class is mostly wider than the way to the next centre (see
    :meth:`ClassCenters.summary`).

    Args:
        loss: the task loss, a PML loss with class weights (any PML loss with ``align_weight=0``). It keeps its own
            reducer, and its parameters are in ``parameters()`` of this loss.
        centers: centres and boundaries of the old model's embeddings of the new training set; copied, as buffers.
        align_weight: the multiplier ``lambda_a``, 0 or more. 100, the paper's code's, belongs to the mean over all C d
            entries; beside a softmax over cosines on CIFAR-100 1000 to 10000 were best (``docs/cifar100.md``).
        boundary_weight: the multiplier ``lambda_b``, 0 or more.
        boundary: ``"angle"``, in radians; or ``"cosine"``, the hinge ``max(0, cos(theta) - cos(f_n, c))``.
        forward_transformation: old space to new, one of :mod:`pml_compat.transformations`; it is trained with this
            loss, and then maps the stored gallery.
        backward_transformation: new space to old; it then maps the queries.
        class_weight_length: the length that the class weights are given at construction, in place, where their
            lengths do not enter the task loss; above 0. None leaves them as they are, as the paper does.
        **kwargs: ``reducer`` (for the boundary term, one loss for each sample whose class has a boundary; default
            ``MeanReducer``), ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``. With
            ``collect_stats`` all terms are recorded under their names, ``bounded_fraction``, the share of the batch
            that has a boundary, and ``outside_fraction``, the share of those that lies outside it.
    Shape:
        - embeddings ``(N, D_new)``, carries the gradient; labels ``(N,)`` of the new training set
        - output: scalar of ``embeddings.dtype``; ``terms["task_loss"]``, ``["align_loss"]`` and ``["boundary_loss"]``
          after the call
    Raises:
        ValueError: a weight < 0; unequal widths without a transformation, or transformations that do not fit them;
            labels of ``centers`` past the task loss's classes; no boundaries; no class weights to align; embeddings
            empty, NaN, infinite or on another device; labels missing, negative or past the task loss's classes.
    Warns:
        UserWarning: classes without a centre (no alignment, no boundary) or of one sample (no boundary); they are in
            ``classes_without_center`` and ``classes_without_boundary``.
    Example:
        >>> from pytorch_metric_learning.losses import ArcFaceLoss
        >>> centers = ClassCenters.from_embeddings(torch.randn(40, 8), torch.arange(40) % 10)
        >>> loss_func = LCELoss(ArcFaceLoss(num_classes=10, embedding_size=8), centers)
        >>> loss = loss_func(torch.randn(4, 8), torch.tensor([0, 3, 7, 9]))
        >>> sorted(loss_func.terms)
        ['align_loss', 'boundary_loss', 'task_loss']

    Reference:
        Meng et al., "Learning Compatible Embeddings", ICCV 2021. Differs from the paper in: class weights start at
        length 0.1; classes without a centre or a boundary are left out of the terms that need it.
    """

    def __init__(
        self,
        loss: torch.nn.Module,
        centers: ClassCenters,
        align_weight: float = 100.0,
        boundary_weight: float = 1.0,
        boundary: Boundary = "angle",
        forward_transformation: Transformation | None = None,
        backward_transformation: Transformation | None = None,
        *,
        class_weight_length: float | None = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, **kwargs)
        check_centers(centers)
        self.align_weight = check_number(align_weight, "align_weight", minimum=0)
        self.boundary_weight = check_number(boundary_weight, "boundary_weight", minimum=0)
        self.boundary = check_boundary(boundary, centers, "centers", self.boundary_weight)
        if class_weight_length is not None:
            check_number(class_weight_length, "class_weight_length", minimum=0, exclusive=True)
        self.forward_transformation = forward_transformation
        self.backward_transformation = backward_transformation
        self.old_centers = copy.deepcopy(centers)
        self.register_buffer("old_bounded", with_boundary(centers))
        if self.num_classes is None:
            self._check_without_class_weights(centers)
        else:
            self._check_class_weights(centers)
            if class_weight_length is not None:
                rescale_class_weights_(loss, class_weight_length)
        self._report_left_out()
        self.add_to_recordable_attributes(list_of_names=["align_weight", "boundary_weight"], is_stat=False)
        self.add_to_recordable_attributes(list_of_names=["bounded_fraction", "outside_fraction"], is_stat=True)

    def _check_without_class_weights(self, centers: ClassCenters) -> None:
        if self.align_weight > 0:
            raise ValueError(
                f"loss must have class weights to align, {type(self.loss).__name__} has none; take a classification or "
                "proxy loss, or pass align_weight=0 to keep the boundary term alone"
            )
        _check_widths(self.forward_transformation, self.backward_transformation, centers.centers.shape[1], None)

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
        _check_widths(self.forward_transformation, self.backward_transformation, old_width, new_width)
        if self.forward_transformation is None and self.backward_transformation is None and weights.stride(0) == 1:
            # A copy that lies in memory as the weights do, (D, C), for the alignment that goes through both whole; the
            # boundary term picks rows, which would miss the cache there the more, the more classes there are.
            self.register_buffer("old_columns", None, persistent=False)
            self.register_load_state_dict_post_hook(_copy_columns)
            _copy_columns(self)
        self._aligns_all = centers.labels.equal(torch.arange(len(weights), device=centers.labels.device))

    def _report_left_out(self) -> None:
        """Say once, loudly, which classes a term does without."""
        labels = self.old_centers.labels
        self.classes_without_boundary = labels[~self.old_bounded].tolist()
        every = range(self.num_classes or 0)
        self.classes_without_center = sorted(set(every) - set(labels.tolist()))
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

    def compute_terms(self, embeddings: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """Return the alignment, one number, and the boundary term, one loss a sample that has a boundary."""
        centers = self.old_centers.centers
        check_same_device(embeddings, "embeddings", centers, "the loss")
        _check_widths(self.forward_transformation, self.backward_transformation, centers.shape[1], embeddings.shape[1])
        with torch.autocast(embeddings.device.type, enabled=False):
            centers = centers.to(embeddings.dtype)
            forward = self.forward_transformation
            mapped = centers if forward is None else forward(centers)
            terms = {"align_loss": self.zero_loss(), "boundary_loss": self.zero_loss()}
            if self.align_weight > 0:
                terms["align_loss"] = reduced(self.align_weight * self._alignment(centers, mapped))
            if self.boundary_weight > 0:
                terms["boundary_loss"] = self._boundary(embeddings, labels, centers, mapped)
        return terms

    def _alignment(self, centers: torch.Tensor, mapped: torch.Tensor) -> torch.Tensor:
        weights = class_weights(self.loss).to(centers.dtype)
        if not self._aligns_all:
            weights = weights[self.old_centers.labels]
        if self.forward_transformation is None and self.backward_transformation is None:
            columns = getattr(self, "old_columns", None)
            return direction_error(weights, centers if columns is None else columns.t().to(centers.dtype))
        directions = normalize(weights, dim=1)
        errors = []
        if self.forward_transformation is not None:
            errors.append(mse_loss(directions, mapped))
        if self.backward_transformation is not None:
            errors.append(mse_loss(self.backward_transformation(directions), centers))
        return torch.stack(errors).mean()

    def _boundary(
        self, embeddings: torch.Tensor, labels: torch.Tensor, centers: torch.Tensor, mapped: torch.Tensor
    ) -> dict[str, Any]:
        rows = self.old_centers.index_of(labels)
        index = ((rows >= 0) & self.old_bounded[rows]).nonzero()[:, 0]
        if self.collect_stats:
            self.bounded_fraction, self.outside_fraction = len(index) / len(rows), 0.0
        if len(index) == 0:
            return self.zero_loss()
        rows = rows[index]
        directions = normalize(embeddings[index], dim=1)
        if self.backward_transformation is not None:
            own, directions = centers[rows], normalize(self.backward_transformation(directions), dim=1)
        else:
            own = normalize(mapped[rows], dim=1)
        boundaries = self.old_centers.boundaries
        assert boundaries is not None  # seen to at construction
        cosines = (directions * own).sum(1)
        outside = outside_boundary(cosines, boundaries[rows].to(cosines.dtype), self.boundary)
        if self.collect_stats:
            self.outside_fraction = (outside > 0).float().mean().item()
        return per_sample(outside * self.boundary_weight, c_f.to_device(index, embeddings))


def _copy_columns(loss: LCELoss, _: Any = None) -> None:
    loss.old_columns = loss.old_centers.centers.t().contiguous()


def check_boundary(boundary: Boundary, centers: ClassCenters, name: str, weight: float) -> Boundary:
    """Return ``boundary``; raise a ValueError where it is unknown, or has a weight and ``centers`` no boundaries."""
    if boundary not in ("angle", "cosine"):
        raise ValueError(f"boundary must be 'angle' or 'cosine', got {boundary!r}")
    if weight > 0 and centers.boundaries is None:
        raise ValueError(
            f"{name} must have boundaries, got none; measure them with boundary='max' or 'iqr', "
            "or pass boundary_weight=0"
        )
    return boundary


def with_boundary(centers: ClassCenters) -> torch.Tensor:
    """Return which classes have a boundary that says something, ``(C,)`` bool: not those of one sample."""
    return torch.ones_like(centers.labels, dtype=torch.bool) if centers.counts is None else centers.counts > 1


def outside_boundary(cosines: torch.Tensor, boundaries: torch.Tensor, kind: Boundary) -> torch.Tensor:
    """Return by how much each sample lies outside: ``(N,)`` angles in radians, or differences of cosines, 0 inside.

    Args:
        cosines: ``(N,)``, of each sample with the centre of its class.
        boundaries: ``(N,)``, the angle in radians of its class's boundary.
        kind: ``"angle"`` or ``"cosine"``.
    """
    if kind == "angle":
        return relu(cosines.clamp(-_NEAR_ONE, _NEAR_ONE).arccos() - boundaries)
    return relu(boundaries.cos() - cosines)


def _check_widths(
    forward: Transformation | None, backward: Transformation | None, old_width: int, new_width: int | None
) -> None:
    """``new_width`` None: the task loss does not say how wide its embeddings are."""
    for transformation, name, widths in (
        (forward, "forward_transformation", (old_width, new_width)),
        (backward, "backward_transformation", (new_width, old_width)),
    ):
        if transformation is None:
            continue
        if not isinstance(transformation, Transformation):
            raise ValueError(
                f"{name} must be one of pml_compat.transformations (or a subclass of its Transformation), "
                f"got {type(transformation).__name__}"
            )
        if transformation.side_features is not None:
            raise ValueError(f"{name} must take no side-information, a class centre has none")
        got = transformation.in_features, transformation.out_features
        if any(want not in (None, have) for want, have in zip(widths, got, strict=True)):
            raise ValueError(f"{name} must map width {widths[0]} to {widths[1]}, got {got[0]} to {got[1]}")
    if forward is None and backward is None and new_width not in (None, old_width):
        raise ValueError(
            f"centers must be {new_width} wide like the new embeddings, got width {old_width}; pass "
            f"backward_transformation=LinearTransformation({new_width}, {old_width}), which maps new queries into the "
            f"old space, or forward_transformation=LinearTransformation({old_width}, {new_width}), which maps the "
            "stored gallery into the new one (or another of pml_compat.transformations)"
        )
