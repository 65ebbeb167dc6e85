"""New vectors of old items, kept as they are made: one SQLite file that survives a crash."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

_FORMAT = "pml_compat.VectorCache/1"
_AT_ONCE = 500  # ids in one question; SQLite takes 999 at least


class VectorCache:
    """Vectors by item id, on disk; what is added is there after a crash, and other processes may read and add.

    Args:
        path: of the file, made where there is none; ``":memory:"`` keeps them in this process alone.
        fingerprint: :func:`~pml_compat.frozen.model_fingerprint` of the model that makes the vectors. A file of
            another model is refused: its vectors would be compared with those of this one.
    Raises:
        ValueError: no file of this class, or one of another model; in a call: ids that are no integers or strings, a
            NaN or infinity, another width than before.
    Example:
        >>> cache = VectorCache(":memory:")
        >>> cache.add([3, 7], np.eye(2, dtype=np.float32))
        >>> known, vectors = cache.get([7, 9])
        >>> known.tolist(), vectors.tolist()
        ([True, False], [[0.0, 1.0]])
    """

    def __init__(self, path: str | os.PathLike[str], *, fingerprint: str | None = None) -> None:
        self.path = os.fspath(path)
        try:
            self.database = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
        except sqlite3.OperationalError as error:
            raise ValueError(f"path must be a file of VectorCache, {self.path!r} is not: {error}") from error
        self.lock = threading.Lock()
        try:
            with self.database:
                self.database.execute("BEGIN IMMEDIATE")  # of several that open a new file one makes the tables
                self._check_format()
                self.database.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT)")
                self.database.execute("CREATE TABLE IF NOT EXISTS vectors (id PRIMARY KEY, vector BLOB) WITHOUT ROWID")
                self.database.execute("INSERT OR IGNORE INTO meta VALUES ('format', ?)", (_FORMAT,))
                self._check_fingerprint(fingerprint)
            with suppress(sqlite3.OperationalError):  # another one is at it
                self.database.execute("PRAGMA journal_mode=WAL")
        except sqlite3.DatabaseError as error:
            self.database.close()
            raise ValueError(f"path must be a file of VectorCache, {self.path!r} is not: {error}") from error
        except ValueError:
            self.database.close()
            raise

    @property
    def width(self) -> int | None:
        """The width of the vectors; None while there is none."""
        found = self._meta("width")
        return None if found is None else int(found)

    @property
    def fingerprint(self) -> str | None:
        """Of the model that made them."""
        return self._meta("fingerprint")

    def __len__(self) -> int:
        return int(self.database.execute("SELECT COUNT(*) FROM vectors").fetchone()[0])

    def get(self, ids: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Return which ids are there, ``(n,)`` bool, and the vectors of those that are, ``(k, width)`` float32."""
        keys = [_key(value) for value in ids]
        found: dict[Any, bytes] = {}
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            marks = ",".join("?" * len(some))
            with self.lock:
                found.update(self.database.execute(f"SELECT id, vector FROM vectors WHERE id IN ({marks})", some))
        known = np.array([key in found for key in keys], dtype=bool)
        rows = [np.frombuffer(found[key], dtype=np.float32) for key in keys if key in found]
        return known, np.stack(rows) if rows else np.empty((0, self.width or 0), dtype=np.float32)

    def add(self, ids: Sequence[Any], vectors: Any) -> None:
        """Keep vectors ``(n, width)``, all or none; one that is there already is replaced."""
        keys = [_key(value) for value in ids]
        rows = np.ascontiguousarray(vectors, dtype=np.float32)
        if rows.ndim != 2 or len(rows) != len(keys) or rows.shape[1] == 0:
            raise ValueError(f"vectors must be one row an id, ({len(keys)}, width), got shape {rows.shape}")
        if not np.isfinite(rows).all():
            bad = int((~np.isfinite(rows)).any(1).argmax())
            raise ValueError(f"vectors must be finite, the row of id {ids[bad]!r} has a NaN or an infinity")
        if not len(keys):
            return
        with self.lock, self.database:
            self.database.execute("INSERT OR IGNORE INTO meta VALUES ('width', ?)", (str(rows.shape[1]),))
            if self.width != rows.shape[1]:
                raise ValueError(
                    f"vectors must be {self.width} wide, as those that are kept, got width {rows.shape[1]}"
                )
            pairs = zip(keys, (row.tobytes() for row in rows), strict=True)
            self.database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", pairs)

    def ids(self) -> list[Any]:
        """Return the ids that are there: what a backfill need not embed any more."""
        return [row[0] for row in self.database.execute("SELECT id FROM vectors ORDER BY id")]

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    def __enter__(self) -> VectorCache:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _meta(self, name: str) -> str | None:
        row = self.database.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def _check_format(self) -> None:
        """Refuse another program's database before a table is made in it."""
        tables = {name for (name,) in self.database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            return
        found = self._meta("format") if "meta" in tables else None
        if found != _FORMAT:
            raise ValueError(f"path must be a file of VectorCache, {self.path!r} is of {found!r}")

    def _check_fingerprint(self, given: str | None) -> None:
        if given is None:
            return
        kept = self.fingerprint
        if kept is None and len(self):
            raise ValueError(
                f"fingerprint must be None for {self.path!r}, whose vectors were kept without one, got {given!r}; "
                "delete the file, its vectors are made again"
            )
        if kept is not None and kept != given:
            raise ValueError(
                f"fingerprint must be that of the model whose vectors {self.path!r} keeps, {kept!r}, got {given!r}; "
                "take another file for another model"
            )
        self.database.execute("INSERT OR REPLACE INTO meta VALUES ('fingerprint', ?)", (given,))


def _key(value: Any) -> int | str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return int(value)
    raise ValueError(f"ids must be integers of 64 bits or strings, got {value!r}")
