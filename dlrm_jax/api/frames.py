"""Tables in memory, in and out: pandas, polars, pyarrow, NumPy. Only what the caller has imported is asked for."""

import contextlib
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats.column_types import is_list, plain
from dlrm_jax.data.formats.source import list_names

_PLAIN = (pa.types.is_string, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_null)


def is_table(value: Any) -> bool:
    """Whether a value is a table in memory, and not the name of a file."""
    if isinstance(value, str | os.PathLike):
        return False
    named = hasattr(value, "to_arrow") or hasattr(value, "__arrow_c_stream__")
    return named or isinstance(value, Mapping | pa.Table | pa.RecordBatch) or _is_pandas(value)


def _is_pandas(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "pandas"


def as_arrow(table: Any) -> pa.Table:
    """Any table as pyarrow has it; ConfigError for what is none.

    A table is a DataFrame of pandas (without its index) or polars, a Table or RecordBatch of pyarrow, names with
    arrays or lists of one length, or whatever gives Arrow's stream (`__arrow_c_stream__`).
    """
    try:
        if _is_pandas(table):
            return pa.Table.from_pandas(table, preserve_index=False)
        if isinstance(table, Mapping):
            return pa.table({str(name): _column(values) for name, values in table.items()})
        return table.to_arrow() if hasattr(table, "to_arrow") else pa.table(table)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ConfigError(f"the table cannot be read: {' '.join(str(error).split())[:300]}") from error


def _column(values: Any) -> Any:
    """A column of names with arrays; of an array of rows, as bags of equal size, each row is a list."""
    if getattr(values, "ndim", 1) == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return pa.array(values)


@contextlib.contextmanager
def as_log(table: Any, beside: pathlib.Path) -> Iterator[tuple[str, ...]]:
    """A table as a Parquet file, which lies beside `beside` for the length of the block.

    Its name has a hash of what it holds, by which a preparation that was stopped is told from one of another table.
    """
    arrow = as_arrow(table)
    if not len(arrow):
        raise ConfigError(f"the table has no rows; its columns are {list_names(arrow.column_names)}")
    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.", dir=beside.parent) as directory:
        unnamed = pathlib.Path(directory) / "table"
        pq.write_table(arrow, unnamed)
        with unnamed.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        path = unnamed.rename(unnamed.with_name(f"table-{digest}.parquet"))
        os.utime(path, ns=(0, 0))  # The same table is the same log, whenever it was written.
        yield (str(path),)


def columns_of(table: pa.Table, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Some columns of every row, as a log of JSON lines has them; ConfigError for one that is missing.

    NaN is a missing value, and moments and decimals are their texts.
    """
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise ConfigError(f"the table has no column {missing[0]!r}; it has {list_names(table.column_names)}")
    values = [_values(table[name]) for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


def _values(column: pa.ChunkedArray) -> list[Any]:
    array = plain(column.combine_chunks())
    if is_list(array.type):
        parts = _values(pa.chunked_array([array.flatten()]))
        lengths = array.value_lengths().to_pylist()
        starts = iter(parts)
        return [None if length is None else [next(starts) for _ in range(length)] for length in lengths]
    if not any(test(array.type) for test in _PLAIN):
        array = array.cast(pa.string())
    values = array.to_pylist()
    return [None if value != value else value for value in values] if pa.types.is_floating(array.type) else values


def as_numpy(table: pa.Table) -> dict[str, Any]:
    """NumPy arrays by column name; lists, and columns with missing values, as NumPy has them: objects, NaN."""
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def as_polars(table: pa.Table) -> Any:
    """A polars DataFrame."""
    import polars

    return polars.from_arrow(table)
