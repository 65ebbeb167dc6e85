"""Addresses of Milvus, and the clients that answer there."""

from __future__ import annotations

import atexit
import functools
import logging
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..._extras import import_extra


def parse(address: str) -> tuple[str, bool, str, str]:
    """Return a file or a server's address, whether it is a file, the collection's name and that of its vectors.

    Raises:
        ValueError: an address without a collection.
    """
    parts = urlsplit(address)
    file, _, collection = parts.path.rpartition("/")
    local = not parts.hostname
    if not collection or (not file.endswith(".db") if local else file):
        raise ValueError(
            "address must be milvus://HOST:19530/COLLECTION, or milvus:///FOLDER/FILE.db/COLLECTION, got "
            f"{shown(address)!r}"
        )
    return file if local else f"http://{parts.hostname}:{parts.port or 19530}", local, collection, parts.fragment


def connect(address: str) -> Any:
    """Return a client.

    Raises:
        ConnectionError: no server answers, or another process has the file open.
        ImportError: pymilvus is not installed, or milvus-lite for a file.
    """
    place, local, *_ = parse(address)
    parts = urlsplit(address)
    token = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else ""
    pymilvus = import_extra("pymilvus", "milvus")
    if local:
        import_extra("milvus_lite", "milvus")
        Path(place).parent.mkdir(parents=True, exist_ok=True)
    try:
        return _client(place, token)
    except pymilvus.MilvusException as error:
        why = "another process has it open, or it is no file of Milvus Lite" if local else str(error)
        raise ConnectionError(f"{shown(address)} does not answer: {why}") from error


@functools.cache  # one a place: Milvus Lite locks its file
def _client(place: str, token: str) -> Any:
    client = import_extra("pymilvus", "milvus").MilvusClient(uri=place, token=token)
    # Milvus Lite has no time stamps; pymilvus says so once a page.
    log = logging.getLogger("pymilvus.client.iterator.query_iterator")
    log.addFilter(lambda record: "mvccTs" not in record.getMessage())
    atexit.register(client.close)
    return client


def shown(address: str) -> str:
    """Return an address without its password."""
    password = urlsplit(address).password
    return address.replace(f":{password}@", ":***@") if password else address
