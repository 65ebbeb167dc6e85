"""Stored embeddings, read from the files that people have: npz, npy, Parquet, or a folder of FrozenEmbeddings."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checks import check_labels, check_matrix
from ..extras import import_extra
from ..frozen import FrozenEmbeddings
from ..frozen.embedding_files import borrow, map_array

FORMATS = (
    "an .npz file with the keys embeddings and labels (optional: ids, cameras), an .npy file of embeddings, a .parquet "
    "file with the columns embedding and label (optional: id, camera), or a folder written by FrozenEmbeddings"
)
_KEYS = {"embeddings": "embedding", "labels": "label", "ids": "id", "cameras": "camera"}  # npz key -> Parquet column


@dataclass(frozen=True)
class StoredEmbeddings:
    """What one file holds, checked for shapes and types; npy files and folders stay on disk, memory-mapped.

    Args:
        option: the command's option that named it, for error messages.
        path: the file or folder.
        embeddings: ``(N, D)``, floating point, as stored.
        labels: ``(N,)`` int64, or None.
        ids: ``(N,)`` integers or strings, or None.
        cameras: ``(N,)`` integers or strings, or None.
        side_info: ``(N, S)``, or None.
    """

    option: str
    path: Path
    embeddings: torch.Tensor
    labels: torch.Tensor | None = None
    ids: np.ndarray | None = None
    cameras: np.ndarray | None = None
    side_info: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def width(self) -> int:
        """``D``."""
        return self.embeddings.shape[1]

    def require_labels(self, label_option: str) -> torch.Tensor:
        """Return the labels, or raise a ValueError that says how to give them."""
        if self.labels is None:
            raise ValueError(
                f"{self.option} must come with labels, {str(self.path)!r} has none; give them with {label_option}"
            )
        return self.labels

    def in_order_of(self, other: StoredEmbeddings) -> StoredEmbeddings:
        """Return these embeddings with row i for row i of ``other``, the same items by another model.

        Where both files have ids, these tell which rows belong together; otherwise it is their position.

        Raises:
            ValueError: other items, or items with other labels.
        """
        if len(self) != len(other):
            raise ValueError(
                f"{self.option} must have the items of {other.option}: expected {len(other)} rows, got {len(self)}; "
                "to try a sample, give the same sample of both"
            )
        rows = self._rows_of(other)
        ordered = self if rows is None else self._reordered(rows)
        if ordered.labels is not None and other.labels is not None and not torch.equal(ordered.labels, other.labels):
            row = int((ordered.labels != other.labels).nonzero()[0])
            raise ValueError(
                f"{self.option} must have the items of {other.option} in the same order, or ids in both files: the "
                f"label of row {row} is {int(ordered.labels[row])}, and {int(other.labels[row])} in {other.option}"
            )
        return ordered

    def _rows_of(self, other: StoredEmbeddings) -> np.ndarray | None:
        if self.ids is None or other.ids is None or np.array_equal(self.ids, other.ids):
            return None
        mine, theirs = np.argsort(self.ids, kind="stable"), np.argsort(other.ids, kind="stable")
        ordered = self.ids[mine]
        if (ordered[1:] == ordered[:-1]).any() or not np.array_equal(ordered, other.ids[theirs]):
            raise ValueError(f"{self.option} must have the ids of {other.option}, each once")
        rows = np.empty_like(mine)
        rows[theirs] = mine
        return rows

    def _reordered(self, rows: np.ndarray) -> StoredEmbeddings:
        index = torch.from_numpy(rows)
        return replace(
            self,
            embeddings=self.embeddings[index],
            labels=None if self.labels is None else self.labels[index],
            ids=None if self.ids is None else self.ids[rows],
            side_info=None if self.side_info is None else self.side_info[index],
        )


def read_stored(path: Path, option: str, labels: Path | None = None) -> StoredEmbeddings:
    """Read a file or folder of stored embeddings; nothing is unpickled.

    Args:
        path: see ``FORMATS``.
        option: what to call it in error messages.
        labels: an ``.npy`` file of labels, in place of those in the file.
    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ImportError: a Parquet file, and pyarrow is not installed.
        ValueError: a file of another kind or cut short, a missing key or column, lengths that differ, embeddings that
            are no floating-point ``(N, D)``, labels that are no integers.
    """
    if not path.exists():
        raise FileNotFoundError(f"{option}: there is no {str(path)!r}")
    side_info = None
    if path.is_dir():
        folder = _open_folder(path, option)
        arrays: dict[str, Any] = {"embeddings": map_array(path / "embeddings.npy")}
        arrays |= {"ids": folder.ids.numpy()} if (path / "ids.npy").exists() else {}
        side_info = None if folder.side_info is None else map_array(path / "side_info.npy")
    elif path.suffix == ".npy":
        arrays = {"embeddings": read_array(path, option)}
    elif path.suffix == ".npz":
        arrays = _read_npz(path, option)
    elif path.suffix in (".parquet", ".pq"):
        arrays = _read_parquet(path, option)
    else:
        raise ValueError(f"{option} must be {FORMATS}; got {str(path)!r}")
    embeddings = arrays["embeddings"]
    if isinstance(embeddings, np.ndarray):
        if embeddings.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(f"embeddings of {option} must be floating point, got {embeddings.dtype}")
        embeddings = borrow(embeddings)
    check_matrix(embeddings, f"embeddings of {option}")
    length = len(embeddings)
    found = _read_labels_file(labels) if labels is not None else arrays.get("labels")
    return StoredEmbeddings(
        option=option,
        path=path,
        embeddings=embeddings,
        labels=None if found is None else _check_labels(found, f"labels of {option}", length),
        ids=_check_codes(arrays.get("ids"), f"ids of {option}", length),
        cameras=_check_codes(arrays.get("cameras"), f"cameras of {option}", length),
        side_info=side_info,
    )


def read_array(path: Path, option: str) -> torch.Tensor:
    """Map a whole ``.npy`` file of numbers; the tensor must not be written to."""
    if not path.exists():
        raise FileNotFoundError(f"{option}: there is no {str(path)!r}")
    try:
        return map_array(path)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def _open_folder(path: Path, option: str) -> FrozenEmbeddings:
    try:
        return FrozenEmbeddings(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{option}: {error}") from error


def _read_npz(path: Path, option: str) -> dict[str, Any]:
    try:
        with path.open("rb") as opened:  # np.load would leave a broken file open
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it is no zip archive")
            if "embeddings" in file.files:
                return {key: file[key] for key in _KEYS if key in file.files}
            keys = file.files
    except (ValueError, OSError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{option} must be a whole .npz file of numbers, {str(path)!r} is not: {error}") from error
    raise ValueError(f"{option} must have the key embeddings, {str(path)!r} has {sorted(keys)}")


def _read_parquet(path: Path, option: str) -> dict[str, Any]:
    parquet = import_extra("pyarrow.parquet", "parquet")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [column for column in _KEYS.values() if column in names]
            table = file.read(columns) if "embedding" in columns else None
    except (ValueError, OSError) as error:
        raise ValueError(f"{option} must be a whole Parquet file, {str(path)!r} is not: {error}") from error
    if table is None:
        raise ValueError(f"{option} must have the column embedding, {str(path)!r} has {sorted(names)}")
    for column in columns:
        if table[column].null_count:
            raise ValueError(f"{option} must have a value in every row, column {column} has nulls in {str(path)!r}")
    arrays = {key: table[column].to_numpy() for key, column in _KEYS.items() if column in columns[1:]}
    for key in set(arrays) - {"labels"}:  # strings come as objects
        arrays[key] = arrays[key].astype(str) if arrays[key].dtype == object else arrays[key]
    return {"embeddings": _rows_of_lists(table["embedding"], option), **arrays}


def _rows_of_lists(column: Any, option: str) -> np.ndarray:
    """Return a column of lists, all of one length, as a matrix."""
    kind = str(column.type)
    if "list" not in kind:
        raise ValueError(f"{option} must have lists of numbers in the column embedding, got {kind}")
    lists = column.combine_chunks()
    values = lists.flatten()
    if values.null_count:
        raise ValueError(f"{option} must have a number in every place of the column embedding, got nulls")
    flat = values.to_numpy(zero_copy_only=False)
    width = len(flat) // max(1, len(lists))
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    if (lengths != width).any():
        row = int((lengths != lengths[0]).argmax())
        raise ValueError(
            f"{option} must have embeddings of one width, got {int(lengths[0])} in row 0 and {int(lengths[row])} in "
            f"row {row}"
        )
    return flat.reshape(len(lists), width)


def _read_labels_file(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive of several arrays")
        return array
    except FileNotFoundError:
        raise FileNotFoundError(f"labels: there is no {str(path)!r}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"labels must be a whole .npy file of integers, {str(path)!r} is not: {error}") from error


def _check_labels(values: np.ndarray, name: str, length: int) -> torch.Tensor:
    if values.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be integers, got {values.dtype}; number them, with one numbering for queries and gallery"
        )
    if values.dtype == np.uint64 and values.size and values.max() >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {values.max()}")
    return check_labels(values.astype(np.int64), name, length)


def _check_codes(values: np.ndarray | None, name: str, length: int) -> np.ndarray | None:
    if values is None:
        return None
    if values.dtype.kind not in "iuU":
        raise ValueError(f"{name} must be integers or strings, got {values.dtype}")
    if values.shape != (length,):
        raise ValueError(f"{name} must have one entry a row: expected shape ({length},), got {values.shape}")
    return values
