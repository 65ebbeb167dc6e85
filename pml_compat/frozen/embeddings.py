"""The old embeddings, kept on disk beside their sample ids: the old model runs once, not once an epoch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._checks import check_finite, check_matrix
from .._files import whole_folder
from .embedding_files import as_integers, borrow, flush_to_disk, form_of, map_array, sort_ids, storable, write_arrays

_FORMAT = "pml_compat.FrozenEmbeddings/1"


class FrozenEmbeddings:
    """Old embeddings that stay on disk and are looked up by row: ``embeddings[indices]``.

    :meth:`write` makes a folder of ``embeddings.npy``, ``ids.npy``, ``side_info.npy`` and ``meta.json``; plain
    ``np.load`` reads the arrays too. They are memory-mapped, read only. What is looked up is a copy, so that nothing
    can change what is stored. DataLoader workers, forked or spawned, open the files themselves.

    Args:
        path: a folder that :meth:`write` made.
        fingerprint: :func:`~pml_compat.frozen.model_fingerprint` of the old model at hand; another one in the folder
            is an error. None takes any.
        width: the width the embeddings must have; None takes any.
    Shape:
        - ``embeddings[i]``: ``(D,)``; ``embeddings[indices]``: ``(n, D)``, for a list, tensor or array of integers or
          a slice; on the CPU, in the stored dtype (float16, float32 or float64)
        - ``shape`` ``(N, D)``; ``side_info``: None, or ``(N, S)`` with the same lookup
    Raises:
        FileNotFoundError: there is nothing at ``path``, or a file of the folder is gone.
        ValueError: not a folder of :meth:`write`, a file cut short or exchanged, another fingerprint or width;
            in a lookup, indices that are no integers.
        IndexError: an index below 0 (-1 stands for "not stored") or past the last row.
    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     old = FrozenEmbeddings.write(f"{folder}/old", [(torch.eye(2), torch.tensor([7, 3]))])
        ...     old.index_of([3, 7, 9]), old[[1, 0]]
        (tensor([ 1,  0, -1]), tensor([[0., 1.], [1., 0.]]))
    """

    side_info: FrozenEmbeddings | None
    fingerprint: str | None

    def __init__(
        self, path: str | os.PathLike[str], *, fingerprint: str | None = None, width: int | None = None
    ) -> None:
        folder = Path(path).absolute()
        meta = _read_meta(folder)
        _check_fingerprint(fingerprint)
        if fingerprint is not None and fingerprint != meta["fingerprint"]:
            raise ValueError(
                f"fingerprint must be that of the model behind {str(folder)!r}, {meta['fingerprint']!r}, got "
                f"{fingerprint!r}; load the model that wrote them, or write them again with this one"
            )
        arrays = {}
        for name, form in meta["arrays"].items():
            file = folder / f"{name}.npy"
            arrays[name] = map_array(file)
            got = form_of(arrays[name])
            if got != form:
                raise ValueError(f"{str(file)!r} must be the file that meta.json describes, {form}, got {got}")
        side_info = folder / "side_info.npy" if "side_info" in arrays else None
        self._hold(folder, arrays["embeddings"], arrays.get("ids"), side_info, meta["fingerprint"], width)

    def _hold(
        self,
        path: Path | None,
        rows: torch.Tensor,
        ids: torch.Tensor | None,
        side_info: Any,
        fingerprint: str | None,
        width: int | None,
    ) -> None:
        if width is not None and width != rows.shape[1]:
            raise ValueError(f"width must be that of the embeddings, {rows.shape[1]}, got {width}")
        if side_info is not None and not isinstance(side_info, FrozenEmbeddings):
            side_info = FrozenEmbeddings.from_array(side_info)
        for name, value in (("ids", ids), ("side_info", side_info)):
            if value is not None and len(value) != len(rows):
                raise ValueError(f"{name} must have one entry a row: expected {len(rows)}, got {len(value)}")
        self._path, self._rows, self._ids = path, rows, ids
        self.side_info, self.fingerprint = side_info, fingerprint

    @classmethod
    def from_array(
        cls,
        path_or_array: Any,
        *,
        ids: Any = None,
        side_info: Any = None,
        fingerprint: str | None = None,
        width: int | None = None,
    ) -> FrozenEmbeddings:
        """Take old embeddings from elsewhere: in memory, or in an ``.npy`` file.

        Args:
            path_or_array: ``(N, D)`` tensor, array or memory map, held and not copied, where it is on the CPU and of a
                dtype that is stored; the path of an ``.npy`` file, which spawned workers open themselves; or of a
                folder, as in the constructor. The values in files and memory maps are not looked through for NaN.
            ids: ``(N,)`` integers, no duplicates, the sample of each row; None: its position. A folder has its own.
            side_info: ``(N, S)``, as ``path_or_array``. A folder has its own.
            fingerprint: of the model behind the embeddings; a folder must have the same.
            width: see the class.
        Raises:
            ValueError: as the class; no ``(N, D)`` floating-point numbers, NaN or infinity (which row) in memory, ids
                that repeat, lengths that differ, ids or side_info for a folder.
        """
        path = Path(path_or_array).absolute() if isinstance(path_or_array, str | os.PathLike) else None
        if path is not None and path.is_dir():
            if ids is not None or side_info is not None:
                raise ValueError(f"ids and side_info must be None for a folder, {str(path)!r} has its own")
            return cls(path, fingerprint=fingerprint, width=width)
        _check_fingerprint(fingerprint)
        if path is not None:
            rows = map_array(path)
        else:
            rows = borrow(path_or_array) if isinstance(path_or_array, np.ndarray) else path_or_array
            rows = storable(check_matrix(rows, "embeddings"))
            if not isinstance(path_or_array, np.memmap):
                check_finite(rows, "embeddings")
        check_matrix(rows, "embeddings")
        embeddings = cls.__new__(cls)
        ids = None if ids is None else as_integers(ids, "ids")
        embeddings._hold(path, rows, ids, side_info, fingerprint, width)
        if ids is not None:
            _ = embeddings._sorted_ids
        return embeddings

    @classmethod
    def write(
        cls, path: str | os.PathLike[str], batches: Iterable[Any], *, fingerprint: str | None = None
    ) -> FrozenEmbeddings:
        """Write old embeddings as they come, in memory set by the batch (ids: some 30 bytes a row), and open them.

        The folder appears at ``path`` when all is written; an interrupted write leaves nothing there (a killed one, a
        folder ``.NAME-...`` beside it, to delete).

        Args:
            path: the folder to make; nothing may be there yet.
            batches: ``embeddings``, ``(embeddings, ids)`` or ``(embeddings, ids, side_info)``, all batches alike; ids
                may be None. embeddings ``(n, D)`` and side_info ``(n, S)`` are tensors on any device or arrays, ids
                ``(n,)`` integers without duplicates, in any order. Any iterable; it is read once.
            fingerprint: :func:`~pml_compat.frozen.model_fingerprint` of the old model, for readers to insist on.
        Raises:
            ValueError: ``path`` is taken; no batches, batches not alike in parts, width or dtype, NaN or infinity
                (which row), ids that repeat or are not one a row.
        """
        path = Path(path)
        _check_fingerprint(fingerprint)
        if isinstance(batches, torch.Tensor | np.ndarray):
            raise ValueError(f"batches must be an iterable of batches, got one {type(batches).__name__}; write [it]")
        _check_free(path)
        with whole_folder(path) as folder:
            arrays = write_arrays(folder, batches)
            with (folder / "meta.json").open("w", encoding="utf-8") as file:
                json.dump({"format": _FORMAT, "fingerprint": fingerprint, "arrays": arrays}, file, indent=2)
                flush_to_disk(file)
            _check_free(path)
        return cls(path)

    def __getitem__(self, indices: Any) -> torch.Tensor:
        if isinstance(indices, slice):
            return self._rows[indices].clone()
        one = not isinstance(indices, list | tuple | range) and np.ndim(indices) == 0
        if one:
            indices = indices.reshape(1) if isinstance(indices, torch.Tensor) else [indices]
        index = as_integers(indices, "indices")
        outside = index[(index < 0) | (index >= len(self))]
        if len(outside):
            hint = "; -1 is index_of's answer for 'not stored'" if bool((outside == -1).any()) else ""
            raise IndexError(f"indices must be in [0, {len(self) - 1}], got {int(outside[0])}{hint}")
        rows = torch.index_select(self._rows, 0, index)
        return rows[0] if one else rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> torch.Size:
        """``(N, D)``."""
        return self._rows.shape

    @property
    def ndim(self) -> int:
        """2, as of a tensor."""
        return self._rows.ndim

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype, which lookups return."""
        return self._rows.dtype

    @property
    def ids(self) -> torch.Tensor:
        """The ``(N,)`` sample id of each row; its position where none were given."""
        return torch.arange(len(self)) if self._ids is None else self._ids.clone()

    def index_of(self, ids: Any) -> torch.Tensor:
        """Return the ``(n,)`` row of each sample id, -1 where it is not stored."""
        ids = as_integers(ids, "ids")
        if self._ids is None:
            return torch.where((ids >= 0) & (ids < len(self)), ids, -1)
        ordered, rows = self._sorted_ids
        position = torch.searchsorted(ordered, ids).clamp_(max=len(ordered) - 1)
        return torch.where(ordered[position] == ids, rows[position], -1)

    @cached_property
    def _sorted_ids(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._ids is not None
        return sort_ids(self._ids)

    def __reduce__(self) -> Any:
        # Copies and other processes open the files again; only what is in memory travels.
        own = {} if self._path is not None and self._path.is_dir() else {"ids": self._ids, "side_info": self.side_info}
        open_again = partial(type(self).from_array, fingerprint=self.fingerprint, width=self.shape[1], **own)
        return open_again, (self._rows if self._path is None else self._path,)

    def __repr__(self) -> str:
        side = "" if self.side_info is None else f", side_info={tuple(self.side_info.shape)}"
        ids = self._ids is not None
        return f"FrozenEmbeddings({tuple(self.shape)}, {self.dtype}, ids={ids}{side}, fingerprint={self.fingerprint!r})"


def _read_meta(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise FileNotFoundError(
            f"path must be a folder written by FrozenEmbeddings.write, {str(folder)!r} is not there"
        )
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"path must be a folder written by FrozenEmbeddings.write, {str(folder)!r} is not: {error}; an .npy file "
            "is opened by FrozenEmbeddings.from_array"
        ) from error
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise ValueError(f"path must be a folder with a meta.json of format {_FORMAT!r}, {str(folder)!r} has another")
    return meta


def _check_free(path: Path) -> None:
    if path.exists():
        raise ValueError(f"path must be free, {os.fspath(path)!r} is there already; delete it or choose another")


def _check_fingerprint(fingerprint: Any) -> None:
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise ValueError(
            f"fingerprint must be a string, got {type(fingerprint).__name__}; model_fingerprint(model) gives one"
        )
