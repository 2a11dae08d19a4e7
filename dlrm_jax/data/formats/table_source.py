"""Parquet files, row group by row group, and tables that are in memory already."""

import functools
import pathlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlrm_jax.data.formats.column_types import plain, require_usable
from dlrm_jax.data.formats.source import BadRow, Chunk, Columns, Position, refuse, require_columns
from dlrm_jax.data.schema.schema import Schema

_CHUNK_ROWS = 32_768


class ParquetSource:
    """Rows of Parquet files."""

    def __init__(self, paths: tuple[str, ...], schema: Schema) -> None:
        self.paths = paths
        self.num_bytes = sum(pathlib.Path(path).stat().st_size for path in paths)
        self._needed, self._roles = schema.source_columns(), schema.roles()

    def chunks(self, start: Position) -> Iterator[Chunk]:
        """Chunks from `start` on; offsets count rows."""
        done = sum(pathlib.Path(path).stat().st_size for path in self.paths[: start.file])
        for file in range(start.file, len(self.paths)):
            path = self.paths[file]
            size = pathlib.Path(path).stat().st_size
            first = start.offset if file == start.file else 0
            try:
                yield from self._file_chunks(file, path, first, done, size)
            except (pa.ArrowException, OSError) as error:
                refuse(path, error)
            done += size

    def _file_chunks(self, file: int, path: str, first: int, done: int, size: int) -> Iterator[Chunk]:
        with pq.ParquetFile(path) as parquet:
            require_columns(path, parquet.schema_arrow.names, self._needed)
            kinds = {name: parquet.schema_arrow.field(name).type for name in self._needed}
            require_usable(path, kinds, self._roles)
            num_rows, row = parquet.metadata.num_rows, 0
            for group in range(parquet.num_row_groups):
                rows_in_group = parquet.metadata.row_group(group).num_rows
                if row + rows_in_group <= first:
                    row += rows_in_group
                    continue
                for batch in parquet.iter_batches(_CHUNK_ROWS, row_groups=[group], columns=self._needed):
                    row += batch.num_rows
                    if row > first:
                        yield _chunk(file, batch, row, done + size * row // max(num_rows, 1))


class TableSource:
    """Rows of one table in memory, which a reader made of `path`.

    `row_R` numbers them as the log does, where they do not stand in its order.
    """

    def __init__(self, path: str, table: pa.Table, schema: Schema, row_R: np.ndarray | None = None) -> None:
        self.paths, self.num_bytes = (path,), table.nbytes
        require_columns(path, table.column_names, schema.source_columns())
        self._table = table.select(schema.source_columns())
        self._row_R = np.arange(len(table)) if row_R is None else row_R
        require_usable(path, {field.name: field.type for field in self._table.schema}, schema.roles())

    def chunks(self, start: Position) -> Iterator[Chunk]:
        """Chunks from `start` on; offsets count rows."""
        for first in range(start.offset, len(self._table), _CHUNK_ROWS):
            part = self._table.slice(first, _CHUNK_ROWS)
            row = first + len(part)
            batch = part.combine_chunks().to_batches()[0]
            yield _chunk(0, batch, row, self.num_bytes * row // len(self._table), self._row_R[first:row] - first)


def _chunk(file: int, batch: pa.RecordBatch, end_row: int, done: int, row_R: np.ndarray | None = None) -> Chunk:
    parse = functools.partial(_columns, batch, end_row - batch.num_rows, row_R)
    return Chunk(file, Position(file, end_row), done, parse)


def _columns(batch: pa.RecordBatch, first_row: int, row_R: np.ndarray | None) -> Columns:
    arrays = {name: plain(batch.column(name)) for name in batch.schema.names}
    bad = _undecodable(arrays, first_row)
    rows = np.delete(np.arange(batch.num_rows), [wrong.row for wrong in bad])
    if bad:
        arrays = {name: array.take(pa.array(rows)) for name, array in arrays.items()}
    numbers = rows if row_R is None else row_R[rows]
    return Columns(arrays, numbers, batch.num_rows, bad, lambda row: first_row + row, "row")


def _undecodable(arrays: dict[str, pa.Array], first_row: int) -> list[BadRow]:
    """The rows in which a text is no UTF-8, which Parquet's reader does not ask."""
    bad: dict[int, BadRow] = {}
    for name, array in arrays.items():
        try:
            array.validate(full=True)
        except pa.ArrowInvalid:
            for row in range(len(array)):
                try:
                    array[row].as_py()
                except UnicodeDecodeError as error:
                    reason = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
                    bad.setdefault(row, BadRow(row, first_row + row, reason, name, unit="row"))
    return [bad[row] for row in sorted(bad)]
