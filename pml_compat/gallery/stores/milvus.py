"""A Milvus collection: ``milvus://host:19530/items``, or ``milvus:///folder/file.db/items`` of Milvus Lite.

``#field`` at the end names one of several fields of vectors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..._extras import import_extra
from .base import Batch, Manifest, Store, Writer
from .milvus_client import connect, parse, shown

_MANIFESTS = "pml_compat_manifests"  # a collection beside those that were written
_AT_ONCE, _BYTES_AT_ONCE = 4096, 2**24  # items a request, and bytes of their vectors
_FLOAT_VECTOR, _OTHER_VECTORS = 101, (100, 102, 103, 104, 105, 106)  # pymilvus.DataType
_ALWAYS = {"consistency_level": "Strong"}


class MilvusStore(Store):
    """See the module. The order is that of the primary key; other scalar fields, dynamic ones too, are the payload."""

    live = True

    def __init__(self, address: str) -> None:
        self.address = address
        place, local, self.collection, name = parse(address)
        if local and not Path(place).exists():  # Milvus Lite would make one
            raise FileNotFoundError(f"there is no {place!r}")
        self.client = connect(address)
        if not self.client.has_collection(self.collection):
            raise FileNotFoundError(f"there is no collection {self.collection!r} at {shown(address)}")
        self.description = self.client.describe_collection(self.collection)
        fields = self.description["fields"]
        self.key_field = next(field for field in fields if field.get("is_primary"))
        self.key = self.key_field["name"]
        vectors = [field for field in fields if field["type"] == _FLOAT_VECTOR]
        found = [field for field in vectors if field["name"] == name or (not name and len(vectors) == 1)]
        if not found:
            raise ValueError(
                f"{shown(address)} must name one of the collection's fields of float vectors, "
                f"{[field['name'] for field in vectors] or 'which has none'}, by #FIELD at its end"
            )
        self.column, self.width = found[0]["name"], int(found[0]["params"]["dim"])
        self.dtype = np.dtype(np.float32)
        self.scalars = [
            field
            for field in fields
            if not (field.get("is_primary") or field.get("is_function_output"))
            and field["type"] not in (_FLOAT_VECTOR, *_OTHER_VECTORS)
        ]
        others = {field["name"] for field in fields} - {self.key, *(field["name"] for field in self.scalars)}
        self.dropped = {self.key, *others}  # of a record, where it becomes a payload
        if len(others) > 1:
            self.notes = (f"Other vectors are not carried over: {', '.join(sorted(others - {self.column}))}.",)
        self.index = self._index()
        self.client.load_collection(self.collection)

    def _index(self) -> dict[str, Any]:
        for name in self.client.list_indexes(self.collection):
            index = self.client.describe_index(self.collection, name)
            if index and index["field_name"] == self.column:
                return dict(index)
        return {}

    def __len__(self) -> int:
        return int(self.client.query(self.collection, output_fields=["count(*)"], **_ALWAYS)[0]["count(*)"])

    def batches(self, size: int, cursor: Any = None) -> Iterator[Batch]:
        """Yield items in the order of the key; a cursor is the last key."""
        size = min(size, _at_once(self.width))
        while True:
            records = self._page(size + 1, cursor)
            records, more = records[:size], len(records) > size
            if not records:
                return
            keys = [record[self.key] for record in records]
            seen = keys if cursor is None else [cursor, *keys]
            if any(after <= before for before, after in pairwise(seen)):
                raise RuntimeError(f"{shown(self.address)} must give its items in the order of the key, it did not")
            cursor = keys[-1]
            vectors = np.array([record[self.column] for record in records], np.float32)
            payload = [{name: value for name, value in one.items() if name not in self.dropped} for one in records]
            yield Batch(np.array(keys), vectors, payload, cursor if more else None)
            if not more:
                return

    def _page(self, count: int, cursor: Any) -> list[Any]:
        """Return the first items after a key. Of all that is asked of Milvus, its iterator alone keeps an order."""
        after = None if cursor is None else f"{self.key} > {_literal(cursor)}"
        iterator = self.client.query_iterator(
            self.collection, batch_size=count, filter=after, output_fields=["*"], **_ALWAYS
        )
        try:
            return list(iterator.next())
        finally:
            iterator.close()

    def fetch(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors of some keys."""
        found = _records(self.client, self.collection, self.key, ids, [self.key, self.column], self.width)
        return np.array([found[one][self.column] for one in _all_found(found, ids, self.address)], np.float32)

    def known(self, ids: np.ndarray) -> np.ndarray:
        """Tell of each key whether there is such an item."""
        found = _records(self.client, self.collection, self.key, ids, [self.key], 1)
        return np.array([one in found for one in ids.tolist()], bool)


class MilvusWriter(Writer):
    """Writes a collection beside the old one, by the same keys, so that an item that is written twice is one.

    One of a Milvus collection has its scalar fields and its index; one of another store keeps the payload in a JSON
    field.
    """

    def __init__(self, address: str, source: Store, width: int) -> None:
        self.client, self.types = connect(address), import_extra("pymilvus", "milvus").DataType
        place, local, self.collection, name = parse(address)
        self.file = Path(place) if local else None
        self.address, self.source, self.width = address, source, width
        self.column = name or getattr(source, "column", "embedding")
        self.key = getattr(source, "key", None) or getattr(source, "id_column", None) or "id"
        self.dropped = {getattr(source, "column", self.column)}  # the old vectors, which some payloads have
        if self.client.has_collection(self.collection):
            self.client.load_collection(self.collection)  # a killed run of Milvus Lite leaves it unloaded

    def commit(self, batch: Batch, manifest: Manifest) -> None:
        """Upsert the items, then keep the manifest."""
        if self._is_missing(self.collection):
            self._create("U" if batch.ids.dtype.kind in "UO" else "i")
        if batch.ids.dtype.kind in "iu" and int(batch.ids.max()) >= 2**63:
            raise ValueError(f"ids of a Milvus collection must be text or below 2**63, got {int(batch.ids.max())}")
        there = _records(self.client, self.collection, self.key, batch.ids, [self.key], 1)
        batch = replace(batch, payload=batch.records())
        batch = batch.take(np.array([row for row, key in enumerate(batch.ids.tolist()) if key not in there], int))
        keys, payload = batch.ids.tolist(), batch.records()
        for part in _parts(len(keys), self.width):
            rows = zip(keys[part], batch.vectors[part].astype(np.float32).tolist(), payload[part], strict=True)
            self.client.upsert(self.collection, [self._row(*row) for row in rows])
        self.keep(manifest)

    def replace(self, ids: np.ndarray, vectors: np.ndarray, manifest: Manifest) -> None:
        """Upsert some items as they are but for their vectors, then keep the manifest."""
        for part in _parts(len(ids), self.width):
            found = _records(self.client, self.collection, self.key, ids[part], ["*"], self.width)
            keys = _all_found(found, ids[part], self.address)
            rows = zip(keys, vectors[part].astype(np.float32).tolist(), strict=True)
            self.client.upsert(self.collection, [found[key] | {self.column: vector} for key, vector in rows])
        self.keep(manifest)

    def _is_missing(self, collection: str) -> bool:
        """Tell whether a collection is to be made; remove what Milvus Lite leaves where it is killed in doing so."""
        if self.client.has_collection(collection):
            return False
        if self.file is not None:
            shutil.rmtree(self.file / "collections" / collection, ignore_errors=True)
        return True

    def _row(self, key: Any, vector: list[float], payload: dict[str, Any]) -> dict[str, Any]:
        row = {self.key: key, self.column: vector}
        if isinstance(self.source, MilvusStore):
            return payload | row
        kept = {name: value for name, value in payload.items() if name not in self.dropped}
        return row | {"payload": json.loads(json.dumps(kept, default=str))}

    def _create(self, kind: str) -> None:
        schema, index = self._schema(kind), self.client.prepare_index_params()
        old = getattr(self.source, "index", {})
        settings = {name: old[name] for name in ("M", "efConstruction", "nlist", "m", "nbits") if name in old}
        index.add_index(
            field_name=self.column,
            index_type=old.get("index_type", "AUTOINDEX"),
            metric_type=old.get("metric_type", "COSINE"),
            params=settings,
        )
        self.client.create_collection(self.collection, schema=schema, index_params=index, **_ALWAYS)

    def _schema(self, kind: str) -> Any:
        """Return the old collection's fields but for its vectors, or a key, a vector and a payload."""
        source = self.source
        if not isinstance(source, MilvusStore):
            schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field(self.key, *self._key_type(kind), is_primary=True, **self._key_length(kind))
            schema.add_field("payload", self.types.JSON, nullable=True)
        else:
            dynamic = bool(source.description.get("enable_dynamic_field"))
            schema = self.client.create_schema(auto_id=False, enable_dynamic_field=dynamic)
            for field in (source.key_field, *source.scalars):
                given = ("is_primary", "nullable", "element_type", "is_partition_key", "default_value")
                settings = {name: field[name] for name in given if field.get(name)} | field.get("params", {})
                schema.add_field(field["name"], self.types(field["type"]), **settings)
        schema.add_field(self.column, self.types.FLOAT_VECTOR, dim=self.width)
        return schema

    def _key_type(self, kind: str) -> tuple[Any]:
        return (self.types.VARCHAR if kind == "U" else self.types.INT64,)

    def _key_length(self, kind: str) -> dict[str, int]:
        return {"max_length": 65535} if kind == "U" else {}

    def keep(self, manifest: Manifest) -> None:
        """Keep the manifest in a collection of its own, which must have vectors as all have."""
        if self._is_missing(_MANIFESTS):
            schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field("collection", self.types.VARCHAR, is_primary=True, max_length=255)
            schema.add_field("manifest", self.types.JSON)
            schema.add_field("vector", self.types.FLOAT_VECTOR, dim=2)
            index = self.client.prepare_index_params()
            index.add_index(field_name="vector", index_type="AUTOINDEX", metric_type="L2")
            self.client.create_collection(_MANIFESTS, schema=schema, index_params=index, **_ALWAYS)
        row = {"collection": self.collection, "manifest": manifest, "vector": [0.0, 0.0]}
        self.client.upsert(_MANIFESTS, [row])

    def discard(self) -> None:
        """Drop the collection, then its manifest."""
        if self.client.has_collection(self.collection):
            self.client.drop_collection(self.collection)
        if self.client.has_collection(_MANIFESTS):
            self.client.delete(_MANIFESTS, filter=f"collection == {_literal(self.collection)}")


def read_manifest(address: str) -> Manifest | None:
    """Return the manifest of a collection, or None."""
    place, local, collection, _ = parse(address)
    if local and not Path(place).exists():
        return None
    client = connect(address)
    if not client.has_collection(_MANIFESTS):
        return None
    client.load_collection(_MANIFESTS)
    wanted = f"collection == {_literal(collection)}"
    found = client.query(_MANIFESTS, filter=wanted, output_fields=["manifest"], **_ALWAYS)
    return found[0]["manifest"] if found else None


def exists(address: str) -> bool:
    """Tell whether there is such a collection."""
    place, local, collection, _ = parse(address)
    return not (local and not Path(place).exists()) and bool(connect(address).has_collection(collection))


def _records(
    client: Any, collection: str, key: str, ids: np.ndarray, fields: list[str], width: int
) -> dict[Any, dict[str, Any]]:
    """Return what is there of some keys."""
    found: dict[Any, dict[str, Any]] = {}
    for part in _parts(len(ids), width):
        wanted = f"{key} in [{', '.join(map(_literal, ids[part].tolist()))}]"
        records = client.query(collection, filter=wanted, output_fields=fields, **_ALWAYS)
        found |= {record[key]: record for record in records}
    return found


def _all_found(found: dict[Any, Any], ids: np.ndarray, address: str) -> list[Any]:
    keys: list[Any] = ids.tolist()
    missing = [one for one in keys if one not in found]
    if missing:
        raise ValueError(f"{shown(address)} must hold the keys asked for, it lacks {missing[0]!r}")
    return keys


def _at_once(width: int) -> int:
    return max(1, min(_AT_ONCE, _BYTES_AT_ONCE // (4 * width)))


def _parts(count: int, width: int) -> Iterator[slice]:
    step = _at_once(width)
    return (slice(start, start + step) for start in range(0, count, step))


def _literal(key: Any) -> str:
    return json.dumps(key, ensure_ascii=False)
