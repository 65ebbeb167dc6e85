"""What stores in files share: a manifest beside the file, work that lies there until it is whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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


def remove(path: Path) -> None:
    """Remove a file or folder, what lies there unfinished, and the manifest, which goes last."""
    for one in (partial_path(path), path):
        if one.is_dir():
            shutil.rmtree(one)
        else:
            one.unlink(missing_ok=True)
    manifest_path(path).unlink(missing_ok=True)
