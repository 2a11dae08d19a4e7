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
    first = np.flatnonzero(kept)[:_COUNT]
    names = {dense.source for dense in schema.dense} | {one.source for one in schema.sparse if not one.cross}
    columns = {name: arrays[name].take(pa.array(first)).to_pylist() for name in sorted(names)}
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(first))]
    return [[int(row_R[i]), row] for i, row in zip(first, rows, strict=True) if all(map(_is_plain, row.values()))]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= _LONGEST and all(map(_is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, int) or (isinstance(value, str) and len(value) <= _LONGEST)
