"""Class centres and boundaries of the old embeddings: what the old system knows of each class."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .._checks import check_embeddings, check_labels, check_matrix, check_same_device, check_square, stored_rows
from .._files import load_tensors, save_tensors
from .._rows import fit_width, precise_dtype, unit_rows_times
from . import measured_classes as measured
from .centers_summary import CentersSummary, nearest_centers
from .class_directions import Prospects, class_directions, fitting_scale
from .known_classes import check_known, half_way, nearest_direction
from .label_map import LabelMap

_FORMAT = "pml_compat.ClassCenters/1"


class ClassCenters(torch.nn.Module):
    r"""Centre, boundary and size of each class in the old embedding space.

    .. math:: c_y = \frac{m_y}{\lVert m_y \rVert},\quad m_y = \operatorname{mean}_{i: y_i = y} \frac{f_i}{\lVert f_i
        \rVert},\quad \theta_y = \max_{i: y_i = y} \angle(f_i, c_y)

    Run the old model, in eval mode and without augmentation, over the *new* training set: then classes that the old
    model never saw have a centre too.

    Made of embeddings (:meth:`from_embeddings`, :meth:`from_batches`), the centres also say where queries of each class
    should stand to find these embeddings, ``directions``. They are fitted when they are first asked for, to 32,768
    embeddings at most, in seconds.

    Args:
        centers: ``(C, D)``, any length but 0; kept as unit rows.
        labels: ``(C,)`` integers, 0 or more, no duplicates: the label of each row.
        boundaries: ``(C,)`` angles in radians, in [0, pi]; None where none were measured.
        counts: ``(C,)`` number of samples behind each row; None where it is not known.
        directions: ``(C, D)`` where queries of each class should stand; kept as unit rows. None: on the centres.
        whitening: ``(D, D)``, a negative power of the embeddings' second moments, see :attr:`whitening`.
        scale: of cosines with the centres, see :attr:`scale`.
    Raises:
        ValueError: shapes that disagree, NaN or infinity, a centre of length 0, labels that repeat.
    Example:
        >>> centers = ClassCenters.from_embeddings(torch.eye(2).repeat(2, 1), torch.tensor([7, 3, 7, 3]))
        >>> centers.labels, centers.index_of(torch.tensor([3, 7, 9]))
        (tensor([3, 7]), tensor([ 0,  1, -1]))

    Reference:
        Meng et al., "Learning Compatible Embeddings", ICCV 2021, Fig. 3 (centre, maximum angle);
        Pan et al., "Boundary-Aware Backward-Compatible Representation via Adversarial Learning", CVPR 2023
        (the 1.5 IQR rule).
    """

    centers: torch.Tensor
    boundaries: torch.Tensor | None
    counts: torch.Tensor | None
    fitted_directions: torch.Tensor | None
    fitted_whitening: torch.Tensor | None

    def __init__(
        self,
        centers: Any,
        labels: Any,
        boundaries: Any = None,
        counts: Any = None,
        *,
        directions: Any = None,
        whitening: Any = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        centers = check_embeddings(centers, "centers").detach()
        check_labels(labels, length=len(centers))
        self.label_map = LabelMap(labels)
        self.register_buffer("centers", measured.unit_centers(centers, self.labels).to(precise_dtype(centers.dtype)))
        if boundaries is not None:
            boundaries = measured.check_boundaries(boundaries, len(centers)).to(self.centers.dtype)
        if counts is not None:
            counts = measured.check_counts(counts, len(centers))
        self.register_buffer("boundaries", boundaries)
        self.register_buffer("counts", counts)
        if directions is not None:
            directions = check_embeddings(directions, "directions", self.centers.shape[1]).detach()
            if len(directions) != len(centers):
                raise ValueError(f"directions must be one a centre, {len(centers)}, got {len(directions)}")
            directions = measured.unit_centers(directions, self.labels).to(self.centers)
        self.register_buffer("fitted_directions", directions)
        if whitening is not None:
            whitening = check_square(whitening, "whitening", self.centers.shape[1]).to(self.centers)
        self.register_buffer("fitted_whitening", whitening)
        self._scale = None if scale is None else float(scale)
        self._sample: tuple[torch.Tensor, torch.Tensor] | None = None
        self._prospects: Prospects | None = None

    @property
    def is_measured(self) -> bool:
        """Whether ``directions`` come from embeddings, and are not just the centres."""
        return self.fitted_directions is not None or self._sample is not None

    @property
    def directions(self) -> torch.Tensor:
        """The ``(C, D)`` unit rows on which queries of each class should stand; else the centres."""
        self._measure()
        return self.centers if self.fitted_directions is None else self.fitted_directions

    @property
    def whitening(self) -> torch.Tensor | None:
        """The ``(D, D)`` matrix times which queries find more of these embeddings; None where they do not."""
        self._measure()
        return self.fitted_whitening

    def query_rows(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return unit rows to search the old gallery with, whitened where that finds more.

        Of ``(N, D_new)`` embeddings of a model trained to fit it, at the old width (:func:`pml_compat.fit_width`).
        """
        check_same_device(check_matrix(embeddings), "embeddings", self.centers, "the ClassCenters")
        return unit_rows_times(fit_width(embeddings, self.centers.shape[1]), self.whitening)

    def nearest_labels(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the ``(N,)`` label whose direction is most like each of ``(N, D)`` embeddings of the same model."""
        self._check_rows(embeddings, "embeddings")
        return self.labels[nearest_direction(embeddings, self.directions)]

    def known_class_rows(self, queries: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return unit rows half way from each query to its class's direction, to search the old gallery with.

        Only where every query is of one of these classes: others would find a wrong class.

        Args:
            queries: ``(N, D)`` at the old width: of a model trained to fit, as :meth:`query_rows` or a head's
                ``old_part`` gives them, the old model's own, or a blend.
            labels: ``(N,)``, what a model that knows the classes says of each query: the new model's classifier, or
                :meth:`nearest_labels` of the centres of its embeddings. None: the class whose direction is nearest.
        """
        self._check_rows(queries, "queries")
        if labels is None:
            return half_way(queries, self.directions, nearest_direction(queries, self.directions))
        check_same_device(check_labels(labels, length=len(queries)), "labels", self.centers, "the ClassCenters")
        return half_way(queries, self.directions, check_known(self.index_of(labels), labels))

    def _check_rows(self, rows: torch.Tensor, name: str) -> None:
        check_same_device(check_matrix(rows, name, self.centers.shape[1]), name, self.centers, "the ClassCenters")

    @property
    def scale(self) -> float | None:
        """The scale of cosines with the centres at which their softmax fits the embeddings best, on rows left out."""
        self._measure()
        return self._scale

    @property
    def prospects(self) -> Prospects | None:
        """What queries near these directions would find, known where the directions were fitted here."""
        self._measure()
        return self._prospects

    def remember(self, embeddings: Any, labels: torch.Tensor) -> ClassCenters:
        """Keep a sample of stored old embeddings, which the directions are then fitted to; return ``self``.

        Args:
            embeddings: ``(N, D)`` tensor, array, memory map or ``FrozenEmbeddings``.
            labels: ``(N,)``, each one with a centre.
        """
        index = measured.sampled(len(labels))
        rows = measured.unit_directions(stored_rows(embeddings, index, "embeddings")).float()
        self._sample = rows, self.index_of(labels[index.to(labels.device)])
        self.fitted_directions = self.fitted_whitening = self._scale = self._prospects = None
        return self

    def _measure(self) -> None:
        """Fit the directions, once, and let go of the embeddings."""
        if self._sample is None:
            return
        device = self.centers.device
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):  # wherever it is first asked for
            rows, classes = (tensor.to(device) for tensor in self._sample)
            centers = self.centers.float()
            found, flat, self._prospects = class_directions(rows, classes, centers)
            self.fitted_directions = measured.unit_centers(found, self.labels).to(self.centers)
            self.fitted_whitening = None if flat is None else flat.to(self.centers)
            self._scale = fitting_scale(rows, classes, len(centers))
        self._sample = None

    @property
    def labels(self) -> torch.Tensor:
        """The ``(C,)`` label of each row."""
        return self.label_map.labels

    def index_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the ``(N,)`` row of each label, -1 where no centre is known."""
        return self.label_map(labels)

    def __len__(self) -> int:
        return len(self.centers)

    def extra_repr(self) -> str:
        """Show the sizes, as torch's own modules do."""
        return f"classes={len(self)}, features={self.centers.shape[1]}, boundaries={self.boundaries is not None}"

    @classmethod
    def from_embeddings(
        cls, embeddings: Any, labels: Any, *, normalize: bool = True, boundary: measured.Boundary | None = "max"
    ) -> ClassCenters:
        """Measure the classes of old embeddings held as one tensor, array or memory map.

        Args:
            embeddings: ``(N, D)``, finite; read in pieces.
            labels: ``(N,)`` labels of the new training set.
            normalize: average unit-length embeddings (LCE) instead of the embeddings as they are.
            boundary: how it is measured (a loss's ``boundary`` says in what it is compared): ``"max"``, the largest
                angle between the centre and a sample of its class; ``"iqr"``, the same after dropping the angles above
                Q3 + 1.5 (Q3 - Q1), in classes of four samples and more; None, none.
        Raises:
            ValueError: empty, NaN or infinite, lengths that differ, unknown ``boundary``, a class whose mean is 0.
        """
        return cls.from_batches(measured.in_pieces(embeddings, labels), normalize=normalize, boundary=boundary)

    @classmethod
    def from_batches(
        cls,
        batches: Iterable[tuple[Any, Any]],
        *,
        normalize: bool = True,
        boundary: measured.Boundary | None = "max",
    ) -> ClassCenters:
        """Measure the classes of old embeddings that arrive in batches, in memory set by the classes.

        Memory is O(C D) for the centres; ``boundary="iqr"`` keeps one angle and one row number a sample besides.

        Args:
            batches: pairs of ``(n, D)`` embeddings and ``(n,)`` labels. With a ``boundary`` it is read twice and must
                give the same samples both times: a list, or a DataLoader without augmentation, not a generator.
            normalize: see :meth:`from_embeddings`.
            boundary: see :meth:`from_embeddings`.
        Raises:
            ValueError: as :meth:`from_embeddings`; a one-shot iterator with a ``boundary``; a second reading with
                other samples than the first.
        """
        measured.check_boundary_rule(boundary)
        if boundary is not None and isinstance(batches, Iterator):
            raise ValueError(
                "batches must be readable twice to measure boundaries, got a one-shot iterator; "
                "pass a list or a DataLoader, or boundary=None for centres alone"
            )
        sample = measured.Sample()
        sums, labels, counts, dtype = measured.sum_classes(batches, normalize, sample)
        centers = measured.unit_centers(sums, labels)
        boundaries = None
        if boundary is not None:
            boundaries = measured.measure_boundaries(batches, centers, LabelMap(labels), counts, boundary)
        found = cls(centers.to(dtype), labels, boundaries, counts)
        rows, sampled_labels = sample.finish()
        found._sample = rows, found.index_of(sampled_labels)
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Take directions that were fitted before a state was saved; keep those that are here where it has none."""
        found = {name: state_dict.get(f"{prefix}{name}") for name in ("fitted_directions", "fitted_whitening")}
        if found["fitted_directions"] is not None:
            self._sample = None
            for name, tensor in found.items():
                setattr(self, name, None if tensor is None else torch.empty_like(tensor, device=self.centers.device))
        else:
            own = {f"{prefix}{name}": getattr(self, name) for name in found}
            state_dict.update({name: tensor for name, tensor in own.items() if tensor is not None})
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def summary(self) -> CentersSummary:
        """Audit the centres: ``print(centers.summary())`` names the classes that a training cannot keep apart.

        A class is collapsed where the nearest other centre lies inside its boundary: the old model mixed the two up,
        and an embedding on the other's centre counts as inside. O(C^2 D) in blocks; nothing C x C is held. Where the
        embeddings were there to see, it also says what new queries can expect to find among them.
        """
        rows, angles = nearest_centers(self.centers)
        nearest = torch.where(rows < 0, -1, self.labels[rows])
        return CentersSummary(
            self.centers.shape[1], self.labels, self.counts, self.boundaries, nearest, angles, self.prospects
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write centres, labels, boundaries, counts, directions and whitening to a safetensors file, or nothing."""
        self._measure()
        tensors = {"centers": self.centers, "labels": self.labels}
        optional = {"boundaries": self.boundaries, "counts": self.counts, "directions": self.fitted_directions}
        optional["whitening"] = self.fitted_whitening
        tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        if self._scale is not None:
            tensors["scale"] = torch.tensor(self._scale, dtype=torch.float64)
        save_tensors(path, tensors, {"format": _FORMAT})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassCenters:
        """Read what :meth:`save` wrote, onto the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a truncated file, or one that holds something else.
        """
        tensors, _ = load_tensors(path, _FORMAT, "ClassCenters.save")
        scale = tensors.pop("scale", None)
        return cls(**tensors, scale=None if scale is None else float(scale))
