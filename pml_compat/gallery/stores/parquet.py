"""A Parquet file, or a folder of them, with a column of vectors; what other columns hold goes along."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
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

VECTORS = ("embedding", "embeddings", "vector", "vectors", "values")
IDS = ("id", "ids", "_id", "pk", "uuid")


class ParquetStore(Store):
    """See the module. ``folder#column`` names the column of vectors, where it has another name than most."""

    def __init__(self, address: str) -> None:
        self.parquet = import_extra("pyarrow.parquet", "parquet")
        self.address = address
        place, _, column = address.partition("#")
        self.path = Path(place)
        self.files = parts_of(self.path)
        try:
            first = self.parquet.read_schema(self.files[0])
            self.sizes = [self.parquet.read_metadata(file).num_rows for file in self.files]
        except (ValueError, OSError) as error:
            raise ValueError(f"{address} must be whole Parquet files, they are not: {error}") from error
        found = _first(first.names, (column,) if column else VECTORS)
        if found is None:
            raise ValueError(
                f"{address} must have a column of vectors, {' or '.join(VECTORS)}, it has {first.names}; name it by "
                f"{place}#COLUMN"
            )
        self.column, self.id_column = found, _first(first.names, IDS)
        self.left_out = tuple(name for name in (self.column, self.id_column) if name is not None)
        self.schema = first
        if not len(self):
            raise ValueError(f"{address} must hold vectors, it has no rows")
        vectors = next(self._tables(1, 0, 0))[0]
        rows = embedding_rows(vectors[self.column], address, self.column)
        self.width, self.dtype = rows.shape[1], rows.dtype if rows.dtype.kind == "f" else np.dtype(np.float32)

    def __len__(self) -> int:
        return sum(self.sizes)

    def batches(self, size: int, cursor: Any = None) -> Iterator[Batch]:
        """Yield some row groups, or a part of a large one, after the other; a cursor is their number and a row."""
        for table, start, after in self._tables(size, *(cursor or (0, 0))):
            yield self.batch(table, start, after)

    def batch(self, table: Any, start: int, after: Any) -> Batch:
        """Return a table as a batch; ``start`` is its first row."""
        vectors = embedding_rows(table[self.column], self.address, self.column).astype(self.dtype, copy=False)
        if vectors.shape[1] != self.width:
            raise ValueError(
                f"{self.address} must have vectors of one width, {self.width} in the first row, got "
                f"{vectors.shape[1]} in row {start}"
            )
        return Batch(self._ids(table, start), vectors, table, after, self.left_out)

    def _ids(self, table: Any, start: int) -> np.ndarray:
        if self.id_column is None:
            return np.arange(start, start + len(table))
        ids = table[self.id_column].to_numpy()
        return ids.astype(str) if ids.dtype == object else ids

    def ids_of(self, number: int) -> np.ndarray:
        """Return the ids of a file, of which nothing else is read."""
        start = sum(self.sizes[:number])
        if self.id_column is None:
            return np.arange(start, start + self.sizes[number])
        return self._ids(self.parquet.read_table(self.files[number], columns=[self.id_column]), start)

    def cursors(self, size: int) -> list[list[int]]:
        """Return where each batch of this size begins, without reading any."""
        return [
            [number, start] for number, (*_, rows) in enumerate(self._pieces(size)) for start in range(0, rows, size)
        ]

    def counts(self, size: int) -> list[int]:
        """Return how many items each batch of this size has."""
        return [min(size, rows - start) for *_, rows in self._pieces(size) for start in range(0, rows, size)]

    def _tables(self, size: int, first: int, skipped: int) -> Iterator[tuple[Any, int, Any]]:
        """Yield tables, the number of their first row, and what comes after."""
        pieces = self._pieces(size)
        for number, (path, groups, start, rows) in list(enumerate(pieces))[first:]:
            following = [number + 1, 0] if number + 1 < len(pieces) else None
            offset = 0
            with self.parquet.ParquetFile(path) as file:
                if file.schema_arrow.names != self.schema.names:
                    raise ValueError(
                        f"{path} must have the columns of the first file, {self.schema.names}, got "
                        f"{file.schema_arrow.names}"
                    )
                whole = [file.read_row_groups(groups)] if rows <= size else ()
                for table in whole or map(self._table, file.iter_batches(size, row_groups=groups)):
                    end = offset + len(table)
                    if number > first or offset >= skipped:
                        yield table, start + offset, [number, end] if end < rows else following
                    offset = end

    def _pieces(self, size: int) -> list[tuple[Path, list[int], int, int]]:
        """Return what is read at once: a file, row groups of ``size`` rows together or one alone, first row, rows."""
        found: list[tuple[Path, list[int], int, int]] = []
        row = 0
        for path in self.files:
            metadata = self.parquet.read_metadata(path)
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                if found and found[-1][0] == path and found[-1][3] + rows <= size:
                    _, groups, start, held = found.pop()
                    found.append((path, [*groups, group], start, held + rows))
                elif rows:
                    found.append((path, [group], row, rows))
                row += rows
        return found

    def _table(self, batch: Any) -> Any:
        return import_extra("pyarrow", "parquet").Table.from_batches([batch])

    def fetch(self, ids: np.ndarray) -> np.ndarray:
        """Return vectors; the files are read through once."""
        found, wanted = np.empty((len(ids), self.width), self.dtype), np.asarray(ids)
        missing = np.ones(len(ids), bool)
        for batch in self.batches(2**16):
            here = np.isin(wanted, batch.ids)
            if here.any():
                found[here] = batch.vectors[rows_of(wanted[here], batch.ids, self.address)]
                missing &= ~here
            if not missing.any():
                return found
        raise ValueError(
            f"{self.address} must hold the ids asked for, it lacks {wanted[int(missing.argmax())].item()!r}"
        )


class ParquetWriter(Writer):
    """Writes a part a batch into a folder, which then takes its name; parts of a single file are joined at the end."""

    written_whole = True

    def __init__(self, address: str, source: Store, width: int) -> None:
        self.arrow, self.parquet = import_extra("pyarrow", "parquet"), import_extra("pyarrow.parquet", "parquet")
        self.path, self.width = Path(address.partition("#")[0]), width
        self.work = partial_path(self.path)
        self.column = address.partition("#")[2] or getattr(source, "column", None) or VECTORS[0]
        self.single = self.path.suffix in (".parquet", ".pq")

    def keep(self, manifest: Manifest) -> None:
        """Write the manifest beside the file."""
        write_manifest(self.path, manifest)

    def commit(self, batch: Batch, manifest: Manifest) -> None:
        """Write one part, whole, then the manifest."""
        self.write_part(manifest["batches"] - 1, batch)
        self.keep(manifest)

    def part(self, number: int) -> Path:
        """Return where the part of a batch lies until all are there."""
        return self.work / f"part-{number:06d}.parquet"

    def replace(self, ids: np.ndarray, vectors: np.ndarray, manifest: Manifest) -> None:
        """Write the files with these rows anew, each whole or not at all; keep the manifest."""
        store, overlay = ParquetStore(str(self.path)), Overlay(ids, vectors)
        for number, path in enumerate(store.files):
            row = sum(store.sizes[:number])
            if not np.isin(store.ids_of(number), overlay.ids).any():
                continue
            with (
                self.parquet.ParquetFile(path) as old,
                whole_file(path) as temporary,
                self.parquet.ParquetWriter(temporary, old.schema_arrow, compression="zstd") as new,
            ):
                for group in range(old.num_row_groups):
                    batch = store.batch(old.read_row_group(group), row, None)
                    row += len(batch.ids)
                    place = batch.payload.schema.get_field_index(store.column)
                    field = batch.payload.schema.field(place)
                    column = self._vectors(overlay.on(batch)).cast(field.type)
                    new.write_table(batch.payload.set_column(place, field, column))
        overlay.check_all_found(str(self.path))
        self.keep(manifest)

    def _vectors(self, rows: np.ndarray) -> Any:
        values = self.arrow.array(np.ascontiguousarray(rows).ravel(), self.arrow.from_numpy_dtype(rows.dtype))
        return self.arrow.FixedSizeListArray.from_arrays(values, self.width)

    def write_part(self, number: int, batch: Batch) -> None:
        """Write the part of a batch, whole or not at all."""
        self.work.mkdir(parents=True, exist_ok=True)
        vectors = self._vectors(batch.vectors)
        table = self._payload(batch)
        place = table.schema.get_field_index(self.column)
        if place < 0:
            table = table.append_column(self.column, vectors)
        else:
            table = table.set_column(place, self.column, vectors)
        with whole_file(self.part(number)) as temporary:
            self.parquet.write_table(table, temporary, compression="zstd", use_dictionary=False)

    def _payload(self, batch: Batch) -> Any:
        if isinstance(batch.payload, self.arrow.Table):
            table = batch.payload.replace_schema_metadata(None)
            old = [name for name in batch.left_out[:1] if name != self.column]  # the vectors, under another name
            return table.drop_columns(old)
        table = self.arrow.table({"id": batch.ids})
        if batch.payload is not None:
            rest = self.arrow.Table.from_pylist(batch.records())
            for name in rest.column_names:
                table = table.append_column(name, rest[name]) if name != "id" else table
        return table

    def finish(self) -> None:
        """Give the folder its name, or join its parts."""
        if self.work.exists():
            if self.single:
                if not self.path.exists():  # or a run was killed while it removed the parts of a whole file
                    self._join()
                shutil.rmtree(self.work)
            else:
                os.replace(self.work, self.path)

    def _join(self) -> None:
        parts = parts_of(self.work)
        schema = self.parquet.read_schema(parts[0])
        with (
            whole_file(self.path) as temporary,
            self.parquet.ParquetWriter(temporary, schema, compression="zstd") as out,
        ):
            for part in parts:
                out.write_table(self.parquet.read_table(part, schema=schema))

    def discard(self) -> None:
        """Remove the file or folder, and what is unfinished."""
        remove(self.path)


def parts_of(path: Path) -> list[Path]:
    """Return the file, or the files of the folder, in the order of their names.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: a folder without Parquet files.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {str(path)!r}")
    if path.is_file():
        return [path]
    found = sorted(part for part in path.rglob("*") if part.suffix in (".parquet", ".pq") and part.name[0] not in "._")
    if not found:
        raise ValueError(f"{path} must be a folder of .parquet files, it has none")
    return found


def _first(names: list[str], wanted: tuple[str, ...]) -> str | None:
    return next((name for name in wanted if name in names), None)
