"""The inputs of an evaluation: read, lined up, checked against each other, and made ready to be ranked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..accuracy import CrossModelAccuracyCalculator
from ..checks import check_finite
from ..transformations import load_transformation
from ..verification.thresholds import check_rates
from .stored import StoredEmbeddings, read_array, read_stored


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


@dataclass
class Embeddings:
    """What is ranked: aligned, of unit length unless asked otherwise, on one device.

    Args:
        queries: model (``new``, ``old``) to ``(Q, D)``.
        galleries: gallery (``old``, ``transformed_old``, ``new``) to ``(N, D)``.
        query_labels: ``(Q,)``.
        gallery_labels: ``(N,)``.
        codes: ids and cameras for ``get_accuracy``, as integers.
        data: what the report says about it.
        notes: what a reader should know, one sentence each.
    """

    queries: dict[str, torch.Tensor]
    galleries: dict[str, torch.Tensor]
    query_labels: torch.Tensor
    gallery_labels: torch.Tensor
    codes: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def load(inputs: Inputs) -> Embeddings:
    """Read the files, line their rows up, and make what is ranked."""
    if inputs.side_info is not None and inputs.transformation is None:
        raise ValueError("--side-info must be left out without --transformation, which it is for")
    if inputs.fars:
        check_rates(inputs.fars, "fars")
    queries = read_stored(inputs.queries, "--queries", inputs.query_labels)
    gallery = read_stored(inputs.gallery, "--gallery", inputs.gallery_labels)
    old_queries = _read_beside(inputs.old_queries, "--old-queries", queries)
    new_gallery = _read_beside(inputs.new_gallery, "--new-gallery", gallery)
    transformed = _read_beside(inputs.transformed_gallery, "--transformed-gallery", gallery)
    if old_queries is not None:
        _check_width(old_queries, gallery)
    for other in (new_gallery, transformed):
        if other is not None:
            _check_width(other, queries)
    query_labels = queries.require_labels("--query-labels")
    gallery_labels = gallery.require_labels("--gallery-labels")
    if not torch.isin(query_labels, gallery_labels).any():
        raise ValueError("--gallery must hold items with the labels of --queries, it has none of them")
    found = Embeddings({}, {}, query_labels, gallery_labels)
    given = {"new": queries, "old": old_queries}
    stored = {"old": gallery, "transformed_old": transformed, "new": new_gallery}
    _set_codes(found, queries, gallery, inputs)
    device = _device(inputs.device)
    found.queries = {n: _prepare(s, inputs, device) for n, s in given.items() if s is not None}
    found.galleries = {n: _prepare(s, inputs, device) for n, s in stored.items() if s is not None}
    if inputs.transformation is not None:
        mapped = _transform(gallery, queries, inputs)
        found.galleries["transformed_old"] = mapped.to(device)
        found.galleries = {name: found.galleries[name] for name in stored if name in found.galleries}
    if queries.width != gallery.width:
        rule = "the first coordinates of the queries" if queries.width > gallery.width else "zeros after the queries"
        found.notes.append(
            f"New queries are {queries.width} wide and the stored gallery {gallery.width}: new/old is measured with "
            f"{rule}. Where the new model comes with a map into the old space, give queries that went through it."
        )
    paths = {"queries": inputs.queries, "gallery": inputs.gallery, "old_queries": inputs.old_queries}
    paths |= {"new_gallery": inputs.new_gallery, "transformed_gallery": inputs.transformed_gallery}
    paths |= {"transformation": inputs.transformation}
    found.data |= {
        "queries": len(queries),
        "gallery": len(gallery),
        "classes": len(gallery_labels.unique()),
        "widths": {"queries": queries.width, "gallery": gallery.width},
        "files": {name: str(path) for name, path in paths.items() if path is not None},
        "normalized": inputs.normalize,
        "cameras": "query_cameras" in found.codes,
        "k": inputs.k,
        "seed": inputs.seed,
    }
    return found


def _device(name: str | None) -> torch.device:
    try:
        return torch.zeros(0, device=CrossModelAccuracyCalculator(device=name).device).device
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device must be one that torch has here, got {name!r}: {reason}") from error


def _read_beside(path: Path | None, option: str, other: StoredEmbeddings) -> StoredEmbeddings | None:
    return None if path is None else read_stored(path, option).in_order_of(other)


def _check_width(stored: StoredEmbeddings, other: StoredEmbeddings) -> None:
    if stored.width != other.width:
        raise ValueError(
            f"{stored.option} must be as wide as {other.option}, which it is compared with: expected {other.width}, "
            f"got {stored.width}"
        )


def _set_codes(found: Embeddings, queries: StoredEmbeddings, gallery: StoredEmbeddings, inputs: Inputs) -> None:
    """Say which gallery items are left out of a query's ranking: by position, by id, by camera."""
    how = None
    n_queries, n_gallery = len(queries), len(gallery)
    ids = None if queries.ids is None or gallery.ids is None else (queries.ids, gallery.ids)
    same_rows = n_gallery >= n_queries and torch.equal(found.query_labels, found.gallery_labels[:n_queries])
    if inputs.same_items:
        other_ids = ids is not None and not np.array_equal(ids[0], ids[1][:n_queries])
        if not same_rows or other_ids:
            raise ValueError(
                "--same-items must be left out where row i of --gallery is not the item of row i of --queries: their "
                f"labels or ids differ ({n_queries} queries, {n_gallery} gallery items)"
            )
        how = "position"
        found.codes |= {"query_ids": np.arange(n_queries), "reference_ids": np.arange(n_gallery)}
    elif ids is not None:
        how = "id"
        found.codes |= _numbered("ids", *ids)
    else:
        one = queries if queries.ids is not None else gallery if gallery.ids is not None else None
        if one is not None:
            found.notes.append(f"Only {one.option} has ids; they are not used, and no item is left out of a ranking.")
        elif same_rows:
            found.notes.append(
                "Queries and gallery have the same labels row by row. If they are the same items, every query found "
                "itself: give --same-items."
            )
    if queries.cameras is not None and gallery.cameras is not None:
        found.codes |= _numbered("cameras", queries.cameras, gallery.cameras)
    found.data["same_items"] = how


def _numbered(name: str, queries: Any, gallery: Any) -> dict[str, np.ndarray]:
    """Number the distinct values of queries and gallery once, and not again in every block."""
    if (queries.dtype.kind == "U") != (gallery.dtype.kind == "U"):
        raise ValueError(f"{name} must be all integers or all strings, got {queries.dtype} and {gallery.dtype}")
    sides = (queries, gallery) if queries.dtype.kind == "U" else (queries.astype(np.int64), gallery.astype(np.int64))
    numbers = np.unique(np.concatenate(sides), return_inverse=True)[1]
    return {f"query_{name}": numbers[: len(queries)], f"reference_{name}": numbers[len(queries) :]}


def _prepare(stored: StoredEmbeddings, inputs: Inputs, device: torch.device) -> torch.Tensor:
    """Return finite embeddings in float32 or float64, of unit length unless asked otherwise."""
    rows = stored.embeddings
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    check_finite(rows, f"embeddings of {stored.option}")
    return (torch.nn.functional.normalize(rows, dim=1) if inputs.normalize else rows).to(device)


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
