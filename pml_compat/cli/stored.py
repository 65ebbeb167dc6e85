"""Stored embeddings, read from the files that people have: npz, npy, Parquet, or a folder of FrozenEmbeddings."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._checks import check_matrix
from .._extras import import_extra
from ..data.parquet_columns import embedding_rows
from ..frozen import FrozenEmbeddings
from ..frozen.embedding_files import borrow, map_array

FORMATS = (
    "an .npz file with the keys embeddings and labels (optional: ids, cameras), an .npy file of embeddings, a .parquet "
    "file with the columns embedding and label (optional: id, camera), or a folder written by FrozenEmbeddings"
)
_KEYS = ("embeddings", "labels", "ids", "cameras")


@dataclass(frozen=True)
class Columns:
    """The columns of a Parquet file, the first of each that it has; as vector databases export them."""

    embeddings: tuple[str, ...] = ("embedding", "embeddings", "vector", "vectors", "values")
    labels: tuple[str, ...] = ("label", "labels", "class")
    ids: tuple[str, ...] = ("id", "ids", "_id", "pk", "uuid")
    cameras: tuple[str, ...] = ("camera", "cameras")


@dataclass(frozen=True)
class StoredEmbeddings:
    """What one file holds, checked for shapes and types; npy files and folders stay on disk, memory-mapped.

    Args:
        option: the command's option that named it, for error messages.
        path: the file or folder.
        embeddings: ``(N, D)``, floating point, as stored.
        labels: ``(N,)`` integers or strings, or None.
        ids: ``(N,)`` integers or strings, or None.
        cameras: ``(N,)`` integers or strings, or None.
        side_info: ``(N, S)``, or None.
    """

    option: str
    path: Path
    embeddings: torch.Tensor
    labels: np.ndarray | None = None
    ids: np.ndarray | None = None
    cameras: np.ndarray | None = None
    side_info: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def width(self) -> int:
        """``D``."""
        return self.embeddings.shape[1]

    def require_labels(self, label_option: str) -> np.ndarray:
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
        sample = len(self) < len(other) and self.ids is not None and other.ids is not None
        if len(self) != len(other) and not sample:
            raise ValueError(
                f"{self.option} must have the items of {other.option}: expected {len(other)} rows, got {len(self)}; "
                "to try a sample of the gallery, give ids in both files, or the same sample of both"
            )
        rows = None if sample else self._rows_of(other)
        ordered = self if rows is None else self._reordered(rows)
        theirs = other.labels
        if sample:
            places = self._places_in(other)
            theirs = None if theirs is None else theirs[places]
        if ordered.labels is not None and theirs is not None and not np.array_equal(ordered.labels, theirs):
            row = int((ordered.labels != theirs).nonzero()[0][0])
            raise ValueError(
                f"{self.option} must have the items of {other.option} in the same order, or ids in both files: the "
                f"label of row {row} is {ordered.labels[row]}, and {theirs[row]} in {other.option}"
            )
        return ordered

    def _places_in(self, other: StoredEmbeddings) -> np.ndarray:
        """Return the rows of ``other`` that these are a sample of."""
        assert self.ids is not None and other.ids is not None
        order = np.argsort(other.ids, kind="stable")
        places = order[np.searchsorted(other.ids[order], self.ids).clip(max=len(order) - 1)]
        if not np.array_equal(other.ids[places], self.ids) or len(np.unique(self.ids)) < len(self.ids):
            raise ValueError(f"{self.option} must have ids that {other.option} has, each once")
        return places

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
            labels=None if self.labels is None else self.labels[rows],
            ids=None if self.ids is None else self.ids[rows],
            side_info=None if self.side_info is None else self.side_info[index],
        )


def read_stored(path: Path, option: str, labels: Path | None = None, columns: Columns = Columns()) -> StoredEmbeddings:
    """Read a file or folder of stored embeddings; nothing is unpickled.

    Args:
        path: see ``FORMATS``.
        option: what to call it in error messages.
        labels: an ``.npy`` file of labels, in place of those in the file.
        columns: of a Parquet file.
    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ImportError: a Parquet file, and pyarrow is not installed.
        ValueError: a file of another kind or cut short, a missing key or column, lengths that differ, embeddings that
            are no floating-point ``(N, D)``, labels that are no integers.
    """
    if not path.exists():
        raise FileNotFoundError(f"{option}: there is no {str(path)!r}")
    side_info = None
    parts = sorted([*path.rglob("*.parquet"), *path.rglob("*.pq")]) if path.is_dir() else []
    if parts:
        arrays: dict[str, Any] = _joined([_read_parquet(part, option, columns) for part in parts], option)
    elif path.is_dir():
        folder = _open_folder(path, option)
        arrays = {"embeddings": map_array(path / "embeddings.npy")}
        arrays |= {"ids": folder.ids.numpy()} if (path / "ids.npy").exists() else {}
        side_info = None if folder.side_info is None else map_array(path / "side_info.npy")
    elif path.suffix == ".npy":
        arrays = {"embeddings": read_array(path, option)}
    elif path.suffix == ".npz":
        arrays = _read_npz(path, option)
    elif path.suffix in (".parquet", ".pq"):
        arrays = _read_parquet(path, option, columns)
    else:
        raise ValueError(f"{option} must be {FORMATS}; got {str(path)!r}")
    embeddings = arrays["embeddings"]
    if isinstance(embeddings, np.ndarray):
        if embeddings.dtype.kind not in "fiu":
            raise ValueError(f"embeddings of {option} must be numbers, got {embeddings.dtype}")
        embeddings = borrow(embeddings)
    if not embeddings.is_floating_point():  # int8 vectors
        embeddings = embeddings.float()
    check_matrix(embeddings, f"embeddings of {option}")
    length = len(embeddings)
    found = read_column(labels, "labels") if labels is not None else arrays.get("labels")
    return StoredEmbeddings(
        option=option,
        path=path,
        embeddings=embeddings,
        labels=_check_codes(found, f"labels of {option}", length),
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


def _read_parquet(path: Path, option: str, columns: Columns) -> dict[str, Any]:
    parquet = import_extra("pyarrow.parquet", "parquet")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            chosen = {key: next((c for c in getattr(columns, key) if c in names), None) for key in _KEYS}
            wanted = [column for column in chosen.values() if column is not None]
            table = file.read(wanted) if chosen["embeddings"] is not None else None
    except (ValueError, OSError) as error:
        raise ValueError(f"{option} must be a whole Parquet file, {str(path)!r} is not: {error}") from error
    if table is None:
        raise ValueError(
            f"{option} must have the column {columns.embeddings[0]}, {str(path)!r} has {sorted(names)}; name it with "
            "--embedding-column"
        )
    for column in wanted:
        if table[column].null_count and column != chosen["ids"]:
            raise ValueError(f"{option} must have a value in every row, column {column} has nulls in {str(path)!r}")
    arrays = {key: table[column].to_numpy() for key, column in chosen.items() if column and key != "embeddings"}
    for key, values in arrays.items():  # strings come as objects
        if values.dtype == object and key != "ids":
            arrays[key] = values.astype(str)
    column = chosen["embeddings"]
    assert column is not None
    return {"embeddings": embedding_rows(table[column], option, column), **arrays}


def _joined(parts: list[dict[str, Any]], option: str) -> dict[str, Any]:
    keys = set(parts[0])
    if any(set(part) != keys for part in parts):
        raise ValueError(f"{option} must have the same columns in every part of its folder")
    return {key: np.concatenate([part[key] for part in parts]) for key in keys}


def read_column(path: Path, name: str) -> np.ndarray:
    """Read an ``.npy`` file of one value a row.

    Args:
        path: the file.
        name: what to call it in error messages.
    """
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive of several arrays")
        return array
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: there is no {str(path)!r}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name} must be a whole .npy file of integers, {str(path)!r} is not: {error}") from error


def _check_codes(values: np.ndarray | None, name: str, length: int) -> np.ndarray | None:
    if values is None:
        return None
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    if values.dtype.kind not in "biuUfO":
        raise ValueError(f"{name} must be integers or strings, got {values.dtype}")
    if values.shape != (length,):
        raise ValueError(f"{name} must have one entry a row: expected shape ({length},), got {values.shape}")
    return values
