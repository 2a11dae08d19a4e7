"""Raw rows, as the log had them, to rows that a run scores: the ids and numbers that preparation would give them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dlrm_jax.api.frames import as_arrow, columns_of
from dlrm_jax.config import EMPTY_SLOT, ConfigError, ModelConfig, require
from dlrm_jax.data.formats.column_types import plain
from dlrm_jax.data.read.dataset import Dataset, Split
from dlrm_jax.data.schema.schema_io import from_dict as schema_from_dict
from dlrm_jax.data.values.columns import Bad, read_label, read_number
from dlrm_jax.data.values.vocabulary import Vocabulary
from dlrm_jax.serving.artifact.export import make_signature
from dlrm_jax.serving.artifact.raw_check import require_as_prepared
from dlrm_jax.serving.artifact.transform import Reader
from dlrm_jax.serving.artifact.written import vocabularies as vocabularies_of

_LEAST_ROWS = 64


def is_rows(value: Any) -> bool:
    """Whether a value is a list of rows, each names with values."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(row, Mapping) for row in value)


def reader_of(model: ModelConfig, dataset: Dataset) -> Reader:
    """What reads raw rows for a model of this data, by the vocabularies beside it, as an export's reader does."""
    signature = make_signature(model, dataset, "float32")
    vocabularies = {}
    if signature.schema is not None and dataset.directory is not None:
        for table, columns in vocabularies_of(signature, dataset.directory):
            vocabularies[table] = Vocabulary(table, checked=len(columns) == 2)
            vocabularies[table].extend(*columns.values())
    reader = Reader(signature, vocabularies)
    require_as_prepared(reader, signature, dataset)
    return reader


def read_raw(reader: Reader, table: Any) -> tuple[np.ndarray, np.ndarray]:
    """(dense_RxN, ids_RxK) of a table, or of a list of rows, in its order; other columns than the model's are let be.

    ConfigError for a column that is missing, BadRequest (a ValueError too) naming row and column of a wrong value.
    """
    rows = table if is_rows(table) else columns_of(as_arrow(table), reader.columns)
    dense_RxN, ids_RxK, _ = reader.read(rows)
    return dense_RxN, ids_RxK


def to_predict(reader: Reader, table: Any) -> tuple[Split, int]:
    """(the rows of a table, padded so that tables of many lengths share few programs, how many of them are its own)."""
    dense_RxN, ids_RxK = read_raw(reader, table)
    count = len(dense_RxN)
    padding = max(_LEAST_ROWS, 1 << max(0, count - 1).bit_length()) - count
    dense_RxN = np.pad(dense_RxN, ((0, padding), (0, 0)))
    ids_RxK = np.pad(ids_RxK, ((0, padding), (0, 0)), constant_values=EMPTY_SLOT)
    weight_R = (np.arange(count + padding) < count).astype(np.float32)
    return Split(dense_RxN, ids_RxK, np.zeros_like(weight_R), np.arange(count + padding), weight_R), count


def to_evaluate(reader: Reader, table: Any, dataset: Dataset) -> Split:
    """The rows of a table with their labels, and their weights where the log has them; ConfigError for a bad one."""
    table = pa.Table.from_pylist(list(table)) if is_rows(table) else as_arrow(table)
    require(len(table) > 0, "the table has no rows to evaluate")
    if dataset.schema is None:
        raise ConfigError(f"{dataset.name} has no schema, which would say what a label is; evaluate one of its splits")
    schema = schema_from_dict(dict(dataset.schema))
    label_R, bad = read_label(schema.label, _column(table, schema.label.column), schema.null_values)
    _require_good(bad)
    weight_R = None
    if schema.weight:
        numbers_R, bad = read_number(schema.weight, _column(table, schema.weight), schema.null_values)
        _require_good(bad)
        weight_R = numbers_R.astype(np.float32)
        right = bool(np.isfinite(weight_R).all() and (weight_R >= 0).all())
        require(right, f"column {schema.weight}: a weight is missing or negative")
    dense_RxN, ids_RxK = read_raw(reader, table)
    return Split(dense_RxN, ids_RxK, label_R, np.arange(len(table)), weight_R)


def _column(table: pa.Table, name: str) -> pa.Array:
    columns_of(table.slice(0, 0), (name,))  # It says what is there instead.
    column = table[name].combine_chunks()
    return plain(column)


def _require_good(bad: list[Bad]) -> None:
    for one in bad:
        raise ConfigError(f"row {one.row_M[0]}, column {one.column}: {one.values[0].as_py()!r} {one.reason}")
