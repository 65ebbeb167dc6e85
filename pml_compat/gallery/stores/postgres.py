"""A PostgreSQL table with a pgvector column: ``postgresql://user@host/database/table#column``.

A new store is another column of the same table, or a table of its own with the key, the vector and the payload.
"""

from __future__ import annotations

import atexit
import json
import os
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from ..._extras import import_extra
from .base import Batch, Manifest, Store, Writer

_MANIFESTS = "pml_compat_manifests"
_TYPES = {"vector": np.float32, "halfvec": np.float16}
_OPEN: dict[tuple[str, int], Any] = {}  # connections of this process, by their addresses


class PostgresStore(Store):
    """See the module. The order is that of the primary key; other columns are the payload."""

    live = True

    def __init__(self, address: str) -> None:
        self.address = address
        self.connection, self.table, self.column = connect(address)
        self.sql = import_extra("psycopg.sql", "postgres")
        columns = _columns(self.connection, self.table)
        if not columns:
            raise FileNotFoundError(f"there is no table {self.table!r} at {_shown(address)}")
        vectors = [name for name, kind in columns.items() if kind.split("(")[0] in _TYPES]
        if self.column not in vectors:
            raise ValueError(
                f"{_shown(address)} must name a column of vectors by #COLUMN, got {self.column!r}; the table has "
                f"{vectors or 'none'}"
            )
        self.key = _primary_key(self.connection, self.table)
        if self.key is None:
            raise ValueError(f"the table of {_shown(address)} must have a primary key of one column")
        self.kind = columns[self.column].split("(")[0]
        self.key_kind = columns[self.key]
        self.payload_columns = [name for name in columns if name not in (self.key, *vectors)]
        self.dtype = np.dtype(_TYPES[self.kind])
        width = self._one("SELECT vector_dims({column}) FROM {table} WHERE {column} IS NOT NULL LIMIT 1")
        if width is None:
            raise ValueError(f"{_shown(address)} must hold vectors, it has none")
        self.width = int(width)

    def __len__(self) -> int:
        return int(self._one("SELECT count(*) FROM {table} WHERE {column} IS NOT NULL"))

    def _format(self, text: str) -> Any:
        return self.sql.SQL(text).format(**_names(self.sql, self.table, self.column, self.key or ""))

    def _one(self, text: str) -> Any:
        row = self.connection.execute(self._format(text)).fetchone()
        return None if row is None else row[0]

    def batches(self, size: int, cursor: Any = None) -> Iterator[Batch]:
        """Yield rows in the order of the key; a cursor is the last key."""
        rest = "".join(f", {{p{number}}}" for number in range(len(self.payload_columns)))
        names = {f"p{number}": self.sql.Identifier(name) for number, name in enumerate(self.payload_columns)}
        names |= _names(self.sql, self.table, self.column, self.key or "")
        while True:
            where = "" if cursor is None else f" AND {{key}} > %s::{self.key_kind}"
            text = f"SELECT {{key}}, {{column}}{rest} FROM {{table}} WHERE {{column}} IS NOT NULL{where}"
            query = self.sql.SQL(text + " ORDER BY {key} LIMIT %s").format(**names)
            arguments = [size + 1] if cursor is None else [cursor, size + 1]
            with self.connection.cursor(binary=True) as reading:
                rows = reading.execute(query, arguments).fetchall()
            rows, more = rows[:size], len(rows) > size
            if not rows:
                return
            cursor = _as_json(rows[-1][0])
            vectors = np.stack([_numbers(row[1]) for row in rows]).astype(self.dtype, copy=False)
            payload = [dict(zip(self.payload_columns, row[2:], strict=True)) for row in rows]
            yield Batch(_as_ids([row[0] for row in rows]), vectors, payload, cursor if more else None)
            if not more:
                return

    def fetch(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors of some keys."""
        query = self._format(f"SELECT {{key}}, {{column}} FROM {{table}} WHERE {{key}} = ANY(%s::{self.key_kind}[])")
        with self.connection.cursor(binary=True) as reading:
            rows = reading.execute(query, [ids.tolist()]).fetchall()
        known = {str(key): _numbers(vector) for key, vector in rows if vector is not None}
        missing = [one for one in ids.tolist() if str(one) not in known]
        if missing:
            raise ValueError(f"{_shown(self.address)} must hold the keys asked for, it lacks {missing[0]!r}")
        return np.stack([known[str(one)] for one in ids.tolist()]).astype(self.dtype, copy=False)

    def known(self, ids: np.ndarray) -> np.ndarray:
        """Tell of each key whether it has a vector."""
        where = f"{{key}} = ANY(%s::{self.key_kind}[]) AND {{column}} IS NOT NULL"
        rows = self.connection.execute(self._format(f"SELECT {{key}} FROM {{table}} WHERE {where}"), [ids.tolist()])
        found = {str(key) for (key,) in rows.fetchall()}
        return np.array([str(one) in found for one in ids.tolist()], bool)


class PostgresWriter(Writer):
    """Writes rows and the manifest in one transaction: a batch is there with its place, or not at all."""

    def __init__(self, address: str, source: Store, width: int) -> None:
        self.sql = import_extra("psycopg.sql", "postgres")
        self.json = import_extra("psycopg.types.json", "postgres")
        self.connection, self.table, self.column = connect(address)
        self.address, self.width = address, width
        self.kind = getattr(source, "kind", "vector")
        beside = isinstance(source, PostgresStore) and _same_table(source.address, address)
        self.column_alone = beside
        self.key = source.key if isinstance(source, PostgresStore) else "id"
        self.key_kind = getattr(source, "key_kind", None)
        self.names = _names(self.sql, self.table, self.column, self.key or "id")

    def _run(self, text: str, arguments: Any = None) -> Any:
        return self.connection.execute(self.sql.SQL(text).format(**self.names), arguments)

    def commit(self, batch: Batch, manifest: Manifest) -> None:
        """Write a batch and the manifest, both or neither."""
        with self.connection.transaction():
            self._create(self._key_kind(batch.ids))
            self._send(batch, with_payload=not self.column_alone)
            if self.column_alone:
                self._run("UPDATE {table} SET {column} = v FROM rows_to_write WHERE {key} = k AND {column} IS NULL")
            else:
                self._run(
                    "INSERT INTO {table} ({key}, {column}, payload) SELECT k, v, payload FROM rows_to_write "
                    "ON CONFLICT ({key}) DO NOTHING"
                )
            self._keep(manifest)

    def replace(self, ids: np.ndarray, vectors: np.ndarray, manifest: Manifest) -> None:
        """Give some rows other vectors and keep the manifest, both or neither."""
        with self.connection.transaction():
            self._send(Batch(ids, vectors, None, None), with_payload=False)
            done = self._run("UPDATE {table} SET {column} = v FROM rows_to_write WHERE {key} = k")
            if done.rowcount != len(ids):
                raise ValueError(
                    f"{self.table} must hold the keys that are asked for, it lacks {len(ids) - done.rowcount}"
                )
            self._keep(manifest)

    def _key_kind(self, ids: np.ndarray) -> str:
        return self.key_kind or ("text" if ids.dtype.kind == "U" else "bigint")

    def _send(self, batch: Batch, *, with_payload: bool) -> None:
        """Copy a batch into a table that lives as long as the transaction."""
        key_kind = self._key_kind(batch.ids)
        vectors = import_extra("pgvector", "postgres")
        make = vectors.HalfVector if self.kind == "halfvec" else vectors.Vector
        kept = ", payload jsonb" if with_payload else ""
        self._run(f"CREATE TEMP TABLE rows_to_write (k {key_kind}, v {self.kind}{kept}) ON COMMIT DROP")
        copy = "COPY rows_to_write FROM STDIN WITH (FORMAT BINARY)"
        with self.connection.cursor() as writing, writing.copy(copy) as rows:
            rows.set_types([key_kind, self.kind] + (["jsonb"] if with_payload else []))
            for key, vector, payload in zip(batch.ids.tolist(), batch.vectors, batch.records(), strict=True):
                own = uuid.UUID(key) if key_kind == "uuid" else key
                rows.write_row((own, make(vector), self._payload(payload)) if with_payload else (own, make(vector)))

    def _payload(self, payload: dict[str, Any]) -> Any:
        return self.json.Jsonb(payload, dumps=lambda value: json.dumps(value, default=str))

    def _create(self, key_kind: str) -> None:
        if self.column_alone:
            self._run(f"ALTER TABLE {{table}} ADD COLUMN IF NOT EXISTS {{column}} {self.kind}({self.width})")
        else:
            columns = f"{{key}} {key_kind} PRIMARY KEY, {{column}} {self.kind}({self.width}), payload jsonb"
            self._run(f"CREATE TABLE IF NOT EXISTS {{table}} ({columns})")

    def _keep(self, manifest: Manifest) -> None:
        self._run(f"CREATE TABLE IF NOT EXISTS {_MANIFESTS} (place text PRIMARY KEY, manifest jsonb)")
        self._run(
            f"INSERT INTO {_MANIFESTS} VALUES (%s, %s) ON CONFLICT (place) DO UPDATE SET manifest = EXCLUDED.manifest",
            [f"{self.table}#{self.column}", self.json.Jsonb(manifest)],
        )

    def keep(self, manifest: Manifest) -> None:
        """Keep the manifest in a table of its own."""
        with self.connection.transaction():
            self._keep(manifest)

    def discard(self) -> None:
        """Drop the column or the table, and the manifest."""
        with self.connection.transaction():
            if self.column_alone or _is_beside(self.connection, self.table, self.column):
                self._run("ALTER TABLE {table} DROP COLUMN IF EXISTS {column}")
            else:
                self._run("DROP TABLE IF EXISTS {table}")
            self._run(f"DELETE FROM {_MANIFESTS} WHERE place = %s", [f"{self.table}#{self.column}"])


def read_manifest(address: str) -> Manifest | None:
    """Return the manifest of a column, or None."""
    connection, table, column = connect(address)
    if not _columns(connection, _MANIFESTS):
        return None
    text = f"SELECT manifest FROM {_MANIFESTS} WHERE place = %s"
    row = connection.execute(text, [f"{table}#{column}"]).fetchone()
    return None if row is None else row[0]


def exists(address: str) -> bool:
    """Tell whether there is such a column."""
    connection, table, column = connect(address)
    return column in _columns(connection, table)


def connect(address: str) -> tuple[Any, str, str]:
    """Return a connection, the table and the column.

    Raises:
        ImportError: psycopg or pgvector is not installed.
        ValueError: an address without a table or a column; a database without pgvector.
    """
    psycopg, pgvector = import_extra("psycopg", "postgres"), import_extra("pgvector.psycopg", "postgres")
    parts = urlsplit(address)
    database, _, table = parts.path.rpartition("/")
    if not table or not parts.fragment:
        raise ValueError(f"address must be postgresql://HOST/DATABASE/TABLE#COLUMN, got {_shown(address)!r}")
    key = urlunsplit(parts._replace(path=database, fragment="")), os.getpid()
    connection = _OPEN.get(key)
    if connection is None or connection.closed:
        try:
            connection = psycopg.connect(key[0], autocommit=True)
        except psycopg.OperationalError as error:
            raise ConnectionError(f"{_shown(address)} does not answer: {error}") from error
        atexit.register(connection.close)
        _OPEN[key] = connection
    try:
        pgvector.register_vector(connection)
    except psycopg.ProgrammingError as error:
        raise ValueError(f"{_shown(address)} must have pgvector: run CREATE EXTENSION vector there") from error
    return connection, table, parts.fragment


def _names(sql: Any, table: str, column: str, key: str) -> dict[str, Any]:
    return {"table": sql.Identifier(*table.split(".")), "column": sql.Identifier(column), "key": sql.Identifier(key)}


def _columns(connection: Any, table: str) -> dict[str, str]:
    """Return the columns of a table and their types; none where there is no such table."""
    text = (
        "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute "
        "WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
    )
    return dict(connection.execute(text, [_quoted(table)]).fetchall())


def _primary_key(connection: Any, table: str) -> str | None:
    text = (
        "SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY(i.indkey) "
        "WHERE i.indrelid = to_regclass(%s) AND i.indisprimary"
    )
    rows = connection.execute(text, [_quoted(table)]).fetchall()
    return rows[0][0] if len(rows) == 1 else None


def _is_beside(connection: Any, table: str, column: str) -> bool:
    """Tell whether a table has other vectors than this column's, or other columns than a table of ours."""
    others = set(_columns(connection, table)) - {column, "payload"}
    return len(others) > 1


def _quoted(table: str) -> str:
    return ".".join('"' + part.replace('"', '""') + '"' for part in table.split("."))


def _same_table(first: str, second: str) -> bool:
    one, two = (urlsplit(address)._replace(fragment="") for address in (first, second))
    return one == two


def _shown(address: str) -> str:
    """Return an address without its password."""
    parts = urlsplit(address)
    return address.replace(f":{parts.password}@", ":***@") if parts.password else address


def _numbers(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.to_numpy()


def _as_ids(keys: list[Any]) -> np.ndarray:
    return np.array([_as_json(key) for key in keys])


def _as_json(key: Any) -> Any:
    return key if isinstance(key, int | str) else str(key)
