"""A fitted transformation for a server: as a program of ``torch.export``, or in a form that needs NumPy alone."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._checks import check_finite
from .._files import whole_file
from .numpy_form import NumpyTransformation
from .recording import record

if TYPE_CHECKING:
    from .base import Transformation

_BATCH = 8  # random rows, to trace a program with or to check it on


def export(transformation: Transformation, path: str | os.PathLike[str]) -> None:
    """Write the form that the suffix of ``path`` names: see :meth:`Transformation.export`."""
    forms = {".pt2": export_transformation, ".npz": save_numpy}
    suffix = Path(path).suffix
    if suffix not in forms:
        raise ValueError(f"path must end in {' or '.join(forms)}, got {os.fspath(path)!r}")
    forms[suffix](transformation, path)


@torch.no_grad()
def export_transformation(transformation: Transformation, path: str | os.PathLike[str]) -> None:
    """Write a ``.pt2`` file for a server without pml_compat: ``torch.export.load(path).module()(embeddings)``.

    The program takes ``(embeddings)`` or ``(embeddings, side_info)`` of any number of rows, in the dtype and on the
    device of the transformation's parameters: move it first. It is in eval mode, with batch normalisation folded into
    the layers and no gradient; of the checks those of the widths and of equal numbers of rows are left. torch releases
    that are far apart do not read each other's ``.pt2`` files: export with the server's.

    Args:
        transformation: any, fitted; it stays as it is.
        path: the ``.pt2`` file; it appears whole or not at all.
    Raises:
        ValueError: ``transformation`` is none, ``path`` is no ``.pt2`` file.
    Example:
        >>> import tempfile
        >>> from pml_compat.transformations import LinearTransformation
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_transformation(LinearTransformation(3, 2), f"{folder}/old_to_new.pt2")
        ...     os.listdir(folder)
        ['old_to_new.pt2']
    """
    _check(transformation, path, ".pt2")
    served = copy.deepcopy(transformation).folded().requires_grad_(False)
    inputs = [rows for rows in _random_rows(served) if rows is not None]
    rows = torch.export.Dim("rows", min=1)
    shapes = {name: {0: rows} for name, _ in zip(("embeddings", "side_info"), inputs, strict=False)}
    program = torch.export.export(_Unchecked(served), tuple(inputs), dynamic_shapes=shapes, strict=False)
    with whole_file(path) as temporary:
        torch.export.save(program, temporary)


@torch.no_grad()
def save_numpy(transformation: Transformation, path: str | os.PathLike[str]) -> None:
    """Write an ``.npz`` file for :class:`NumpyTransformation`: weights and a short program, nothing pickled.

    Every transformation of the library has such a form, and one of your own if it is made of linear layers, batch
    normalisation, ReLU, PReLU, ``cat``, slices or ``split`` of columns, ``+``, ``-`` and ``*``. The file is float64 for
    a float64 transformation and else float32. Before it takes its place it is read back, and compared with the
    transformation on random rows.

    Args:
        transformation: fitted; it stays as it is.
        path: the ``.npz`` file; it appears whole or not at all.
    Raises:
        ValueError: ``transformation`` is none, or does something that the NumPy form has not (then write
            a ``.pt2`` file) or gives NaN or infinity; ``path`` is no ``.npz`` file.
    Example:
        >>> import tempfile
        >>> from pml_compat.transformations import LinearTransformation
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_numpy(LinearTransformation(3, 2), f"{folder}/old_to_new.npz")
        ...     NumpyTransformation(f"{folder}/old_to_new.npz")(np.ones((1, 3)))
        array([[1., 1.]])
    """
    _check(transformation, path, ".npz")
    weight = next(transformation.parameters())
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    served = copy.deepcopy(transformation).to("cpu", dtype).folded()
    inputs = _random_rows(served)
    expected = served.transform(*copy.deepcopy(inputs))
    check_finite(expected, "transformation's output for random rows")
    program, weights = record(served, dtype)
    arrays: dict[str, Any] = {"program": np.array(json.dumps(program)), **weights}
    with whole_file(path) as temporary:
        np.savez(temporary, **arrays)
        result = NumpyTransformation(temporary)(*(None if rows is None else rows.numpy() for rows in inputs))
        difference = float((torch.from_numpy(result) - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        if not difference <= (1e-10 if dtype == torch.float64 else 1e-4):
            raise ValueError(
                f"transformation must give the same in NumPy, got another output for random rows ({difference:.1g} of "
                "the largest); does it draw at random or change tensors in place? a .pt2 file takes any"
            )


class _Unchecked(torch.nn.Module):
    """A transformation without the checks of its inputs, which would become part of the program."""

    def __init__(self, transformation: Transformation) -> None:
        super().__init__()
        self.transformation = transformation

    def forward(self, embeddings: torch.Tensor, side_info: torch.Tensor | None = None) -> torch.Tensor:
        return self.transformation.transform(embeddings, side_info)


def _check(transformation: Any, path: str | os.PathLike[str], suffix: str) -> None:
    if not hasattr(transformation, "folded"):
        raise ValueError(f"transformation must be a Transformation, got {type(transformation).__name__}")
    if Path(path).suffix != suffix:
        raise ValueError(f"path must be {'an' if suffix == '.npz' else 'a'} {suffix} file, got {os.fspath(path)!r}")


def _random_rows(transformation: Transformation) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = next(transformation.parameters())
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(_BATCH, transformation.in_features, generator=generator).to(weight)
    if transformation.side_features is None:
        return embeddings, None
    return embeddings, torch.randn(_BATCH, transformation.side_features, generator=generator).to(weight)
