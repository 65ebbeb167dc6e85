"""A table of a LanceDB in a folder: ``lancedb:///folder/table``; ``#column`` at the end names the column of vectors.

Such a table is a Lance dataset, ``folder/table.lance``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..._extras import import_extra
from . import files
from .base import Manifest
from .lance import LanceStore, LanceWriter, open_dataset


class LanceDBStore(LanceStore):
    """See the module. LanceDB opens the table, so that a table it does not know is none."""

    def _open(self, place: str) -> Any:
        path = table_path(place)
        open_dataset(path, "lancedb")  # says more of what is broken, and makes no folder
        lancedb = import_extra("lancedb", "lancedb")
        return lancedb.connect(str(path.parent)).open_table(path.stem).to_lance()


class LanceDBWriter(LanceWriter):
    """Writes a dataset that LanceDB lists once it is whole."""

    extra = "lancedb"

    def _path(self, place: str) -> Path:
        return table_path(place)


def read_manifest(address: str) -> Manifest | None:
    """Return the manifest of a table, or None."""
    return files.read_manifest(table_path(address))


def exists(address: str) -> bool:
    """Tell whether there is such a table."""
    return table_path(address).exists()


def table_path(address: str) -> Path:
    """Return where the dataset of a table is.

    Raises:
        ValueError: an address without a folder or a table.
    """
    place = address.partition("#")[0]
    folder, _, table = place.removeprefix("lancedb://").rpartition("/")
    if not table or not folder.startswith("/"):
        raise ValueError(f"address must be lancedb:///FOLDER/TABLE, got {address!r}")
    return Path(folder) / f"{table}.lance"
