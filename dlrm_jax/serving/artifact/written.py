"""The files of a version: arrays, tables, vocabularies, JSON."""

import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import jax
import numpy as np

from dlrm_jax.config import ConfigError, ModelConfig, TableConfig
from dlrm_jax.data.read.raw_values import read_vocabulary
from dlrm_jax.data.schema.schema import Sparse
from dlrm_jax.data.schema.schema_io import from_dict as schema_from_dict
from dlrm_jax.serving.artifact.quantise import stored_table
from dlrm_jax.serving.artifact.signature import Signature
from dlrm_jax.tables.dtypes import table_dtype
from dlrm_jax.tables.layout import local_stacks
from dlrm_jax.tables.pooling import POOLING_WEIGHTS
from dlrm_jax.tables.reshard import Kind, Rows

Pieces = Callable[[str], Iterable[np.ndarray]]
"""The float32 rows of a table, or (`<table>/pooling_weights`) of its pooling weights, one piece below the other."""


_PIECE_FLOATS = 2**22
"""Floats of a table that are read, quantised and written at a time."""


def pieces_of(model: ModelConfig, rows: Rows) -> Pieces:
    """The rows of a model's tables, wherever they are stored."""

    def pieces(name: str) -> Iterator[np.ndarray]:
        table, kind, width = table_of(model, name)
        piece = max(1, _PIECE_FLOATS // width)
        for first in range(0, table.num_embeddings, piece):
            found = rows.rows(kind, table.name, first, 1, min(piece, table.num_embeddings - first))
            yield floats_of(table, kind, found)

    return pieces


def table_of(model: ModelConfig, name: str) -> tuple[TableConfig, Kind, int]:
    """(a table, which of its arrays, columns of a row there), by the name of a table or of its pooling weights."""
    of_weights = name.endswith(POOLING_WEIGHTS)
    table = model.table(name.removesuffix(POOLING_WEIGHTS))
    return table, Kind("tables", of_weights, per_row=of_weights), 1 if of_weights else table.embedding_dim


def floats_of(table: TableConfig, kind: Kind, rows: np.ndarray) -> np.ndarray:
    """Numbers of rows as training stores them."""
    return rows if kind.weights else np.asarray(table_dtype(table.dtype).numbers(rows))


def flat(tree: Any, path: str = "") -> dict[str, np.ndarray]:
    """The leaves of a tree of dicts by the names that lead to them."""
    out = {}
    for name, value in tree.items():
        inner = f"{path}{name}"
        out.update(flat(value, f"{inner}/") if isinstance(value, dict) else {inner: np.asarray(value)})
    return out


def write_json(path: pathlib.Path, value: Any) -> None:
    """One value."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def file_name(index: int, name: str) -> str:
    """The file of array number `index`, whatever is in its name."""
    return f"{index:03d}_{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:80]}.npy"


def write_weights(
    directory: pathlib.Path, model: ModelConfig, dense: dict[str, np.ndarray], pieces: Pieces, kind: str
) -> tuple[dict[str, Any], dict[str, jax.ShapeDtypeStruct], int]:
    """(weights.json, the arrays' shapes, bytes of the tables), the files written."""
    for folder in ("weights", "tables"):
        (directory / folder).mkdir()
    arrays: dict[str, Any] = {}
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in dense.items()}
    for i, (name, value) in enumerate(dense.items()):
        file = f"weights/{file_name(i, name)}"
        write_rows(directory / file, [value], value.shape)
        arrays[name] = {"dtype": value.dtype.name, "files": [file]}
    suffixes = ("", POOLING_WEIGHTS) if model.learned_pooling else ("",)
    names = [table.name + suffix for table in model.tables for suffix in suffixes]
    written = {}
    for i, name in enumerate(names):
        table = model.table(name.removesuffix(POOLING_WEIGHTS))
        file, rows = f"tables/{file_name(i, name)}", stored_rows(name, pieces(name), stored_as(name, kind))
        row = write_rows(directory / file, rows, (table.num_embeddings,))
        written[name] = (file, row)
    table_bytes = 0
    for stack in local_stacks(model, divisible=False):
        for suffix in suffixes:
            of_stack = [table.name + suffix for table in stack.tables]
            files, (row, *_) = zip(*(written[name] for name in of_stack), strict=True)
            arrays[stack.name + suffix] = {"dtype": row.dtype.name, "files": list(files), "tables": of_stack}
            shapes[stack.name + suffix] = jax.ShapeDtypeStruct((stack.rows, *row.shape), row.dtype)
            table_bytes += stack.rows * row.size * row.dtype.itemsize
    return arrays, shapes, table_bytes


def stored_as(name: str, kind: str) -> str:
    """The type of a table, or of its pooling weights, where tables are of type `kind`."""
    return "float32" if name.endswith(POOLING_WEIGHTS) else kind


def stored_rows(name: str, pieces: Iterable[np.ndarray], kind: str) -> Iterator[np.ndarray]:
    """A table's rows as they are stored; ConfigError for what is not finite."""
    first = 0
    for rows_PxD in pieces:
        bad = np.flatnonzero(~np.isfinite(rows_PxD).all(axis=1))
        if len(bad):
            raise ConfigError(
                f"table {name!r} holds NaN or infinity, first in row {first + bad[0]}; export another --checkpoint"
            )
        yield stored_table(np.asarray(rows_PxD, np.float32), kind)
        first += len(rows_PxD)


def write_rows(path: pathlib.Path, pieces: Iterable[np.ndarray], rows: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Write a .npy file of arrays one below the other, `rows` in all, as numpy.save would; a row's shape and type."""
    row = None
    with path.open("wb") as file:
        for piece in pieces:
            if row is None:
                row = jax.ShapeDtypeStruct(piece.shape[1:], piece.dtype)
                write_header(file, (*rows[:1], *piece.shape[1:]), piece.dtype)
            np.ascontiguousarray(bits_of(piece)).tofile(file)
    assert row is not None, "a table has rows"
    return row


def bits_of(rows: np.ndarray) -> np.ndarray:
    """Rows as a file has them: NumPy's format has no bfloat16; weights.json says what the bits are."""
    return rows.view(np.uint16) if rows.dtype.name == "bfloat16" else rows


def write_header(file: BinaryIO, shape: tuple[int, ...], dtype: Any) -> None:
    """What stands before the rows of a .npy file; it has one length, however many rows there are."""
    descr = np.lib.format.dtype_to_descr(bits_of(np.empty(0, dtype)).dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})


def write_vocabularies(directory: pathlib.Path, signature: Signature, data_dir: pathlib.Path) -> None:
    """The keys of each vocabulary, in the order of ids, and what names their files."""
    (directory / "vocabularies").mkdir()
    index: dict[str, list[str]] = {}
    for table, columns in vocabularies(signature, data_dir):
        index[table] = list(columns)
        for file, column in columns.items():
            np.save(directory / file, column, allow_pickle=False)
    write_json(directory / "vocabularies.json", index)


def vocabularies(signature: Signature, data_dir: pathlib.Path) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(table, by file: keys in the order of ids, and where values are strings a second hash of each)."""
    from dlrm_jax.data.values.hashing import hash_strings

    schema = schema_from_dict(dict(signature.schema or {}))
    for i, (table, features) in enumerate(schema.tables().items()):
        rule: Sparse = features[0]
        if rule.ids != "vocabulary":
            continue
        values = read_vocabulary(data_dir, schema, table)
        if rule.value_type == "string":
            columns = [hash_strings(values), hash_strings(values, seed=1)]
        else:
            columns = [values.to_numpy().view(np.uint64)]
        stem = f"vocabularies/{file_name(i, table)[:-4]}"
        yield table, dict(zip((f"{stem}.keys.npy", f"{stem}.checks.npy"), columns, strict=False))
