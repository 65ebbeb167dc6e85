"""What stores in files share: a manifest beside the file, work that lies there until it is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np

from ..._files import whole_file
from .base import Manifest


def manifest_path(path: Path) -> Path:
    """Return where the manifest of a file or folder is."""
    return path.with_name(f"{path.name}.manifest.json")


def partial_path(path: Path) -> Path:
    """Return where a file or folder lies until it is whole."""
    return path.with_name(f"{path.name}.partial")


def read_manifest(path: Path) -> Manifest | None:
    """Return the manifest of a file or folder, or None.

    Raises:
        ValueError: a manifest that is cut short.
    """
    beside = manifest_path(path)
    try:
        return json.loads(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{beside} must be a whole manifest, it is not: {error}") from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest whole."""
    with whole_file(manifest_path(path)) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")


class WaitingVectors:
    """Vectors that wait, row after row, until the store they belong to is written anew.

    Args:
        path: of the store.
        width: of a vector.
        dtype: of a vector.
    """

    def __init__(self, path: Path, width: int, dtype: np.dtype) -> None:
        self.path, self.width, self.dtype = waiting_path(path), width, dtype

    def put(self, row: int, vectors: np.ndarray) -> None:
        """Write vectors from a row on, to the disk."""
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.seek(row * self.width * self.dtype.itemsize)
            file.write(np.ascontiguousarray(vectors, self.dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())

    def first(self, rows: int) -> np.ndarray:
        """Map the first rows."""
        return np.memmap(self.path, self.dtype, "r", shape=(rows, self.width))

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def waiting_path(path: Path) -> Path:
    """Return where vectors wait until a file or folder is written anew."""
    return path.with_name(f"{path.name}.waiting")


def remove(path: Path) -> None:
    """Remove a file or folder, what lies there unfinished, and the manifest, which goes last."""
    for one in (partial_path(path), waiting_path(path), path):
        if one.is_dir():
            shutil.rmtree(one)
        else:
            one.unlink(missing_ok=True)
    manifest_path(path).unlink(missing_ok=True)
