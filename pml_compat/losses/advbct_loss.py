"""Adversarial backward-compatible training: a discriminator between old and new, and elastic class boundaries."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.nn.functional import cross_entropy, relu

from .._checks import (
    as_tensor,
    check_embeddings,
    check_integer,
    check_labels,
    check_number,
    check_same_device,
    count_rows,
    rows_where,
)
from .._host import indices_tuple_not_supported
from .._rows import no_autocast, precise_dtype, unit_rows
from ..frozen.class_means import class_means
from ..frozen.label_map import LabelMap
from ..frozen.old_references import check_row_labels
from ._base import NamedTermsLoss
from ._reduction import MeanOfPositive, per_sample, reduced
from .old_rows import check_old_rows


class AdvBCTLoss(NamedTermsLoss):
    r"""Hide from a discriminator which model an embedding is from, and keep it near its class's old centre.

    .. math:: L &= \lambda_a (1 - p) \operatorname{mean}_i \big[\ell_D(R_\alpha(f_{n,i}), \text{new})
        + \ell_D(f_{o,i}, \text{old})\big] + \lambda_b \operatorname{mean}_{i: > 0}
        \max(0, \lVert \hat f_{n,i} - c_{y_i} \rVert - r'_{y_i}) \\
        r'_y &= r_y + (T - r_y) \, \sigma(v_y), \quad \alpha = \frac{2}{1 + e^{-10 p}} - 1

    :math:`D`, linear - batch norm - ReLU - linear, learns to tell new from old embeddings by cross-entropy;
    :math:`R_\alpha` turns its gradient round for the new model. :math:`c_y` is the mean of the class's unit old
    embeddings, :math:`r_y` the largest distance to it within 1.5 IQR, and the learned :math:`v_y` moves the boundary
    from there towards T. Samples of classes without a radius take no part in the second term.

    It is a term: add the task loss with :class:`CompatibleLoss`. Call :meth:`set_progress` as training goes on: at
    p = 0, where it starts, the new model does not feel the discriminator.

    Args:
        centers: the pair ``(embeddings, labels)`` of the old embeddings of the new training set, or, with ``radii``,
            the ``(C, D)`` mean of each class's unit old embeddings.
        radii: ``(C,)`` distance from it that new embeddings may have; 0 or more; None with a pair.
        labels: ``(C,)`` the label, of the new training set, of each row; by default row i is label i.
        adversarial_weight: the multiplier :math:`\lambda_a`, 0 or more.
        boundary_weight: the multiplier :math:`\lambda_b`, 0 or more.
        threshold: T, 0 or more; distances are at most 2. The public code has 1.
        hidden_features: width of D's hidden layer.
        normalize: show D unit rows. False, as in the paper, shows it embeddings as both models give them.
        **kwargs: ``reducer`` (one loss a row; default: the mean over the samples outside), ``embedding_regularizer``,
            ``embedding_reg_weight``, ``collect_stats``, which also records ``discriminator_accuracy`` (0.5: the models
            cannot be told apart), ``mean_radius_change`` (near 0 the boundaries are at r, near ``mean |T - r|`` at T),
            ``bounded_fraction`` of the batch and ``outside_fraction`` of those.
    Shape:
        - embeddings ``(N, D_new)``, carries the gradient, fitted to the old width (:func:`pml_compat.fit_width`);
          labels ``(N,)`` of the new training set
        - ref_emb ``(N, D)``: the old embeddings of the same rows, as the old model gives them; receives no gradient
        - output: scalar, float32 or better; ``terms``: ``adversarial_loss``, ``boundary_loss``
    Raises:
        ValueError: centres longer than 1, labels that repeat, a radius or weight < 0; ``ref_emb`` missing, or rows of
            another width than the centres; embeddings empty, NaN, infinite or on another device; labels missing;
            ``ref_labels`` of other rows; an ``indices_tuple``.
    Example:
        >>> old, labels = torch.randn(40, 8), torch.arange(40) % 10
        >>> loss_func = AdvBCTLoss.from_embeddings(old, labels)
        >>> loss_func.set_progress(0.25)  # at the start of epoch 11 of 40
        >>> loss = loss_func(torch.randn(4, 8), labels[:4], ref_emb=old[:4])

    Reference:
        Pan et al., "Boundary-Aware Backward-Compatible Representation via Adversarial Learning", CVPR 2023. With
        p = (e - 1) / E in epoch e of E, 1 - p is the paper's (E - e + 1) / E. Differs from the paper in: the
        adversarial term counts a tenth, as :class:`CompatibleLoss` makes the sum as strong as the task loss, and so
        strong a reversed gradient undoes what is learned; D sees unit rows, as lengths alone tell the models apart;
        boundaries move inwards; new and old rows go through D's batch norm together, as each apart would hide a shift
        between them.
    """

    old_centers: torch.Tensor
    old_radii: torch.Tensor
    progress: torch.Tensor

    def __init__(
        self,
        centers: Any,
        radii: Any = None,
        labels: Any = None,
        *,
        adversarial_weight: float = 0.1,
        boundary_weight: float = 1.0,
        threshold: float = 0.0,
        hidden_features: int = 100,
        normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.normalize = normalize
        if radii is None:
            centers, radii, labels = _measured_balls(centers, labels)
        centers, radii = _check_balls(centers, radii)
        labels = check_labels(
            torch.arange(len(centers)) if labels is None else torch.as_tensor(labels), length=len(centers)
        )
        self.old_label_map = LabelMap(labels.to(centers.device))
        self.register_buffer("old_centers", centers)
        self.register_buffer("old_radii", radii)
        self.register_buffer("progress", torch.zeros((), device=centers.device))
        self.adversarial_weight = check_number(adversarial_weight, "adversarial_weight", minimum=0)
        self.boundary_weight = check_number(boundary_weight, "boundary_weight", minimum=0)
        self.threshold = check_number(threshold, "threshold", minimum=0)
        hidden_features = check_integer(hidden_features, "hidden_features", minimum=1)
        self.discriminator = torch.nn.Sequential(
            torch.nn.Linear(centers.shape[1], hidden_features),
            torch.nn.BatchNorm1d(hidden_features, track_running_stats=False),
            torch.nn.ReLU(),
            torch.nn.Linear(hidden_features, 2),
        ).to(centers.device)
        self.elasticity = torch.nn.Parameter(torch.empty(len(centers), device=centers.device).uniform_(-1, 1))
        self.add_to_recordable_attributes(
            list_of_names=["adversarial_weight", "boundary_weight", "threshold"], is_stat=False
        )
        self.add_to_recordable_attributes(
            list_of_names=["discriminator_accuracy", "mean_radius_change", "bounded_fraction", "outside_fraction"],
            is_stat=True,
        )

    @classmethod
    def from_embeddings(cls, old_embeddings: Any, labels: Any, **kwargs: Any) -> AdvBCTLoss:
        """Measure centres and radii of the old embeddings of the new training set; classes of one sample have none.

        Args:
            old_embeddings: ``(N, D)`` tensor, array, memory map or ``FrozenEmbeddings``; read in pieces, twice.
            labels: ``(N,)`` labels of the new training set.
            **kwargs: see the class.
        Raises:
            ValueError: empty, NaN or infinite, lengths that differ, no class of two samples.
        Warns:
            UserWarning: classes of one sample, which are left out of the boundary term.
        """
        return cls((old_embeddings, labels), **kwargs)

    def set_progress(self, progress: float) -> None:
        """Say how much of the training is done: 0 at its start, 1 at its end; it is saved with the loss's state.

        Raises:
            ValueError: ``progress`` outside [0, 1].
        """
        if check_number(progress, "progress", minimum=0) > 1:
            raise ValueError(f"progress must be in [0, 1], the share of the training that is done, got {progress!r}")
        self.progress.fill_(float(progress))

    def get_default_reducer(self) -> torch.nn.Module:
        """The mean over the losses above 0: for the boundary term, over the samples outside."""
        return MeanOfPositive()

    def _sub_loss_names(self) -> list[str]:
        return ["adversarial_loss", "boundary_loss"]

    @property
    def needs_ref_emb(self) -> bool:
        """Always."""
        return True

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Check that both rows are of the same item, and count those whose class has a boundary."""
        check_row_labels(check_labels(labels), ref_labels)
        if self.boundary_weight > 0:
            count_rows(self, self.old_label_map(labels) >= 0)

    def compute_loss(
        self, embeddings: torch.Tensor, labels: Any, indices_tuple: Any, ref_emb: torch.Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        """Return both terms, one loss a row."""
        indices_tuple_not_supported(indices_tuple)
        new, old = check_old_rows(embeddings, ref_emb)
        check_same_device(embeddings, "embeddings", self.old_centers, "the loss")
        if old.shape[1] != self.old_centers.shape[1]:
            raise ValueError(
                f"ref_emb must be {self.old_centers.shape[1]} wide, like the old centres, got width {old.shape[1]}; "
                "measure the centres on embeddings of the same old model"
            )
        labels = check_labels(labels, length=len(embeddings))
        terms = self.zero_losses()
        with no_autocast(embeddings):
            unit = unit_rows(new, embeddings.dtype)
            if self.adversarial_weight > 0:
                old = old.to(new.dtype)
                shown = (unit, unit_rows(old, embeddings.dtype)) if self.normalize else (new, old)
                terms["adversarial_loss"] = self._adversarial(*shown)
            if self.boundary_weight > 0:
                terms["boundary_loss"] = self._boundary(unit, labels)
        return terms

    def _adversarial(self, new: torch.Tensor, old: torch.Tensor) -> dict[str, Any]:
        progress = self.progress.to(new.dtype)
        reversal = torch.tanh(5 * progress)  # the formula's alpha
        rows = torch.cat([reverse_gradient(new, reversal), old])
        weights = {name: value.to(new.dtype) for name, value in self.discriminator.named_parameters()}
        logits = torch.func.functional_call(self.discriminator, weights, rows)
        is_old = torch.arange(len(rows), device=rows.device) >= len(new)
        if self.collect_stats:
            self.discriminator_accuracy = (logits.argmax(1) == is_old).float().mean().item()
        losses = cross_entropy(logits, is_old.long(), reduction="none").view(2, -1).sum(0)
        losses = losses * (1 - progress) * self.adversarial_weight
        return per_sample(losses)

    def _boundary(self, directions: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        rows = self.old_label_map(labels)
        index = rows_where(self, rows >= 0)
        if self.collect_stats:
            with torch.no_grad():
                change = (self.threshold - self.old_radii) * torch.sigmoid(self.elasticity)
            self.mean_radius_change = change.abs().mean().item()
            self.bounded_fraction, self.outside_fraction = len(index) / len(rows), 0.0
        if len(index) == 0:  # 0 with a gradient of 0: DDP waits for that of every parameter
            return reduced(0 * self.elasticity.sum())
        rows, directions = rows[index], directions[index]
        centers, radii = (tensor[rows].to(directions.dtype) for tensor in (self.old_centers, self.old_radii))
        radii = radii + (self.threshold - radii) * torch.sigmoid(self.elasticity[rows].to(directions.dtype))
        outside = relu(torch.linalg.vector_norm(directions - centers, dim=1) - radii)
        if self.collect_stats:
            self.outside_fraction = (outside > 0).float().mean().item()
        return per_sample(outside * self.boundary_weight, index)


def reverse_gradient(values: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
    """Return ``values``; their gradient is multiplied by minus ``coefficient``, a 0-dimensional tensor."""
    return _ReverseGradient.apply(values, coefficient)


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(coefficient)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (coefficient,) = ctx.saved_tensors
        return -coefficient * gradient, None


def _measured_balls(given: Any, labels: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return means, radii and labels of the classes of several samples, of a pair (old embeddings, labels)."""
    if not isinstance(given, tuple | list) or len(given) != 2 or labels is not None:
        raise ValueError(
            f"radii must be given with centers and labels, or centers be the pair (embeddings, labels) alone; got no "
            f"radii and {type(given).__name__} (other forms know no distances to the mean)"
        )
    classes = class_means(*given)
    several = classes.counts > 1
    found = int(several.sum())
    if found == 0:
        raise ValueError("old_embeddings must have a class of two samples or more, for its radius; got none")
    if found < len(several):
        single = len(several) - found
        warnings.warn(
            f"AdvBCTLoss leaves {single} of {len(several)} classes, those of one sample, out of the boundary term",
            stacklevel=4,
        )
    return classes.means[several], classes.radii()[several], classes.labels[several]


def _check_balls(centers: Any, radii: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return copies of centres and radii in the same dtype, float32 or better."""
    centers = check_embeddings(centers, "centers").detach()
    centers = centers.to(precise_dtype(centers.dtype), copy=True)
    longest = float(torch.linalg.vector_norm(centers, dim=1).max())
    if longest > 1 + 1e-3:
        raise ValueError(
            f"centers must be means of unit rows, at most 1 long, got a length of {longest:.4g}; "
            "AdvBCTLoss.from_embeddings(old_embeddings, labels) measures them"
        )
    radii = as_tensor(radii, "radii").detach().to(centers, copy=True)
    if radii.shape != (len(centers),) or not bool(torch.isfinite(radii).all() & (radii >= 0).all()):
        raise ValueError(
            f"radii must be one finite distance of 0 or more a class, ({len(centers)},), got shape "
            f"{tuple(radii.shape)} and values in [{float(radii.min()):.4g}, {float(radii.max()):.4g}]"
        )
    return centers, radii
