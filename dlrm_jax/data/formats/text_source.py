"""Delimited text and JSON lines, plain or compressed: cut into chunks of whole records, parsed by pyarrow or json."""

import functools
import io
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from pyarrow import csv

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats.encoding import BYTE_ORDER_MARK, UTF8, describe_wrong
from dlrm_jax.data.formats.json_lines import parse_json
from dlrm_jax.data.formats.records import (
    CHUNK_BYTES,
    open_binary,
    read_head,
    record_end,
    record_starts,
    skip,
    to_line_end,
)
from dlrm_jax.data.formats.source import BadRow, Chunk, Columns, Position, refuse, require_columns
from dlrm_jax.data.schema.schema import Schema

MAX_RECORD_BYTES = 64 << 20


class TextSource:
    """Records of text files. With a quote character, records may span lines."""

    def __init__(
        self, paths: tuple[str, ...], schema: Schema, is_json: bool = False, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.paths = paths
        self.num_bytes = sum(pathlib.Path(path).stat().st_size for path in paths)
        self._schema, self._chunk_bytes = schema, chunk_bytes
        self._needed = schema.source_columns()
        self._scalars = schema.scalar_columns()
        self._separators = {feature.source: feature.separator for feature in schema.sparse if feature.separator}
        self.is_json = is_json
        self.delimiter = schema.delimiter or guess_delimiter(paths[0], schema.encoding)
        # A quote that no file uses in its first bytes may still come later: only a schema without one turns it off.
        self._quote = b"" if self.is_json else schema.quote.encode()

    def chunks(self, start: Position) -> Iterator[Chunk]:
        """Chunks from `start` on."""
        done = sum(pathlib.Path(path).stat().st_size for path in self.paths[: start.file])
        for file in range(start.file, len(self.paths)):
            position = start if file == start.file else Position(file)
            yield from self._file_chunks(file, position, done)
            done += pathlib.Path(self.paths[file]).stat().st_size

    def _file_chunks(self, file: int, start: Position, done: int) -> Iterator[Chunk]:
        path = self.paths[file]
        columns = None if self.is_json else self._column_names(path)
        offset, line = start.offset, start.line
        for data, num_lines, raw_position in self._records(path, offset):
            body, first_line = data, line
            if offset == 0:
                body = body.removeprefix(BYTE_ORDER_MARK)
                if columns is not None and self._schema.header:
                    end = record_end(body, self._quote, 1)
                    first_line += body[:end].count(b"\n")
                    body = body[end:]
            offset, line = offset + len(data), line + num_lines
            following = Position(file, offset, line)
            parse: Callable[[], Columns]
            if columns is None:
                encoding = self._schema.encoding
                parse = functools.partial(
                    parse_json, body, first_line, self._needed, self._scalars, encoding, self._separators
                )
            else:
                parse = functools.partial(self._parse, path, body, first_line, columns)
            yield Chunk(file, following, done + raw_position, parse)

    def _records(self, path: str, offset: int) -> Iterator[tuple[bytes, int, int]]:
        """(bytes of whole records, their newlines, position in the file itself) from `offset` on."""
        try:
            raw, stream = open_binary(path, self._schema.encoding)
            with raw:
                skip(stream, offset)
                rest, larger = b"", 0
                while True:
                    # The first chunks are small, so that all cores soon have one.
                    num_bytes = larger or self._chunk_bytes // (4 if offset < self._chunk_bytes else 1)
                    if stream is raw and not self._quote:  # Then nothing is left over that must be cut off, in a copy.
                        num_bytes = to_line_end(raw, num_bytes)
                    while num_bytes <= len(rest):
                        num_bytes *= 2
                    # With what is left, as many bytes as a restart at this offset would take: the same borders.
                    block = stream.read(num_bytes - len(rest))
                    last = len(rest) + len(block) < num_bytes
                    data = rest + block
                    end = len(data) if last else record_end(data, self._quote)
                    if end:
                        yield data[:end], data.count(b"\n", 0, end), raw.tell()
                    if last:
                        return
                    larger = 0 if end else 2 * len(data)
                    if stream is raw:  # Reading the rest once more is cheaper than moving all the data behind it.
                        raw.seek(end - len(data), io.SEEK_CUR)
                        rest = b""
                    else:
                        rest = data[end:]
                    if not end and len(data) > MAX_RECORD_BYTES:
                        raise ConfigError(
                            f"{path}: a record does not end within {MAX_RECORD_BYTES >> 20} MB after byte "
                            f"{offset}; an unclosed quote, or not a text file with lines"
                        )
                    offset += end
        except (OSError, EOFError) as error:
            refuse(path, error)

    def _column_names(self, path: str) -> tuple[str, ...]:
        names = self._schema.columns
        if self._schema.header:
            names = read_header(path, self.delimiter, self._schema.quote, self._schema.encoding)
        require_columns(path, list(names), self._needed)
        return names

    def _parse(self, path: str, data: bytes, first_line: int, names: tuple[str, ...]) -> Columns:
        line_of = _Lines(data, self._quote, first_line)
        refused: list[csv.InvalidRow] = []
        undecodable: dict[int, BadRow] = {}

        def skip_row(row: csv.InvalidRow) -> str:
            refused.append(row)
            return "skip"

        if not data.isascii():
            try:
                data.decode("utf8")
            except UnicodeDecodeError:
                data, undecodable = _blank_undecodable(data, line_of, self._schema.encoding)
        try:
            table = self._read_csv(data, names, skip_row)
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{path}, from line {first_line}: {' '.join(str(error).split())[:300]}") from error
        num_rows = table.num_rows + len(refused)
        bad_rows = [row.number - 1 for row in refused]
        row_R = np.delete(np.arange(num_rows), bad_rows) if bad_rows else np.arange(num_rows)
        bad = [
            undecodable.get(row.number - 1)
            or BadRow(
                row.number - 1,
                line_of(row.number - 1),
                f"{row.actual_columns} columns; expected {row.expected_columns}",
            )
            for row in refused
        ]
        arrays = {name: _one_chunk(table[name]) for name in self._needed}
        return Columns(arrays, row_R, num_rows, bad, line_of)

    def _read_csv(self, data: bytes, names: tuple[str, ...], skip_row: Callable[[csv.InvalidRow], str]) -> pa.Table:
        if not data.lstrip(b"\r\n"):  # Unlike strip, no copy.
            return pa.table({name: pa.array([], pa.string()) for name in self._needed})
        return csv.read_csv(
            pa.BufferReader(data),
            # A column named twice is read once; one thread, as the chunks themselves run in parallel.
            csv.ReadOptions(column_names=_unique(names), use_threads=False, block_size=len(data) + 1),
            csv.ParseOptions(
                delimiter=self.delimiter,
                quote_char=self._schema.quote or False,
                newlines_in_values=bool(self._quote) and self._quote in data,
                invalid_row_handler=skip_row,
            ),
            csv.ConvertOptions(
                column_types=dict.fromkeys(self._needed, pa.string()),
                include_columns=self._needed,
                strings_can_be_null=False,
                check_utf8=False,  # Done before, for the chunk as a whole, in a tenth of the time.
            ),
        )


def _unique(names: tuple[str, ...]) -> list[str]:
    seen: dict[str, int] = {}
    out = []
    for name in names:
        count = seen[name] = seen.get(name, 0) + 1
        out.append(name if count == 1 else f"{name}#{count}")
    return out


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # One as a rule: then no copy.


def guess_delimiter(path: str, encoding: str = UTF8) -> str:
    """Tab where the first line has one, else the commonest of , ; | in it."""
    first = read_head(path, 1 << 16, encoding).split(b"\n")[0].decode("utf8", "replace")
    return "\t" if "\t" in first else max(",;|", key=first.count)


def read_header(path: str, delimiter: str, quote: str, encoding: str = UTF8) -> tuple[str, ...]:
    """The names in a file's first line."""
    head = read_head(path, 1 << 20, encoding)
    first = head.removeprefix(BYTE_ORDER_MARK)
    first = first[: record_end(first, quote.encode(), 1) or len(first)]
    if not first.strip():
        raise ConfigError(f"{path} is empty; expected a header and rows")
    try:
        table = csv.read_csv(
            pa.BufferReader(first.rstrip(b"\r\n") + b"\n"),
            csv.ReadOptions(autogenerate_column_names=True),
            csv.ParseOptions(delimiter=delimiter, quote_char=quote or False, newlines_in_values=bool(quote)),
            csv.ConvertOptions(column_types={f"f{i}": pa.string() for i in range(first.count(delimiter.encode()) + 1)}),
        )
    except pa.ArrowInvalid as error:
        refuse(f"{path}, line 1", error)
    return tuple(str(column[0].as_py()).strip() for column in table.columns)


class _Lines:
    """The line of each record of a chunk, all found at the first question."""

    def __init__(self, data: bytes, quote: bytes, first_line: int) -> None:
        self.data, self._quote, self._first_line = data, quote, first_line

    @functools.cached_property
    def starts(self) -> list[int]:
        """Where the records begin."""
        return record_starts(self.data, self._quote)

    @functools.cached_property
    def _newlines(self) -> np.ndarray:
        return np.flatnonzero(np.frombuffer(self.data, np.uint8) == ord("\n"))

    def __call__(self, row: int) -> int:
        """The line of record `row`."""
        start = self.starts[min(row, len(self.starts) - 1)]
        return self._first_line + int(np.searchsorted(self._newlines, start))


def _blank_undecodable(data: bytes, lines: _Lines, encoding: str) -> tuple[bytes, dict[int, BadRow]]:
    """Records that are no UTF-8 replaced by one byte, which then has too few columns; and what is wrong with each."""
    out, bad = [], {}
    for row, (start, stop) in enumerate(zip(lines.starts, [*lines.starts[1:], len(data)], strict=True)):
        record = data[start:stop]
        try:
            record.decode("utf8")
        except UnicodeDecodeError as error:
            bad[row] = BadRow(row, lines(row), describe_wrong(record, error.start, encoding))
            record = b"?\n"
        out.append(record)
    return b"".join(out), bad
