"""The first pass of a preparation: the log, read once, becomes staged rows with provisional ids.

Chunks are parsed by all cores; vocabularies grow in the log's order, so that ids depend on the log alone.
"""

import collections
import concurrent.futures
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats.source import BadRow, Chunk, Columns, Position, Source
from dlrm_jax.data.prepare.growth import Past
from dlrm_jax.data.prepare.numbering import IS_DATE, MAX_EXAMPLES, Background, Parsed, Pending, number_new
from dlrm_jax.data.prepare.staging import Staging, wide_name
from dlrm_jax.data.schema.schema import Dense, Schema
from dlrm_jax.data.values import columns as column_readers
from dlrm_jax.data.values.decimals import as_written, with_points
from dlrm_jax.data.values.sparse_columns import read_sparse
from dlrm_jax.data.values.vocabulary import Vocabulary

CHUNKS_PER_FILE = 4


def parse_chunk(schema: Schema, chunk: Chunk, skip_bad: bool, vocabularies: dict[str, Vocabulary]) -> Parsed:
    """Parse a chunk; with `skip_bad` the bad rows are left out, else they are only told of.

    Keys that the vocabularies know already get their ids here, on any core; new ones wait for their turn.
    """
    raw = chunk.parse()
    nulls = schema.null_values
    found: list[column_readers.Bad] = []

    def taken(pair: tuple[Any, list[column_readers.Bad]]) -> Any:
        found.extend(pair[1])
        return pair[0]

    def numbers(name: str, read: Callable[[pa.Array], tuple[Any, list[column_readers.Bad]]]) -> Any:
        """Read a column whose texts may have decimal commas."""
        if schema.decimal == ".":
            return taken(read(raw.arrays[name]))
        values, bad = read(with_points(raw.arrays[name], schema.decimal, nulls))
        return taken((values, as_written(bad, raw.arrays[name])))

    out: dict[str, np.ndarray] = {"row": raw.row_R.astype(np.int64)}
    label = schema.label
    if label.positive:
        out["label"] = taken(column_readers.read_label(label, raw.arrays[label.column], nulls))
    else:
        out["label"] = numbers(label.column, lambda array: column_readers.read_label(label, array, nulls))
    if schema.weight:
        weights = numbers(schema.weight, lambda array: column_readers.read_number(schema.weight, array, nulls))
        found += _bad_weights(schema.weight, weights)
        out["weight"] = np.nan_to_num(weights).astype(np.float32)
    if schema.timestamp:
        read = column_readers.read_time(schema.timestamp, raw.arrays[schema.timestamp], nulls)
        out["time"], out[IS_DATE] = taken(read)
    if schema.split.by == "column":
        name = schema.split.column
        out["split"] = taken(column_readers.read_split(name, raw.arrays[name], nulls))
    out["dense"] = np.ones((len(raw.row_R), max(len(schema.dense), 1)), np.float32)
    for i, dense in enumerate(schema.dense):
        values = numbers(dense.source, functools.partial(_read_dense, dense, nulls))
        if dense.needs_statistics:
            out[wide_name(i)] = values
        else:
            out["dense"][:, i] = values
    out["missing"] = np.packbits(_missing(schema, raw.arrays, len(raw.row_R)), axis=1)
    bags = [taken(pair) for pair in read_sparse(schema, raw.arrays)]
    bad_rows = raw.bad + _explain(found, raw)
    kept = np.ones(len(raw.row_R), bool)
    for item in found:
        kept[item.row_M] = False
    texts = _count_texts(schema, raw, kept) if label.positive else {}
    if found and skip_bad:
        out = {name: column[kept] for name, column in out.items()}
        bags = [bag.keep(np.flatnonzero(kept)) for bag in bags]
    for sparse, bag in zip(schema.sparse, bags, strict=True):
        vocabulary = vocabularies.get(sparse.table_name)
        known = bag.keys_U.astype(np.int32) if vocabulary is None else vocabulary.find(bag.keys_U, bag.checks_U)
        bag.ids_U = known
    bad_rows.sort(key=lambda bad: bad.row)
    return Parsed(chunk, out, bags, raw.num_rows, len(out["row"]), bad_rows, texts, raw.names)


def _read_dense(dense: Dense, nulls: tuple[str, ...], array: pa.Array) -> tuple[np.ndarray, list[column_readers.Bad]]:
    return column_readers.read_dense(dense, array, nulls)


def _count_texts(schema: Schema, raw: Columns, kept_R: np.ndarray) -> dict[str, int]:
    """How often each text of the label occurs in the rows that are kept."""
    distinct = column_readers.label_texts(raw.arrays[schema.label.column], schema.null_values)
    index_R = distinct.index_R[kept_R]
    counts = np.bincount(index_R[index_R >= 0], minlength=len(distinct.values)).tolist()
    return {text: count for text, count in zip(distinct.values.to_pylist(), counts, strict=True) if count}


def _missing(schema: Schema, arrays: dict[str, pa.Array], num_rows: int) -> np.ndarray:
    """missing_RxN: which dense values are to be filled in; only counted, since afterwards they look like others."""
    missing_RxN = np.zeros((num_rows, max(len(schema.dense), 1)), bool)
    for i, dense in enumerate(schema.dense):
        missing_RxN[:, i] = column_readers.is_missing(arrays[dense.source], schema.null_values)
    return missing_RxN


def _bad_weights(name: str, weights: np.ndarray) -> list[column_readers.Bad]:
    rows = np.flatnonzero(~(weights >= 0) | (weights > 3e38))
    texts = pc.cast(pa.array(weights[rows]), pa.string())
    return [column_readers.Bad(rows, name, texts, "is not a weight of at least 0")] if len(rows) else []


def _explain(found: list[column_readers.Bad], raw: Columns) -> list[BadRow]:
    """One BadRow for each row, naming its first bad column; lines are looked up for the first few."""
    first: dict[int, tuple[column_readers.Bad, int]] = {}
    for item in found:
        for i, row in enumerate(item.row_M.tolist()):
            first.setdefault(row, (item, i))
    out: list[BadRow] = []
    for row, (item, i) in sorted(first.items()):
        number = int(raw.row_R[row])
        line = raw.line_of(number) if len(out) < MAX_EXAMPLES else None
        value = item.values[i].as_py()
        value = None if item.reason == "is missing" else value
        out.append(BadRow(number, line, item.reason, item.column, value, raw.unit))
    return out


def _hint(bad: BadRow) -> str:
    """What may be wrong with the schema instead of the row."""
    if bad.reason.endswith("is not UTF-8") and bad.unit == "line":
        return "; or, if the file is in another encoding, say it in the schema (as encoding: cp1252)"
    if "number" in bad.reason and re.fullmatch(r"[+-]?\d+,\d+", bad.value or ""):
        return '; or, if commas are decimal, say decimal: "," in the schema'
    return ""


class FirstPass:
    """Runs, or goes on with, the first pass of a job."""

    def __init__(
        self, schema: Schema, source: Source, staging: Staging, skip_bad: bool, max_memory: int, past: Past
    ) -> None:
        self._schema, self._source, self._staging, self._next_row = schema, source, staging, past.next_row
        self._skip_bad, self._max_memory = skip_bad, max_memory
        self._tables = schema.tables()
        self._table_index = {name: i for i, name in enumerate(self._tables)}
        self._vocabularies = {
            name: Vocabulary(name, checked=features[0].value_type == "string")
            for name, features in self._tables.items()
            if features[0].ids == "vocabulary" or features[0].is_quantile
        }
        for name, vocabulary in self._vocabularies.items():
            vocabulary.extend(*past.keys(name, self._tables[name][0]))
        self._feature_index = {feature.name: i for i, feature in enumerate(schema.sparse)}

    def run(self, progress: Callable[[int, int], None]) -> int:
        """Stage what is not staged; the number of staged files. `progress` is told rows and bytes read."""
        index, position, row = self._resume()
        pending = Pending()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, Background() as background:
            parse = self._source.chunks(position)
            for parsed in _in_order(pool, parse, self._parse):
                self._refuse_bad(parsed)
                self._number(parsed, pending)
                pending.add(parsed, self._source.paths[parsed.chunk.file], row)
                row += parsed.num_rows
                progress(row, parsed.chunk.done)
                if pending.num_chunks == CHUNKS_PER_FILE:
                    background.run(pending.write, self._staging, index, row)
                    index, pending = index + 1, Pending()
                    self._check_memory()
            if pending.num_chunks:
                background.run(pending.write, self._staging, index, row)
                index += 1
        return index

    def _resume(self) -> tuple[int, Position, int]:
        """(next file, position in the log, rows before it), with the vocabularies as they were there."""
        count = self._staging.num_files()
        names = list(self._tables)
        for i in range(count):
            for addition in self._staging.additions(i):
                self._vocabularies[names[addition.table]].extend(addition.keys, addition.checks)
        if not count:
            return 0, Position(), self._next_row
        meta = self._staging.meta(count - 1)
        return count, Position(**meta["next"]), meta["row"]

    def _refuse_bad(self, parsed: Parsed) -> None:
        if parsed.bad and not self._skip_bad:
            first = parsed.bad[0]
            described = first.describe(self._source.paths[parsed.chunk.file])
            raise ConfigError(f"{described}; mend the row or prepare with --on_bad_row=skip_and_count{_hint(first)}")

    def _parse(self, chunk: Chunk) -> Parsed:
        return parse_chunk(self._schema, chunk, self._skip_bad, self._vocabularies)

    def _number(self, parsed: Parsed, pending: Pending) -> None:
        """Give ids to the new keys of a chunk, which go to `pending` too."""
        for table, features in self._tables.items():
            vocabulary = self._vocabularies.get(table)
            if vocabulary is not None:
                bags = [parsed.bags[self._feature_index[feature.name]] for feature in features]
                pending.extend(self._table_index[table], number_new(vocabulary, bags))

    def _check_memory(self) -> None:
        held = {name: vocabulary.num_bytes for name, vocabulary in self._vocabularies.items()}
        total = sum(held.values())
        if self._max_memory and total > self._max_memory:
            largest = sorted(held, key=lambda name: -held[name])[:3]
            shown = ", ".join(f"{name}: {len(self._vocabularies[name]):,} values" for name in largest)
            raise ConfigError(
                f"the vocabularies need {total / 1e6:,.0f} MB so far, beyond what --max_memory leaves "
                f"({self._max_memory / 1e6:,.0f} MB); the largest are {shown}. Raise it, or hash these columns "
                "(ids: hash, size: N)"
            )


def _in_order(
    pool: concurrent.futures.ThreadPoolExecutor, chunks: Iterator[Chunk], work: Callable[[Chunk], Parsed]
) -> Iterator[Parsed]:
    """`work` of each chunk, in order; so many at once as keep the pool busy, and no more in memory."""
    ahead = (os.cpu_count() or 1) + 1
    futures: collections.deque[concurrent.futures.Future[Parsed]] = collections.deque()
    try:
        for chunk in chunks:
            futures.append(pool.submit(work, chunk))
            if len(futures) > ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()
