"""Reading delimited text: pyarrow parses, its refusals become one line with file, line, column and value."""

import pathlib

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from dlrm_jax.config import ConfigError


def find_file(data_dir: str, names: tuple[str, ...]) -> pathlib.Path:
    """The first of `names` in `data_dir`, or `data_dir` itself if it is a file; ConfigError naming what is accepted."""
    path = pathlib.Path(data_dir)
    if path.is_file():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise ConfigError(f"--data_dir={data_dir} holds none of {', '.join(names)}")


def read_strings(
    path: pathlib.Path, delimiter: str, columns: tuple[str, ...] | None = None, encoding: str = "utf8"
) -> pa.Table:
    """All columns as strings. `columns` names those of a file without header; None takes the first line as header."""
    return parse_strings(path, path.read_bytes(), delimiter, columns, encoding)


def parse_strings(
    path: pathlib.Path, data: bytes, delimiter: str, columns: tuple[str, ...] | None = None, encoding: str = "utf8"
) -> pa.Table:
    """The same of bytes; `path` is for error texts."""
    if not data:
        raise ConfigError(f"{path} is empty")

    refusals = []

    def refuse(row: csv.InvalidRow) -> str:
        # pyarrow swallows what its handler raises, so the reason is kept for afterwards.
        refusals.append(f"{path}: line {row.number} has {row.actual_columns} columns; expected {row.expected_columns}")
        return "error"

    names = columns or _header(data, delimiter, encoding)
    try:
        return csv.read_csv(
            pa.BufferReader(data),
            # One thread keeps line numbers, which pyarrow gives up otherwise.
            csv.ReadOptions(
                column_names=list(columns) if columns else None, encoding=encoding, use_threads=False, block_size=2**24
            ),
            csv.ParseOptions(delimiter=delimiter, quote_char=False, invalid_row_handler=refuse),
            csv.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        raise ConfigError(refusals[0] if refusals else f"{path}: {str(error).splitlines()[0]}") from error


def _header(data: bytes, delimiter: str, encoding: str) -> list[str]:
    first = data.split(b"\n", 1)[0].decode("latin-1" if encoding != "utf8" else "utf8", "replace")
    return first.rstrip("\r").split(delimiter)


def to_integers(
    path: pathlib.Path, name: str, column: pa.ChunkedArray, first_line: int, base: int = 10
) -> pa.ChunkedArray:
    """Strings, base 10 or 16, as int64; ConfigError naming line, column and value of the first that is none."""
    if base == 16:
        column = pc.binary_join_element_wise("0x", column, "")
    try:
        return pc.cast(column, pa.int64())
    except pa.ArrowInvalid:
        row, value = next((row, value) for row, value in enumerate(column) if not _is_integer(value))
        raise ConfigError(
            f"{path}, line {first_line + row}, column {name}: {value.as_py().removeprefix('0x')!r} is not a "
            f"{'hexadecimal ' if base == 16 else ''}number of 64 bits"
        ) from None


def _is_integer(text: pa.StringScalar) -> bool:
    try:
        return bool(text.cast(pa.int64()).is_valid)
    except pa.ArrowInvalid:
        return False
