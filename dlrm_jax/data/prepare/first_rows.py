"""The log's first rows as they stand there, kept beside what was made of them: an export reads them as a server would.

first_rows.json       [number of the row in the log, {column: value}] of each
"""

import math
from typing import Any

import numpy as np
import pyarrow as pa

from dlrm_jax.data.schema.schema import Schema

FIRST_ROWS = "first_rows.json"
_COUNT = 16
_LONGEST = 1000
"""Values of more characters than that are not kept."""


def first_rows(schema: Schema, arrays: dict[str, pa.Array], kept: np.ndarray, row_R: Any) -> list[list[Any]]:
    """Of a chunk's first rows that are `kept`, those with values that JSON can hold, and with their numbers."""
    names = {dense.source for dense in schema.dense} | {one.source for one in schema.sparse if not one.cross}
    columns = {name: arrays[name] for name in sorted(names)}
    if not all(_holds_plain(column.type) for column in columns.values()):
        return []
    first = np.flatnonzero(kept)[:_COUNT].tolist()
    rows = [(int(row_R[i]), {name: column[i].as_py() for name, column in columns.items()}) for i in first]
    return [[number, row] for number, row in rows if all(map(_is_plain, row.values()))]


def _holds_plain(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_plain(kind.value_type)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return text or pa.types.is_null(kind) or pa.types.is_boolean(kind) or _is_number(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_float32(kind) or pa.types.is_float64(kind)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= _LONGEST and all(map(_is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, int) or (isinstance(value, str) and len(value) <= _LONGEST)
