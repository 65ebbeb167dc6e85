"""What every transformation has: widths, one call, one file format."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import numpy as np
import torch

from .._checks import check_integer, check_matrix, check_same_device
from .._files import load_tensors, save_tensors
from .apply import apply
from .batch_norm import fold_batch_norm
from .pairs import PairMoments

_FORMAT = "pml_compat.Transformation/1"


class Transformation(torch.nn.Module):
    """Base of the maps from one embedding space into another.

    A subclass gives :meth:`transform` and :meth:`config`; calling, checking, saving and loading are here. A subclass
    of your own is saved and loaded like ours, once the module that defines it is imported.

    Args:
        in_features: width of the embeddings that come in, 1 or more.
        out_features: width of the embeddings that go out, 1 or more.
        side_features: width of the side-information that is stored with each embedding; None without.
    Shape:
        - embeddings ``(N, in_features)``; side_info ``(N, side_features)``, where the transformation takes it
        - output: ``(N, out_features)`` in the dtype of ``embeddings``, of any length: normalise where it matters
    Raises:
        ValueError: widths below 1; in a call: another width, device or number of rows, side-information missing or
            not asked for.
    """

    def __init__(self, in_features: int, out_features: int, side_features: int | None = None) -> None:
        super().__init__()
        self._is_folded = False
        self.in_features = check_integer(in_features, "in_features", minimum=1)
        self.out_features = check_integer(out_features, "out_features", minimum=1)
        self.side_features = None if side_features is None else check_integer(side_features, "side_features", minimum=1)

    def forward(self, embeddings: torch.Tensor, side_info: Any = None) -> torch.Tensor:
        """Map ``(N, in_features)`` embeddings to ``(N, out_features)``."""
        weight = next(self.parameters())
        check_matrix(embeddings, "embeddings", self.in_features)
        check_same_device(embeddings, "embeddings", weight, f"the {type(self).__name__}")
        if (side_info is None) != (self.side_features is None):
            wanted = "None" if self.side_features is None else f"given, (N, {self.side_features})"
            got = "None" if side_info is None else f"shape {tuple(side_info.shape)}"
            raise ValueError(f"side_info must be {wanted} for this {type(self).__name__}, got {got}")
        if side_info is not None:
            check_matrix(side_info, "side_info", self.side_features)
            if len(side_info) != len(embeddings):
                raise ValueError(
                    f"side_info must have one row an embedding: expected {len(embeddings)}, got {len(side_info)}"
                )
            side_info = side_info.to(weight)
        return self.transform(embeddings.to(weight.dtype), side_info).to(embeddings.dtype)

    def transform(self, embeddings: torch.Tensor, side_info: torch.Tensor | None) -> torch.Tensor:
        """Map embeddings that are checked and in the dtype of the parameters."""
        raise NotImplementedError

    def start_from(self, moments: PairMoments) -> bool:
        """Become the closed-form linear map of these pairs, and say so; False where the map cannot, or is trained.

        ``moments`` are those of the embeddings, side-information beside them, and of the rows to map them onto.
        :func:`fit_transformation` asks once, before it trains.
        """
        return False

    def back_to_start(self) -> None:
        """Undo what was learned since :meth:`start_from`, of the map at least; called after that said True alone."""
        raise NotImplementedError

    def shrink(self, mean: torch.Tensor, kept: float) -> None:
        """Keep a share of what mapped rows differ by from ``mean``; :func:`fit_transformation` ends with it.

        A map stays as it is unless it overrides this and :meth:`unshrink`.
        """

    def unshrink(self) -> None:
        """Undo :meth:`shrink`, before a training goes on."""

    def folded(self) -> Transformation:
        """Return an equivalent transformation for serving: in eval mode, batch normalisation inside the layers."""
        folded = fold_batch_norm(copy.deepcopy(self).eval())
        folded._is_folded = True
        return folded

    def apply_to(
        self,
        source: Any,
        side_info: Any = None,
        *,
        out: str | os.PathLike[str] | np.ndarray | None = None,
        batch_size: int = 8192,
        normalize: bool = False,
        overwrite: bool = False,
        progress: bool = True,
    ) -> np.ndarray:
        """Map a whole gallery, in memory set by ``batch_size``, in eval mode.

        Args:
            source: ``(N, in_features)`` tensor, array, memory map, or whatever gives rows by a slice; read in batches.
            side_info: ``(N, side_features)``, row i of the same item; None where the transformation takes none.
            out: an ``.npy`` file to write to, whole or not at all; or an array of the right shape and dtype, in memory
                or mapped, which is filled; None makes one in memory. Never the source itself.
            batch_size: rows at once.
            normalize: scale each row to length 1.
            overwrite: replace a file that stands at ``out``.
            progress: show a progress bar.
        Shape:
            - output: ``(N, out_features)`` float32 (float64 for a float64 transformation); a memory map of the file
              ``out``, or the array ``out``
        Raises:
            FileExistsError: a file stands at ``out``, without ``overwrite``.
            ValueError: other widths, lengths that differ, NaN or infinity (which row), ``out`` no ``.npy`` file and
                no array that fits, or the source.
        """
        return apply(
            self,
            source,
            side_info,
            out=out,
            batch_size=batch_size,
            normalize=normalize,
            overwrite=overwrite,
            progress=progress,
        )

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write a form for a server without this library, by the suffix of ``path``; the file appears whole or not.

        Args:
            path: ``.pt2``, a program: ``torch.export.load(path).module()(embeddings)`` on any number of rows, in the
                dtype and on the device of the parameters (move it first); releases of torch that are far apart do not
                read each other's. ``.npz``, for :class:`NumpyTransformation`, which needs NumPy alone.
        Raises:
            ValueError: another suffix; a transformation of your own that the NumPy form cannot express.
        Example:
            >>> import tempfile
            >>> from pml_compat.transformations import LinearTransformation, NumpyTransformation
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     LinearTransformation(3, 2).export(f"{folder}/old_to_new.npz")
            ...     NumpyTransformation(f"{folder}/old_to_new.npz")(np.ones((1, 3)))
            array([[1., 1.]])
        """
        from .serving import export

        export(self, path)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments, of types that JSON has."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, **config: Any) -> Transformation:
        """Build the transformation, untrained, from what :meth:`config` gave."""
        return cls(**config)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write parameters, buffers and configuration to a safetensors file; it appears whole or not at all.

        Raises:
            ValueError: it was made by :meth:`folded`, so that its layers are not those of its configuration.
        """
        if any(getattr(module, "_is_folded", False) for module in self.modules()):
            raise ValueError(
                f"a folded {type(self).__name__} must not be saved, it is for computing; save the transformation it "
                "was made from"
            )
        save_tensors(path, self.state_dict(), {"format": _FORMAT, "transformation": json.dumps(describe(self))})

    def extra_repr(self) -> str:
        """Show the widths, as torch's own modules do."""
        side = "" if self.side_features is None else f", side_features={self.side_features}"
        return f"in_features={self.in_features}, out_features={self.out_features}{side}"


def load_transformation(path: str | os.PathLike[str]) -> Transformation:
    """Read what :meth:`Transformation.save` wrote, onto the CPU and in eval mode; nothing is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a truncated file, one that holds something else, or a class that is not imported.
    """
    tensors, metadata = load_tensors(path, _FORMAT, "a transformation's .save")
    description = _read_description(path, metadata)
    transformation = from_description(description)
    if tensors:
        transformation.to(next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()))
    try:
        transformation.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"path must hold the parameters of the {description['class']} that it describes, {os.fspath(path)!r} does "
            f"not: {error}"
        ) from error
    return transformation.eval()


def _read_description(path: str | os.PathLike[str], metadata: dict[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(metadata["transformation"])
        if isinstance(found["class"], str) and isinstance(found["config"], dict):
            return found
    except (KeyError, TypeError, json.JSONDecodeError):
        pass
    raise ValueError(
        f"path must be a file written by a transformation's .save, {os.fspath(path)!r} does not say which one it holds"
    )


def describe(transformation: Transformation) -> dict[str, Any]:
    """Return the name of a transformation's class and its configuration."""
    return {"class": type(transformation).__name__, "config": transformation.config()}


def from_description(description: dict[str, Any]) -> Transformation:
    """Build, untrained, what :func:`describe` described."""
    known = {cls.__name__: cls for cls in _subclasses(Transformation)}
    name = description["class"]
    if name not in known:
        raise ValueError(
            f"path must hold a transformation whose class is imported, got {name!r}; import the module that defines "
            f"it first (known: {', '.join(sorted(known))})"
        )
    try:
        return known[name].from_config(**description["config"])
    except TypeError as error:
        raise ValueError(f"path must hold a {name} of this version, its settings are others: {error}") from error


def _subclasses(cls: type[Transformation]) -> list[type[Transformation]]:
    return [found for direct in cls.__subclasses__() for found in (direct, *_subclasses(direct))]
