"""LCE between two finished models: a transformation learned from stored embeddings and their labels."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch.nn.functional import mse_loss

from .._checks import check_labels, check_matrix, check_number, check_same_device, count_rows, rows_where
from .._host import indices_tuple_not_supported
from .._rows import at_least_float32, no_autocast, unit_rows
from ..frozen import ClassCenters
from ..frozen.old_system import OldSystem, as_centers
from ..transformations import Transformation
from ._base import NamedTermsLoss
from ._reduction import per_sample, reduced
from .boundaries import BoundaryForm, check_boundary_form, outside_boundary, with_boundary


class LCETransformationLoss(NamedTermsLoss):
    r"""Train a transformation from one finished model's space into another's: class onto class.

    .. math:: L = \lambda_a \frac{1}{C d} \sum_j \lVert T(c^{source}_j) - c^{target}_j \rVert^2
        + \lambda_b \operatorname{mean}_i \max(0, \angle(T(f_i), c^{target}_{y_i}) - \theta^{target}_{y_i})

    Both networks are frozen and only their stored embeddings are needed; the two sets may be of different samples,
    as long as their classes overlap. The direction is the user's: old embeddings into the new space, to carry a
    gallery over, or new ones into the old space, to search the gallery as it is. Where the *same* samples are stored
    from both models, regression on the pairs uses more of what is known (``LinearTransformation.fit``).

    Args:
        transformation: the map that is trained, and that gave the embeddings. The loss refers to it and does not own
            it: optimise and save ``transformation`` itself, it is in neither ``parameters()`` nor ``state_dict()``.
        source_centers: class centres in the space that ``transformation`` maps from: ClassCenters, the pair
            ``(embeddings, labels)`` or a FrozenClassifier.
        target_centers: class centres and boundaries in the space that it maps into, likewise.
        align_weight: the multiplier ``lambda_a``, 0 or more.
        boundary_weight: the multiplier ``lambda_b``, 0 or more.
        boundary: in what the hinge compares, ``"angle"`` or ``"cosine"``, see :class:`LCELoss`.
        **kwargs: ``reducer`` (for the boundary term, one loss a sample that has a boundary), ``embedding_regularizer``,
            ``embedding_reg_weight``, ``collect_stats``.
    Shape:
        - embeddings ``(N, D_target)``: what ``transformation`` gives, carries the gradient; labels ``(N,)``
        - output: scalar, float32 or better; ``terms``: ``align_loss``, ``boundary_loss``
    Raises:
        ValueError: a weight < 0; widths that do not fit; no label in common; no boundaries; embeddings empty, NaN,
            infinite or on another device; labels missing.
    Warns:
        UserWarning: classes that one of the two lacks, or of one sample in the target; they take no part.
    Example:
        >>> from pml_compat.transformations import LinearTransformation
        >>> labels = torch.arange(40) % 10
        >>> old, new = torch.randn(40, 4), torch.randn(40, 6)
        >>> old_centers, new_centers = (ClassCenters.from_embeddings(e, labels) for e in (old, new))
        >>> transformation = LinearTransformation(4, 6)
        >>> loss_func = LCETransformationLoss(transformation, old_centers, new_centers)
        >>> loss_func(transformation(old), labels).backward()

    Reference:
        Meng et al., "Learning Compatible Embeddings", ICCV 2021, cross-model compatibility. Differs from the paper in:
        one map, into the other model's space, where the paper also maps both models into a third.
    """

    transformation: Transformation

    def __init__(
        self,
        transformation: Transformation,
        source_centers: OldSystem,
        target_centers: OldSystem,
        align_weight: float = 100.0,
        boundary_weight: float = 1.0,
        boundary: BoundaryForm = "angle",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(transformation, Transformation):
            raise ValueError(
                f"transformation must be one of pml_compat.transformations, got {type(transformation).__name__}"
            )
        if transformation.side_features is not None:
            raise ValueError("transformation must take no side-information, a class centre has none")
        source_centers = as_centers(source_centers, "source_centers", transformation.in_features)
        target_centers = as_centers(target_centers, "target_centers", transformation.out_features)
        # Past nn.Module's registration: it is the caller's, and would be optimised and saved twice.
        self.__dict__["transformation"] = transformation
        self.align_weight = check_number(align_weight, "align_weight", minimum=0)
        self.boundary_weight = check_number(boundary_weight, "boundary_weight", minimum=0)
        self.boundary = check_boundary_form(boundary, target_centers, "target_centers", self.boundary_weight)
        self.old_target_centers = copy.deepcopy(target_centers)
        self.register_buffer("old_bounded", with_boundary(target_centers))
        rows = source_centers.index_of(target_centers.labels)
        if not bool((rows >= 0).any()):
            raise ValueError("source_centers and target_centers must have labels in common, got none")
        common = (rows >= 0).nonzero()[:, 0]
        self.register_buffer("old_source_directions", source_centers.centers[rows[common]].clone())
        self.register_buffer("old_target_directions", target_centers.centers[common].clone())
        self._report_left_out(source_centers, target_centers, len(common))
        self.add_to_recordable_attributes(list_of_names=["align_weight", "boundary_weight"], is_stat=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Pass over the map in states from when the loss owned it: the map is loaded by itself."""
        for name in [name for name in state_dict if name.startswith(f"{prefix}transformation.")]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _report_left_out(self, source: ClassCenters, target: ClassCenters, common: int) -> None:
        single = int((~self.old_bounded).sum())
        said = [
            f"{count} {what}"
            for count, what in (
                (len(source) - common, "classes of the source that the target lacks"),
                (len(target) - common, "classes of the target that the source lacks, from the alignment"),
                (single, "classes of one sample in the target, from the boundary term"),
            )
            if count
        ]
        if said:
            warnings.warn(f"LCETransformationLoss leaves out {'; '.join(said)}", stacklevel=3)

    def _sub_loss_names(self) -> list[str]:
        return ["align_loss", "boundary_loss"]

    def compute_loss(
        self, embeddings: torch.Tensor, labels: torch.Tensor, indices_tuple: Any, ref_emb: Any, ref_labels: Any
    ) -> dict[str, Any]:
        """Return both terms; the boundary term has one loss a sample that has a boundary."""
        indices_tuple_not_supported(indices_tuple)
        if ref_emb is not None or ref_labels is not None:
            raise ValueError("ref_emb and ref_labels must be None: the loss compares with class centres")
        check_matrix(embeddings, width=self.transformation.out_features)
        labels = check_labels(labels, length=len(embeddings))
        check_same_device(embeddings, "embeddings", self.old_target_directions, "the loss")
        terms = {"align_loss": self.zero_loss(), "boundary_loss": self.zero_loss()}
        with no_autocast(embeddings):
            precise = at_least_float32(embeddings)
            if self.align_weight > 0:
                mapped = self.transformation(self.old_source_directions.to(precise.dtype))
                error = mse_loss(mapped, self.old_target_directions.to(precise.dtype))
                terms["align_loss"] = reduced(self.align_weight * error)
            rows = self.old_target_centers.index_of(labels)
            index = rows_where(self, self._bounded(rows)) if self.boundary_weight > 0 else rows[:0]
            if len(index):
                target, rows = self.old_target_centers, rows[index]
                assert target.boundaries is not None  # seen to at construction
                cosines = (unit_rows(precise[index], embeddings.dtype) * target.centers[rows]).sum(1)
                outside = outside_boundary(cosines, target.boundaries[rows].to(cosines.dtype), self.boundary)
                terms["boundary_loss"] = per_sample(outside * self.boundary_weight, index)
        return terms

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Count the samples whose class has a boundary."""
        if self.boundary_weight > 0:
            count_rows(self, self._bounded(self.old_target_centers.index_of(labels)))

    def _bounded(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows >= 0) & self.old_bounded[rows.clamp(min=0)]
