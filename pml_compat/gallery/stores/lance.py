"""A Lance dataset, a folder ``gallery.lance``, with a column of vectors; what other columns hold goes along.

``gallery.lance#column`` names the column of vectors, where it has another name than most.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from ..._extras import import_extra
from ..._files import whole_file
from ...data.parquet_columns import embedding_rows
from .base import Batch, Manifest, Store, Writer
from .files import partial_path, remove, write_manifest
from .npy import rows_of
from .overlay import Overlay
from .parquet import IDS, VECTORS

_AT_ONCE = 4096  # ids a filter
_REWRITTEN = 2**15  # rows at once


class LanceStore(Store):
    """See the module. The order is that of the rows, the version the latest one; blobs go along as plain binary."""

    def __init__(self, address: str) -> None:
        self.address = address
        place, _, column = address.partition("#")
        self.dataset = self._open(place)
        self.names = self.dataset.schema.names
        found = next((name for name in ((column,) if column else VECTORS) if name in self.names), None)
        if found is None:
            raise ValueError(
                f"{address} must have a column of vectors, {column or ' or '.join(VECTORS)}, it has {self.names}; name "
                f"it by {place}#COLUMN"
            )
        self.column, self.place = found, self.names.index(found)
        self.id_column = next((name for name in IDS if name in self.names), None)
        if not len(self):
            raise ValueError(f"{address} must hold vectors, it has no rows")
        rows = self._rows(self._read(columns=[self.column], limit=1), 0)
        self.width, self.dtype = rows.shape[1], rows.dtype if rows.dtype.kind == "f" else np.dtype(np.float32)
        if self.dataset.describe_indices():
            self.notes = ("Indices of the old dataset are not carried over.",)

    def _open(self, place: str) -> Any:
        return open_dataset(Path(place), "lance")

    def __len__(self) -> int:
        return int(self.dataset.count_rows())

    def batches(self, size: int, cursor: Any = None) -> Iterator[Batch]:
        """Yield rows after rows; a cursor is a row."""
        for start in range(cursor or 0, len(self), size):
            table = self._read(offset=start, limit=size)
            vectors = self._vectors(table, start)
            stop = start + len(table)
            ids = np.arange(start, stop) if self.id_column is None else self._ids(table)
            yield Batch(ids, vectors, table.drop_columns([self.column]), stop if stop < len(self) else None)

    def cursors(self, size: int) -> list[int]:
        """Return where each batch of this size begins."""
        return list(range(0, len(self), size))

    def counts(self, size: int) -> list[int]:
        """Return how many items each batch of this size has."""
        return [min(size, len(self) - start) for start in self.cursors(size)]

    def fetch(self, ids: np.ndarray) -> np.ndarray:
        """Return vectors; without ids their rows' numbers are meant."""
        if self.id_column is None:
            return self._vectors(self.dataset.take(ids.tolist(), columns=[self.column]), int(ids[0]))
        field = import_extra("pyarrow.compute", "lance").field(self.id_column)
        found = []
        for start in range(0, len(ids), _AT_ONCE):
            wanted = ids[start : start + _AT_ONCE]
            table = self._read(columns=[self.id_column, self.column], filter=field.isin(wanted.tolist()))
            if not len(table):
                raise ValueError(f"{self.address} must hold the ids asked for, it lacks {wanted[0]!r}")
            found.append(self._vectors(table, start)[rows_of(wanted, self._ids(table), self.address)])
        return np.concatenate(found)

    def _read(self, **what: Any) -> Any:
        try:
            return self.dataset.scanner(**what, blob_handling="all_binary").to_table()
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.address} must be a whole Lance dataset, it is not: {error}") from error

    def _rows(self, table: Any, row: int) -> np.ndarray:
        column = table[self.column]
        if column.null_count:
            row += int(column.is_null().to_numpy().argmax())
            raise ValueError(f"{self.address} must have a vector in every row, row {row} has none")
        return embedding_rows(column, self.address, self.column)

    def _vectors(self, table: Any, row: int) -> np.ndarray:
        rows = self._rows(table, row).astype(self.dtype, copy=False)
        if rows.shape[1] != self.width:
            raise ValueError(
                f"{self.address} must have vectors of one width, {self.width} in the first row, got {rows.shape[1]} "
                f"from row {row} on"
            )
        return rows

    def _ids(self, table: Any) -> np.ndarray:
        column = table[self.id_column]
        if column.null_count:
            raise ValueError(f"{self.address} must have an id in every row, {column.null_count} lack one")
        ids = column.to_numpy()
        return ids.astype(str) if ids.dtype == object else ids


class LanceWriter(Writer):
    """Writes a fragment a batch into a folder, and its description beside it; the end makes one version of them all.

    A fragment that a killed run has left without its description, or with one that is written over, belongs to no
    version, and is removed at the end.
    """

    extra = "lance"
    written_whole = True

    def __init__(self, address: str, source: Store, width: int) -> None:
        self.lance, self.arrow = import_extra("lance", self.extra), import_extra("pyarrow", self.extra)
        place, _, column = address.partition("#")
        self.path, self.width, self.source = self._path(place), width, source
        self.work = partial_path(self.path)
        self.batches = self.work / "batches"
        self.column = column or getattr(source, "column", None) or VECTORS[0]

    def _path(self, place: str) -> Path:
        return Path(place)

    def keep(self, manifest: Manifest) -> None:
        """Write the manifest beside the folder."""
        write_manifest(self.path, manifest)

    def commit(self, batch: Batch, manifest: Manifest) -> None:
        """Write one fragment, then its description, whole."""
        self.write_part(manifest["batches"] - 1, batch)
        self.keep(manifest)

    def part(self, number: int) -> Path:
        """Return where the description of a batch's fragment lies until all are there."""
        return self.batches / f"{number:06d}.json"

    def write_part(self, number: int, batch: Batch) -> None:
        """Write the fragment of a batch, then its description, whole; the first batch makes the dataset."""
        table = self._table(batch)
        dataset = self._dataset(table.schema)
        try:
            table = table.select(dataset.schema.names).cast(dataset.schema)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"batch {number} must have the columns of the first, {dataset.schema.names} of the same types: {error}"
            ) from error
        fragments = self.lance.fragment.write_fragments(table, dataset)
        self.batches.mkdir(exist_ok=True)
        with whole_file(self.part(number)) as temporary:
            temporary.write_text(json.dumps([one.to_json() for one in fragments]), encoding="utf-8")

    def _dataset(self, schema: Any) -> Any:
        """Return the dataset that fragments go to: version 1, without rows, keeps the columns and the format."""
        if not any(self.work.glob("_versions/*.manifest")):
            self.work.parent.mkdir(parents=True, exist_ok=True)
            version = getattr(getattr(self.source, "dataset", None), "data_storage_version", None)
            self.lance.write_dataset(schema.empty_table(), str(self.work), data_storage_version=version)
        return self.lance.dataset(str(self.work), version=1)

    def _table(self, batch: Batch) -> Any:
        """Return the payload's columns with the vectors in the place of the old ones."""
        values = self.arrow.array(np.ascontiguousarray(batch.vectors).ravel())
        vectors = self.arrow.FixedSizeListArray.from_arrays(values, self.width)
        table = self._payload(batch)
        old = getattr(self.source, "column", self.column)
        place = table.schema.get_field_index(old)
        if place < 0:
            place = getattr(self.source, "place", table.num_columns)
        table = table.drop_columns([name for name in {old, self.column} if name in table.column_names])
        return table.add_column(min(place, table.num_columns), self.column, vectors)

    def _payload(self, batch: Batch) -> Any:
        """Return tables as they are, and dicts, which may differ from item to item, as JSON in one column."""
        if isinstance(batch.payload, self.arrow.Table):
            return batch.payload.replace_schema_metadata(None)
        table = self.arrow.table({"id": batch.ids})
        if batch.payload is None:
            return table
        texts = [json.dumps(record, ensure_ascii=False, default=str) for record in batch.records()]
        return table.append_column("payload", self.arrow.array(texts, self.arrow.string()))

    def finish(self) -> None:
        """Make one version of all fragments, remove what belongs to none, and give the folder its name."""
        if not self.work.exists():
            return
        if self.batches.exists():
            dataset = self.lance.dataset(str(self.work))
            if dataset.version == 1:
                dataset = dataset.commit(str(self.work), self._fragments(), read_version=1)
            dataset.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)
            shutil.rmtree(self.batches)
        os.replace(self.work, self.path)

    def _fragments(self) -> Any:
        texts = [path.read_text(encoding="utf-8") for path in sorted(self.batches.glob("*.json"))]
        fragments = [one for text in texts for one in json.loads(text)]
        metadata = self.lance.fragment.FragmentMetadata
        return self.lance.LanceOperation.Append([metadata.from_json(json.dumps(one)) for one in fragments])

    def replace(self, ids: np.ndarray, vectors: np.ndarray, manifest: Manifest) -> None:
        """Write a version of the dataset with other vectors for some rows, remove the older ones, keep the manifest."""
        store = self.source
        if not isinstance(store, LanceStore):
            raise TypeError(f"source must be the dataset itself, got {type(store).__name__}")
        reader = self.arrow.RecordBatchReader.from_batches(store.dataset.schema, self._with_others(store, ids, vectors))
        new = self.lance.write_dataset(reader, str(self.path), mode="overwrite")
        new.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)
        self.keep(manifest)

    def _with_others(self, store: LanceStore, ids: np.ndarray, vectors: np.ndarray) -> Iterator[Any]:
        """Yield all rows of a store, with other vectors for some."""
        overlay = Overlay(ids, vectors)
        for batch in store.batches(_REWRITTEN):
            rows = overlay.on(batch)
            kind = store.dataset.schema.field(self.column).type
            values = self.arrow.array(rows.ravel(), kind.value_type)
            column = self.arrow.FixedSizeListArray.from_arrays(values, self.width).cast(kind)
            table = batch.payload.add_column(store.place, store.dataset.schema.field(self.column), column)
            yield from table.cast(store.dataset.schema).to_batches()
        overlay.check_all_found(str(self.path))

    def discard(self) -> None:
        """Remove the folder, what is unfinished, and the manifest."""
        remove(self.path)


def open_dataset(path: Path, extra: str) -> Any:
    """Open a dataset to read.

    Raises:
        FileNotFoundError: nothing is there.
        ImportError: pylance is not installed.
        ValueError: it is no Lance dataset, or a broken one.
    """
    lance = import_extra("lance", extra)
    if not path.exists():
        raise FileNotFoundError(f"there is no {str(path)!r}")
    try:
        return lance.dataset(str(path))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} must be a whole Lance dataset, it is not: {error}") from error
