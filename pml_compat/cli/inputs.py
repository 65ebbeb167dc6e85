"""The inputs of an evaluation: files read, lined up, and handed on as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._checks import check_finite
from ..accuracy import CrossModelAccuracyCalculator, ServedIndex
from ..serving import QueryBlend
from ..transformations import load_transformation
from ..verification.thresholds import check_rates
from .stored import Columns, StoredEmbeddings, read_array, read_column, read_stored


@dataclass(frozen=True)
class Inputs:
    """The files and settings of one evaluation, as the command's options name them."""

    queries: Path
    gallery: Path
    old_queries: Path | None = None
    new_gallery: Path | None = None
    transformed_gallery: Path | None = None
    transformation: Path | None = None
    side_info: Path | None = None
    query_labels: Path | None = None
    gallery_labels: Path | None = None
    same_items: bool = False
    normalize: bool = True
    fars: Sequence[float] = ()
    k: int | None = None
    seed: int = 0
    device: str | None = None
    fit_width: bool = False
    margin: float = 0.01
    blend: Path | None = None
    depths: Sequence[int] = (10, 50)
    retire_old_model: bool = False
    groups: Path | None = None
    index: str | None = None
    nprobe: int | None = None
    columns: Columns = field(default_factory=Columns)

    def files(self) -> dict[str, str]:
        """Return the files that were given, for the report."""
        names = ("queries", "gallery", "old_queries", "new_gallery", "transformed_gallery", "transformation", "blend")
        return {name: str(getattr(self, name)) for name in names if getattr(self, name) is not None}


def load(inputs: Inputs) -> dict[str, Any]:
    """Read the files and line their rows up; return the arguments of :func:`pml_compat.upgrade.evaluate`."""
    if inputs.side_info is not None and inputs.transformation is None:
        raise ValueError("--side-info must be left out without --transformation, which it is for")
    if inputs.retire_old_model and inputs.blend is not None:
        raise ValueError("--blend must be left out with --retire-old-model: the old model would have to run")
    if inputs.nprobe is not None and inputs.index is None:
        raise ValueError("--nprobe must be left out without --index, which it is for")
    if inputs.fars:
        check_rates(inputs.fars, "fars")
    queries = read_stored(inputs.queries, "--queries", inputs.query_labels, inputs.columns)
    gallery = read_stored(inputs.gallery, "--gallery", inputs.gallery_labels, inputs.columns)
    old_queries = _read_beside(inputs.old_queries, "--old-queries", queries, inputs.query_labels, inputs)
    new_gallery = _read_beside(inputs.new_gallery, "--new-gallery", gallery, inputs.gallery_labels, inputs)
    transformed = _read_beside(
        inputs.transformed_gallery, "--transformed-gallery", gallery, inputs.gallery_labels, inputs
    )
    if old_queries is not None:
        _check_width(old_queries, gallery)
    for other in (new_gallery, transformed):
        if other is not None:
            _check_width(other, queries)
    arrays = {
        "queries": queries.embeddings,
        "gallery": gallery.embeddings,
        "query_labels": queries.require_labels("--query-labels"),
        "gallery_labels": gallery.require_labels("--gallery-labels"),
        "old_queries": None if old_queries is None else old_queries.embeddings,
        "new_gallery": None if new_gallery is None else new_gallery.embeddings,
        "transformed_gallery": None if transformed is None else transformed.embeddings,
        "query_ids": queries.ids,
        "gallery_ids": gallery.ids,
        "query_cameras": queries.cameras if gallery.cameras is not None else None,
        "gallery_cameras": gallery.cameras if queries.cameras is not None else None,
        "same_items": inputs.same_items,
        "fars": inputs.fars,
        "normalize": inputs.normalize,
        "fit_width": inputs.fit_width,
        "k": inputs.k,
        "margin": inputs.margin,
        "blend": False if inputs.retire_old_model else None if inputs.blend is None else _blend(inputs.blend),
        "depths": () if inputs.retire_old_model else inputs.depths,
        "groups": None if inputs.groups is None else read_column(inputs.groups, "--groups"),
        "knn_func": None if inputs.index is None else ServedIndex(inputs.index, nprobe=inputs.nprobe),
        "seed": inputs.seed,
        "device": _device(inputs.device),
    }
    if new_gallery is not None and len(new_gallery) < len(gallery):
        arrays["new_gallery_ids"] = new_gallery.ids
    if inputs.same_items:
        _check_same_items(queries, gallery)
        arrays["query_ids"] = None
    for stored in (queries, gallery, old_queries, new_gallery, transformed):
        if stored is not None:
            check_finite(stored.embeddings, f"embeddings of {stored.option}")
    if inputs.transformation is not None:
        arrays["transformed_gallery"] = _transform(gallery, queries, inputs)
    return arrays


def _device(name: str | None) -> torch.device:
    try:
        return torch.zeros(0, device=CrossModelAccuracyCalculator(device=name).device).device
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device must be one that torch has here, got {name!r}: {reason}") from error


def _blend(path: Path) -> QueryBlend:
    try:
        return QueryBlend.load(path)
    except ValueError as error:
        raise ValueError(f"--blend: {error}") from error


def _read_beside(
    path: Path | None, option: str, other: StoredEmbeddings, labels: Path | None, inputs: Inputs
) -> StoredEmbeddings | None:
    if path is None:
        return None
    stored = read_stored(path, option, columns=inputs.columns)
    # Labels that were given count, and not others that the file has.
    return (stored if labels is None else replace(stored, labels=None)).in_order_of(other)


def _check_width(stored: StoredEmbeddings, other: StoredEmbeddings) -> None:
    if stored.width != other.width:
        raise ValueError(
            f"{stored.option} must be as wide as {other.option}, which it is compared with: expected {other.width}, "
            f"got {stored.width}"
        )


def _check_same_items(queries: StoredEmbeddings, gallery: StoredEmbeddings) -> None:
    n_queries, n_gallery = len(queries), len(gallery)
    assert queries.labels is not None and gallery.labels is not None
    same = n_gallery >= n_queries and np.array_equal(queries.labels, gallery.labels[:n_queries])
    if same and queries.ids is not None and gallery.ids is not None:
        same = np.array_equal(queries.ids, gallery.ids[:n_queries])
    if not same:
        raise ValueError(
            "--same-items must be left out where row i of --gallery is not the item of row i of --queries: their "
            f"labels or ids differ ({n_queries} queries, {n_gallery} gallery items)"
        )


def _transform(gallery: StoredEmbeddings, queries: StoredEmbeddings, inputs: Inputs) -> torch.Tensor:
    assert inputs.transformation is not None
    if not inputs.transformation.exists():
        raise FileNotFoundError(f"--transformation: there is no {str(inputs.transformation)!r}")
    transformation = load_transformation(inputs.transformation)
    if (transformation.in_features, transformation.out_features) != (gallery.width, queries.width):
        raise ValueError(
            f"--transformation must map the gallery's width to the queries', {gallery.width} to {queries.width}, got "
            f"{transformation.in_features} to {transformation.out_features}"
        )
    side_info = gallery.side_info if transformation.side_features is not None else None
    if inputs.side_info is not None:
        side_info = read_array(inputs.side_info, "--side-info")
    if (side_info is None) != (transformation.side_features is None):
        rule = "left out for" if transformation.side_features is None else "given with"
        raise ValueError(
            f"--side-info must be {rule} this --transformation, which takes "
            f"{transformation.side_features or 'no'} side features"
        )
    source = gallery.embeddings.float() if gallery.embeddings.dtype == torch.float16 else gallery.embeddings
    return torch.from_numpy(transformation.apply_to(source, side_info, normalize=inputs.normalize))
