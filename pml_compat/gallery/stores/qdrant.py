"""A Qdrant collection: ``qdrant://host:6333/items``, or ``qdrant:///folder/items`` in local mode, without a server.

``#name`` at the end names one of several named vectors.
"""

from __future__ import annotations

import atexit
import functools
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ..._extras import import_extra
from .base import Batch, Manifest, Store, Writer

_MANIFESTS = "pml_compat_manifests"  # a collection beside those that were written
_AT_ONCE = 256  # points a request


class QdrantStore(Store):
    """See the module. The order is that of the ids; payload goes along."""

    live = True

    def __init__(self, address: str) -> None:
        self.address = address
        self.client, self.collection, name = connect(address)
        if not self.client.collection_exists(self.collection):
            raise FileNotFoundError(f"there is no collection {self.collection!r} at {address}")
        self.config = self.client.get_collection(self.collection).config.params.vectors
        named = self.config if isinstance(self.config, dict) else {}
        self.name = name or (next(iter(named)) if len(named) == 1 else "")
        if self.name not in named if named else self.name:
            raise ValueError(
                f"{address} must name one of the collection's vectors, {sorted(named) or 'which has no names'}, by "
                "#NAME at its end"
            )
        parameters = named[self.name] if self.name else self.config
        self.width, self.distance = parameters.size, parameters.distance
        self.dtype = np.dtype(np.float32)
        if self.distance.value.lower() == "cosine":
            self.notes = ("Qdrant keeps vectors of a cosine collection at length 1.",)

    def __len__(self) -> int:
        return int(self.client.count(self.collection, exact=True).count)

    def batches(self, size: int, cursor: Any = None) -> Iterator[Batch]:
        """Yield points in the order of their ids; a cursor is the next id."""
        while True:
            records, after = self._scroll(size, cursor)
            if records:
                vectors = np.array([self._vector(one) for one in records], np.float32)
                ids = _as_ids([one.id for one in records])
                yield Batch(ids, vectors, [one.payload or {} for one in records], after)
            if after is None:
                return
            cursor = after

    def _scroll(self, size: int, cursor: Any) -> tuple[list[Any], Any]:
        found: list[Any] = []
        while len(found) < size:
            part, cursor = self.client.scroll(
                self.collection,
                limit=min(size - len(found), 4 * _AT_ONCE),
                offset=cursor,
                with_vectors=[self.name] if self.name else True,
                with_payload=True,
            )
            found += part
            if cursor is None:
                break
        return found, cursor

    def _vector(self, record: Any) -> Any:
        vector = record.vector[self.name] if self.name and record.vector else record.vector
        if vector is None or len(vector) == 0:
            raise ValueError(f"{self.address} must have a vector for every point, {record.id!r} has none")
        return vector

    def fetch(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors of points."""
        known = {}
        for start in range(0, len(ids), _AT_ONCE):
            part = ids[start : start + _AT_ONCE].tolist()
            for record in self.client.retrieve(self.collection, part, with_payload=False, with_vectors=True):
                known[str(record.id)] = self._vector(record)
        missing = [one for one in ids.tolist() if str(one) not in known]
        if missing:
            raise ValueError(f"{self.address} must hold the ids asked for, it lacks {missing[0]!r}")
        return np.array([known[str(one)] for one in ids.tolist()], np.float32)

    def known(self, ids: np.ndarray) -> np.ndarray:
        """Tell of each id whether there is such a point."""
        return _known(self.client, self.collection, ids)


class QdrantWriter(Writer):
    """Writes a collection beside the old one, by the same ids, so that a point that is written twice is one."""

    def __init__(self, address: str, source: Store, width: int) -> None:
        self.models = import_extra("qdrant_client.models", "qdrant")
        self.client, self.collection, self.name = connect(address)
        distance = getattr(source, "distance", self.models.Distance.COSINE)
        self.name = self.name or getattr(source, "name", "")
        parameters = self.models.VectorParams(size=width, distance=distance)
        self.config = {self.name: parameters} if self.name else parameters

    def commit(self, batch: Batch, manifest: Manifest) -> None:
        """Upsert the points, wait for them, then keep the manifest."""
        if not self.client.collection_exists(self.collection):
            self.client.create_collection(self.collection, vectors_config=self.config)
        _check_ids(batch.ids.tolist())
        batch = replace(batch, payload=batch.records())
        batch = batch.take(np.flatnonzero(~_known(self.client, self.collection, batch.ids)))
        ids, records = batch.ids.tolist(), batch.records()
        for start in range(0, len(ids), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            vectors = batch.vectors[part].tolist()
            named = [{self.name: vector} for vector in vectors] if self.name else vectors
            points = self.models.Batch(ids=ids[part], vectors=_columns(named), payloads=records[part])
            self.client.upsert(self.collection, points=points, wait=True)
        self.keep(manifest)

    def replace(self, ids: np.ndarray, vectors: np.ndarray, manifest: Manifest) -> None:
        """Give some points other vectors, wait for it, then keep the manifest."""
        known = _known(self.client, self.collection, ids)
        if not known.all():
            missing = ids[known.argmin()].item()
            raise ValueError(f"{self.collection} must hold the ids that are asked for, it lacks {missing!r}")
        rows = [{self.name: row} if self.name else row for row in vectors.tolist()]
        points = [self.models.PointVectors(id=one, vector=row) for one, row in zip(ids.tolist(), rows, strict=True)]
        self.client.update_vectors(self.collection, points=points, wait=True)
        self.keep(manifest)

    def keep(self, manifest: Manifest) -> None:
        """Keep the manifest, as a point's payload."""
        if not self.client.collection_exists(_MANIFESTS):
            one = self.models.VectorParams(size=1, distance=self.models.Distance.DOT)
            self.client.create_collection(_MANIFESTS, vectors_config=one)
        point = self.models.PointStruct(id=_key(self.collection), vector=[0.0], payload=manifest)
        self.client.upsert(_MANIFESTS, points=[point], wait=True)

    def discard(self) -> None:
        """Delete the collection, then its manifest."""
        self.client.delete_collection(self.collection)
        if self.client.collection_exists(_MANIFESTS):
            self.client.delete(_MANIFESTS, points_selector=self.models.PointIdsList(points=[_key(self.collection)]))


def read_manifest(address: str) -> Manifest | None:
    """Return the manifest of a collection, or None."""
    client, collection, _ = connect(address)
    if not client.collection_exists(_MANIFESTS):
        return None
    found = client.retrieve(_MANIFESTS, [_key(collection)])
    return found[0].payload if found else None


def exists(address: str) -> bool:
    """Tell whether there is such a collection."""
    client, collection, _ = connect(address)
    return bool(client.collection_exists(collection))


def connect(address: str) -> tuple[Any, str, str]:
    """Return a client, the collection's name and that of its vectors.

    Raises:
        ImportError: qdrant-client is not installed.
        ValueError: an address without a collection.
    """
    import_extra("qdrant_client", "qdrant")
    parts = urlsplit(address)
    folder, _, collection = parts.path.rpartition("/")
    if not collection or not (folder or parts.hostname):
        raise ValueError(
            f"address must be qdrant://HOST:PORT/COLLECTION, or qdrant:///FOLDER/COLLECTION, got {address!r}"
        )
    place = folder if not parts.hostname else f"{parts.hostname}:{parts.port or 6333}"
    return _client(place, not parts.hostname), collection, parts.fragment


@functools.cache  # one a place: the local mode locks its folder
def _client(place: str, local: bool) -> Any:
    module = import_extra("qdrant_client", "qdrant")
    client = module.QdrantClient(path=place) if local else module.QdrantClient(url=f"http://{place}")
    atexit.register(client.close)
    return client


def _known(client: Any, collection: str, ids: np.ndarray) -> np.ndarray:
    found = set()
    for start in range(0, len(ids), 4 * _AT_ONCE):
        part = ids[start : start + 4 * _AT_ONCE].tolist()
        found |= {str(one.id) for one in client.retrieve(collection, part, with_payload=False, with_vectors=False)}
    return np.array([str(one) in found for one in ids.tolist()], bool)


def _columns(vectors: list[Any]) -> Any:
    """Return named vectors name by name, as a batch has them."""
    if not isinstance(vectors[0], dict):
        return vectors
    return {name: [one[name] for one in vectors] for name in vectors[0]}


def _as_ids(ids: list[Any]) -> np.ndarray:
    numbers = all(isinstance(one, int) for one in ids)
    return np.array(ids, np.uint64 if numbers else np.str_)


def _check_ids(ids: list[Any]) -> None:
    for one in ids:
        if isinstance(one, str):
            try:
                uuid.UUID(one)
            except ValueError:
                raise ValueError(f"ids of a Qdrant collection must be numbers or UUIDs, got {one!r}") from None


def _key(collection: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, collection))
