"""The old classifier, held still: what BCT judges new embeddings by."""

from __future__ import annotations

from typing import Any, Literal

import torch

from .._checks import check_embeddings, check_finite, check_labels, check_number, check_same_device
from .._rows import at_least_float32, cosines_with, no_autocast, precise_dtype
from .check_centers import check_centers
from .class_centers import ClassCenters
from .class_weights import unwrap_loss
from .heads import Head, SoftmaxHead, head_of
from .label_map import LabelMap

DEFAULT_SCALE = 16.0


class FrozenClassifier(torch.nn.Module):
    r"""An old classifier with frozen weights and an explicit map from labels to its rows.

    ``"linear"``: logits :math:`W f + b` on the embeddings as they are. ``"cosine"``: logits
    :math:`s \cos(f, w_j)`. From a PML loss: that loss, with its own margin and scale.

    Args:
        weight: ``(C, D)``, one row a class; rows of length 0 are refused where the kind is ``"cosine"``.
        bias: ``(C,)``, for ``kind="linear"`` alone.
        labels: ``(C,)``, the label *in the new training set* of each row; by default row i is label i. Labels that
            are not listed are unknown to the old system.
        kind: ``"linear"`` or ``"cosine"``.
        scale: ``s``, above 0, for ``kind="cosine"`` alone; 16 by default.
    Attributes:
        directions: ``(C, D)`` unit rows, where queries of each class should stand; of the rows, unless centres of
            stored old embeddings say more (:meth:`from_centers`, :meth:`extend`).
    Shape:
        - ``logits``: ``(N, D) -> (N, C)``
        - ``losses``: ``(N, D), (N,) -> (N,), (N,)``
    Raises:
        ValueError: NaN or infinite weights, sizes that disagree, labels that repeat or are negative, a scale or a
            bias where the kind has none.
    Example:
        >>> old = FrozenClassifier(torch.eye(2), labels=torch.tensor([4, 9]), kind="cosine", scale=1.0)
        >>> losses, known = old.losses(torch.eye(2)[[0, 0]], torch.tensor([4, 5]))
        >>> losses, known
        (tensor([0.3133, 0.0000]), tensor([ True, False]))

    Reference:
        Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020. The paper keeps
        the classifier of the old training; the kinds, the label map and :meth:`extend` are ours.
    """

    rows: torch.Tensor
    bias: torch.Tensor | None
    directions: torch.Tensor

    def __init__(
        self,
        weight: Any,
        bias: Any = None,
        *,
        labels: Any = None,
        kind: Literal["linear", "cosine"] = "linear",
        scale: float | None = None,
    ) -> None:
        if kind == "linear":
            if scale is not None:
                raise ValueError(f"scale must be None with kind='linear', got {scale!r}; scale the weight instead")
            head = SoftmaxHead(unit_embeddings=False, unit_rows=False)
        elif kind == "cosine":
            if bias is not None:
                raise ValueError("bias must be None with kind='cosine', got one; cosine logits have no bias")
            head = SoftmaxHead(
                check_number(DEFAULT_SCALE if scale is None else scale, "scale", minimum=0, exclusive=True)
            )
        else:
            raise ValueError(f"kind must be 'linear' or 'cosine', got {kind!r}")
        super().__init__()
        self._freeze(head, weight, bias, labels)

    def _freeze(self, head: Head, weight: Any, bias: Any, labels: Any) -> None:
        weight = check_embeddings(weight, "weight").detach()
        weight = at_least_float32(weight)
        num_classes, remainder = divmod(len(weight), head.centers_per_class)
        if remainder:
            raise ValueError(f"weight must have {head.centers_per_class} rows a class, got {len(weight)} rows")
        if bias is not None:
            bias = torch.as_tensor(bias).detach().to(weight)
            if bias.shape != (len(weight),):
                raise ValueError(f"bias must have one entry a class, ({len(weight)},), got {tuple(bias.shape)}")
            check_finite(bias, "bias")
        if labels is None:
            labels = torch.arange(num_classes)
        labels = check_labels(torch.as_tensor(labels), length=num_classes)
        rows = head.prepare(weight)
        if rows is not weight and not bool((weight.norm(dim=1) > 0).all()):
            raise ValueError("weight must have no row of length 0, a cosine needs a direction")
        self.head = head
        self.register_buffer("rows", rows.contiguous().clone())
        self.register_buffer("bias", bias if bias is None else bias.clone())
        self.register_buffer("directions", class_directions_of(weight, head.centers_per_class))
        self.label_map = LabelMap(labels.to(weight.device))

    @classmethod
    def _with_head(cls, head: Head, weight: Any, bias: Any, labels: Any) -> FrozenClassifier:
        classifier = cls.__new__(cls)
        torch.nn.Module.__init__(classifier)
        classifier._freeze(head, weight, bias, labels)
        return classifier

    @classmethod
    def from_loss(cls, loss: torch.nn.Module, labels: Any = None) -> FrozenClassifier:
        """Freeze a PML classification or proxy loss, with its own margin and scale; the loss is copied, not held.

        Proxy Anchor couples the samples of a batch; frozen, it judges each sample as a batch of one.

        Args:
            loss: as for :func:`class_weights`, with its default distance.
            labels: see the class.
        Raises:
            ValueError: no class weights, or another distance; the message says what to do instead.
        """
        head, rows, bias = head_of(unwrap_loss(loss))
        return cls._with_head(head, rows, bias, labels)

    @classmethod
    def from_layer(cls, layer: torch.nn.Linear, labels: Any = None) -> FrozenClassifier:
        """Freeze the last linear layer of the old network, which gave the logits that it was trained with."""
        if not isinstance(layer, torch.nn.Linear):
            raise ValueError(f"layer must be a torch.nn.Linear, got {type(layer).__name__}")
        return cls(layer.weight, layer.bias, labels=labels)

    @classmethod
    def from_centers(cls, centers: ClassCenters, scale: float | None = None) -> FrozenClassifier:
        """A pseudo-classifier: class centres as cosine rows, for an old model that has no classifier.

        Args:
            centers: of the old embeddings of the new training set; their labels become the rows' labels, and their
                directions those of the classifier.
            scale: of the cosines, above 0. None: the one that fits the old embeddings best (``ClassCenters.scale``),
                16 where the centres come without embeddings.
        """
        check_centers(centers)
        scale = centers.scale if scale is None else scale
        classifier = cls(centers.centers, labels=centers.labels, kind="cosine", scale=scale)
        classifier.directions = centers.directions.to(classifier.directions, copy=True)
        return classifier

    def extend(self, centers: ClassCenters) -> FrozenClassifier:
        """Add a pseudo row, in place, for every label of ``centers`` that this classifier lacks; return ``self``.

        The classes it knows keep their true rows. Where lengths matter (linear kinds) a pseudo row takes the mean
        length of the true rows, and the mean bias. ``directions`` become those of ``centers`` for all of their labels
        where ``centers`` were measured on embeddings, else for those that this classifier lacks.

        Raises:
            ValueError: ``centers`` of another width.
        """
        check_centers(centers, width=self.in_features)
        index = self.label_map(centers.labels).to(self.rows.device)
        new = index < 0
        if centers.is_measured:
            given = centers.directions.to(self.directions)[~new]
            self.directions = self.directions.index_copy(0, index[~new], given)
        if not bool(new.any()):
            return self
        rows = centers.centers[new.to(centers.centers.device)].to(self.rows)
        rows = rows * self.rows.norm(dim=1).mean()
        labels = torch.cat([self.labels, centers.labels.to(self.labels.device)[new.to(self.labels.device)]])
        self.directions = torch.cat([self.directions, centers.directions.to(self.directions)[new]])
        if self.bias is not None:
            self.bias = torch.cat([self.bias, self.bias.mean().expand(len(rows))])
        self.rows = torch.cat([self.rows, rows.repeat_interleave(self.head.centers_per_class, 0)])
        self.label_map = LabelMap(labels)
        return self

    @property
    def labels(self) -> torch.Tensor:
        """The ``(C,)`` label of each class."""
        return self.label_map.labels

    @property
    def in_features(self) -> int:
        """Width of the old embeddings."""
        return self.rows.shape[1]

    def index_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the ``(N,)`` class index of each label, -1 where it is unknown to the old system."""
        return self.label_map(labels)

    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the ``(N, C)`` logits, scaled and without a margin, in the dtype of ``embeddings``."""
        embeddings = self._check(embeddings)
        with no_autocast(embeddings):
            return self.head.logits(*self._operands(embeddings)).to(embeddings.dtype)

    forward = logits

    def losses(self, embeddings: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each sample's loss under the old classifier, and which labels it knows.

        The loss of the others is 0, without a gradient. The gradient goes to ``embeddings`` alone. float16 and
        bfloat16 are computed on in float32.

        Args:
            embeddings: ``(N, D)``, finite.
            labels: ``(N,)`` labels of the new training set.
        Shape:
            - output: ``(N,)`` losses in the dtype of ``embeddings``; ``(N,)`` bool
        Raises:
            ValueError: another width, device or length, NaN or infinity.
        """
        embeddings = self._check(embeddings)
        targets = self.label_map(check_labels(labels, length=len(embeddings)))
        known = targets >= 0
        losses = self.losses_at(embeddings, targets.clamp(min=0))
        return torch.where(known, losses, 0.0).to(embeddings.dtype), known

    def losses_at(self, embeddings: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return :meth:`losses` for classes given by their rows, ``(N,)`` of :meth:`index_of`, none -1; unchecked."""
        with no_autocast(embeddings):
            return self.head.losses(*self._operands(embeddings), targets)

    def direction_losses(self, embeddings: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Return how far samples are from the direction of their class, :math:`1 - \cos(f, t_y)`, and which are known.

        As :meth:`losses`, but O(N D) whatever the number of classes; a row of length 0 has loss 1 and no gradient.
        """
        embeddings = self._check(embeddings)
        targets = self.label_map(check_labels(labels, length=len(embeddings)))
        known = targets >= 0
        losses = self.direction_losses_at(embeddings, targets.clamp(min=0))
        return torch.where(known, losses, 0.0).to(embeddings.dtype), known

    def direction_losses_at(self, embeddings: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return :meth:`direction_losses` for classes given by their rows, as :meth:`losses_at` does."""
        with no_autocast(embeddings):
            precise = at_least_float32(embeddings)
            own = self.directions.to(precise.dtype).index_select(0, targets)
            return 1 - cosines_with(precise, own, embeddings.dtype)

    def _check(self, embeddings: torch.Tensor) -> torch.Tensor:
        embeddings = check_embeddings(embeddings, width=self.in_features)
        check_same_device(embeddings, "embeddings", self.rows, "the FrozenClassifier")
        return embeddings

    def _operands(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        dtype = precise_dtype(embeddings.dtype)
        return embeddings.to(dtype), self.rows, self.bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Load what was saved before there were directions, too."""
        if f"{prefix}rows" in state_dict:
            rows = class_directions_of(state_dict[f"{prefix}rows"], self.head.centers_per_class)
            state_dict.setdefault(f"{prefix}directions", rows)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Show the sizes and the head, as torch's own modules do."""
        return f"classes={len(self.label_map)}, in_features={self.in_features}, head={self.head}"


def class_directions_of(rows: torch.Tensor, centers_per_class: int) -> torch.Tensor:
    """Return one direction a class, ``(C, D)``: of several centres the mean; a row of length 0 has none."""
    directions = torch.nn.functional.normalize(rows, dim=1)
    if centers_per_class == 1:
        return directions
    return torch.nn.functional.normalize(directions.unflatten(0, (-1, centers_per_class)).mean(1), dim=1)
