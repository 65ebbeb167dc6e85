"""The stores that galleries are kept in, one file a kind, by their addresses."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from . import files
from .base import Batch, Manifest, Store, Writer

__all__ = ["Batch", "Manifest", "Store", "Writer", "open_store"]

_BY_SCHEME = {
    "qdrant": ("qdrant", "Qdrant"),
    "postgresql": ("postgres", "Postgres"),
    "postgres": ("postgres", "Postgres"),
    "lancedb": ("lancedb", "LanceDB"),
    "milvus": ("milvus", "Milvus"),
}
_BY_SUFFIX = {
    ".npy": ("npy", "Npy"),
    ".parquet": ("parquet", "Parquet"),
    ".pq": ("parquet", "Parquet"),
    ".faiss": ("faiss_index", "Faiss"),
    ".index": ("faiss_index", "Faiss"),
    ".lance": ("lance", "Lance"),
    "": ("parquet", "Parquet"),
}
_ADDRESSES = (
    "NAME.npy, NAME.parquet, a folder of Parquet files, NAME.lance, NAME.faiss, NAME.index, "
    "qdrant://HOST:6333/COLLECTION, qdrant:///FOLDER/COLLECTION, milvus://HOST:19530/COLLECTION, "
    "milvus:///FOLDER/FILE.db/COLLECTION, postgresql://HOST/DATABASE/TABLE#COLUMN, lancedb:///FOLDER/TABLE"
)


def open_store(address: str) -> Store:
    """Open a gallery to read.

    Args:
        address: ``gallery.npy`` (with ``gallery.ids.npy``, if there are ids), ``gallery.parquet`` or a folder of such
            (``gallery.parquet#column``), ``gallery.lance`` (``#column``), ``gallery.faiss`` or ``.index``,
            ``qdrant://host:6333/collection`` (``#name`` of a named vector; ``qdrant:///folder/collection`` in local
            mode), ``milvus://host:19530/collection`` (``#field`` of one of several vectors;
            ``milvus:///folder/file.db/collection`` of Milvus Lite), ``postgresql://host/database/table#column``,
            ``lancedb:///folder/table`` (``#column``).
    Raises:
        FileNotFoundError: nothing is there.
        ImportError: the extra of this kind of store is not installed; which.
        ValueError: no such kind of address, or what is there is no whole gallery.
    """
    module, name = _kind(address)
    store: Store = getattr(module, f"{name}Store")(address)
    return store


def open_writer(address: str, source: Store, width: int) -> Writer:
    """Return what writes a new store at ``address``, ``width`` wide, of the kind and settings of ``source``."""
    module, name = _kind(address)
    writer: Writer = getattr(module, f"{name}Writer")(address, source, width)
    return writer


def read_manifest(address: str) -> Manifest | None:
    """Return the manifest of what a migration has written at ``address``, or None."""
    module, _ = _kind(address)
    if hasattr(module, "read_manifest"):
        found: Manifest | None = module.read_manifest(address)
        return found
    return files.read_manifest(_path(address))


def is_taken(address: str) -> bool:
    """Tell whether something stands at ``address``."""
    module, _ = _kind(address)
    return bool(module.exists(address)) if hasattr(module, "exists") else _path(address).exists()


def is_live(address: str) -> bool:
    """Tell whether others may write to such a store meanwhile."""
    module, name = _kind(address)
    return bool(getattr(module, f"{name}Store").live)


def _path(address: str) -> Path:
    return Path(address.partition("#")[0])


def _kind(address: Any) -> tuple[ModuleType, str]:
    address = str(address)
    scheme, separator, _ = address.partition("://")
    kinds, key = (_BY_SCHEME, scheme) if separator else (_BY_SUFFIX, _path(address).suffix)
    if key not in kinds:
        raise ValueError(f"address must be one of {_ADDRESSES}; got {address!r}")
    module, name = kinds[key]
    return importlib.import_module(f".{module}", __name__), name
