"""Rows of raw values to a model's inputs, as preparation made them from the log: same ids, same dense values.

Preparation reads columns of millions of values with Arrow (data/values/columns.py, data/values/bags.py); here come a
few rows at a time, so that values are taken one by one, in plain Python. The rules are the same and a test holds them
together. What preparation calls a bad row is a BadRequest; so is what is ambiguous outside of a typed column.
"""

import itertools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dlrm_jax.data.schema.schema import EMPTY_SLOT, Dense, Schema, Sparse, integer
from dlrm_jax.data.schema.schema_io import from_dict as schema_from_dict
from dlrm_jax.data.values.dense import LARGEST, DenseStatistics, finish_dense, transform
from dlrm_jax.data.values.hashing import hash_integer, hash_text
from dlrm_jax.data.values.vocabulary import Vocabulary
from dlrm_jax.serving.artifact.errors import BadRequest, TooLate, shown
from dlrm_jax.serving.artifact.signature import Signature

_HEX = re.compile(r"[0-9a-fA-F]{1,16}")
_REMEMBERED = 1 << 16
"""Values of a feature whose ids are kept at hand,"""
_SHORT = 64
"""of so many characters at most, so that what is kept is bounded in bytes."""
_MAX_TEXT = 1 << 16
"""Characters of one field: hashing takes half a microsecond for each."""

UNKNOWN = -2
"""An id that says: a value that the training log did not have."""

Row = Mapping[str, Any]
Inputs = tuple[np.ndarray, np.ndarray, dict[str, int]]
Column = Callable[[Any], Any]


class Reader:
    """Turns rows into (dense_BxN float32, ids_BxK int32, unknown values by feature)."""

    def __init__(self, signature: Signature, vocabularies: Mapping[str, Vocabulary], max_bag: int = 1000) -> None:
        self._signature = signature
        self._schema = schema_from_dict(dict(signature.schema)) if signature.schema is not None else None
        if self._schema is None:
            self._dense: list[tuple[str, Column]] = [(name, _number) for name in signature.dense_names]
            self._bags = [(f.name, _ids_of(f.rows, f.hotness), -1) for f in signature.features]
            self._allowed: frozenset[str] = frozenset()
        else:
            nulls = frozenset(self._schema.null_values)
            decimal = self._schema.decimal
            self._dense = [(d.source, _with_points(_dense_of(d, nulls), decimal, nulls)) for d in self._schema.dense]
            rows = {feature.table: feature.rows for feature in signature.features}
            self._bags = [
                (s.source, *_bag_of(s, nulls, vocabularies.get(s.table_name), rows[s.table_name], max_bag))
                for s in self._schema.sparse
            ]
            self._allowed = frozenset(_unused_columns(self._schema))
        self.columns = tuple(dict.fromkeys([name for name, _ in self._dense] + [name for name, *_ in self._bags]))
        """What a row must have, under these names."""
        self._required = frozenset(self.columns)
        statistics = signature.dense_statistics or {}
        self._statistics = {name: DenseStatistics(**values) for name, values in statistics.items()}
        least = [self._statistics[d.name].least for d in self._schema_dense() if d.transform == "torchrec_log"]
        self._least = min(least, default=math.inf)

    def _schema_dense(self) -> Sequence[Dense]:
        return self._schema.dense if self._schema is not None else ()

    def read(self, rows: Sequence[Row], shared: Row | None = None, deadline: float | None = None) -> Inputs:
        """The inputs of `rows`; what `shared` gives is the same for all of them, and must not be in a row.

        Raises BadRequest naming the row and the field, TooLate at `deadline` (time.monotonic()).
        """
        shared = shared or {}
        self._check_names(rows, shared)
        num_rows = len(rows)
        dense_BxN = np.ones((num_rows, len(self._signature.dense_names)), np.float32)
        for i, (name, read) in enumerate(self._dense):
            numbers = self._column(rows, shared, name, read, deadline)
            dense_BxN[:, i] = self._finish_dense(i, name, np.array(numbers, np.float64), shared)
        ids_BxK = np.full((num_rows, self._signature.num_slots), EMPTY_SLOT, np.int32)
        unknown: dict[str, int] = {}
        start = 0
        for (name, read, when_unknown), feature in zip(self._bags, self._signature.features, strict=True):
            hotness = feature.hotness
            for row, bag in enumerate(self._column(rows, shared, name, read, deadline)):
                if bag:
                    ids_BxK[row, start : start + len(bag)] = bag
            slots = ids_BxK[:, start : start + hotness]
            missed = slots == UNKNOWN
            if missed.any():
                unknown[feature.name] = int(missed.sum())
                slots[missed] = when_unknown
            start += hotness
        return dense_BxN, ids_BxK, unknown

    def _check_names(self, rows: Sequence[Row], shared: Row) -> None:
        stray = shared.keys() - self._required - self._allowed
        if stray:
            raise BadRequest(f"shared: unknown feature {shown(min(stray))}; known are {', '.join(self.columns)}")
        wanted = self._required - shared.keys()
        for i, row in enumerate(rows):
            if row.keys() == wanted:
                continue
            missing, extra = wanted - row.keys(), row.keys() - wanted - self._allowed
            if missing:
                raise BadRequest(f"row {i}: feature {shown(min(missing))} is missing (null stands for a missing value)")
            if extra:
                twice = extra & shared.keys()
                if twice:
                    raise BadRequest(f"row {i}: feature {shown(min(twice))} is given here and in shared")
                raise BadRequest(f"row {i}: unknown feature {shown(min(extra))}; known are {', '.join(self.columns)}")

    def _column(self, rows: Sequence[Row], shared: Row, name: str, read: Column, deadline: float | None) -> list[Any]:
        if name in shared:
            try:
                return [read(shared[name])] * len(rows)
            except _Refused as refused:
                raise BadRequest(f"shared, feature {name!r}: {refused}") from None
        out = []
        for i, row in enumerate(rows):
            try:
                out.append(read(row[name]))
            except _Refused as refused:
                raise BadRequest(f"row {i}, feature {name!r}: {refused}") from None
            if deadline is not None and time.monotonic() > deadline:
                raise TooLate("not read in time; send fewer rows or shorter values")
        return out

    def _finish_dense(self, i: int, name: str, numbers_B: np.ndarray, shared: Row) -> np.ndarray:
        dense = self._schema.dense[i] if self._schema is not None else None
        if dense is not None and dense.needs_statistics:
            if dense.missing != "mean":
                numbers_B = np.where(np.isnan(numbers_B), dense.fill, numbers_B)
            own = self._statistics[dense.name]
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                values_B = finish_dense(dense, numbers_B, own, self._least)
        elif dense is not None:
            values_B = transform(dense.transform, np.where(np.isnan(numbers_B), dense.fill, numbers_B))
        else:
            values_B = transform("none", numbers_B)
        bad = np.flatnonzero(~np.isfinite(values_B))
        if len(bad):
            where = "shared" if name in shared else f"row {bad[0]}"
            rule = f" under {dense.transform}" if dense is not None and dense.transform != "none" else ""
            raise BadRequest(f"{where}, feature {name!r}: {numbers_B[bad[0]]:g} has no finite float32{rule}")
        return values_B


class _Refused(ValueError):
    """Why a value cannot be used; the caller knows row and field."""


def _unused_columns(schema: Schema) -> list[str]:
    """Columns of the log that a row may have, and that a score does not need."""
    return [name for name in (schema.label.column, schema.weight, schema.timestamp, schema.split.column) if name]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Refused(f"{shown(value)} is not a number")
    return _finite(float(value) if abs(value) < 1e300 else math.inf, value)


def _finite(number: float, value: Any) -> float:
    if not math.isfinite(number):
        raise _Refused(f"{shown(value)} is not a finite number")
    return number


def _require_short(text: str) -> None:
    if len(text) > _MAX_TEXT:
        raise _Refused(f"{shown(text)} has {len(text)} characters; at most {_MAX_TEXT}")


def _require_small(count: int, max_bag: int) -> None:
    if count > max_bag:
        raise _Refused(f"{count} values in one bag; at most {max_bag}")


def _ids_of(rows: int, hotness: int) -> Column:
    def one(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _Refused(f"{shown(value)} is not an id (a whole number)")
        if not 0 <= value < rows:
            raise _Refused(f"id {shown(value)} is outside its table of {rows} rows (ids 0 to {rows - 1})")
        return value

    def read(value: Any) -> list[int]:
        if value is None:
            return []
        if not isinstance(value, list):
            return [one(value)]
        if len(value) > hotness:
            raise _Refused(f"{len(value)} ids in one bag, but its hotness is {hotness}")
        return [one(item) for item in value]

    return read


def _dense_of(dense: Dense, nulls: frozenset[str]) -> Column:
    """A raw number, NaN where it is missing."""

    def read(value: Any) -> float:
        if isinstance(value, str):
            _require_short(value)
            number = math.nan if value in nulls else _parse_number(value)
        elif value is None:
            number = math.nan
        elif isinstance(value, bool | int | float):
            if isinstance(value, float) and math.isnan(value):
                raise _Refused("NaN is not a number; null stands for a missing value")
            number = float(value) if abs(value) < 1e300 else math.inf
        else:
            raise _Refused(f"{shown(value)} is not a number")
        if math.isinf(number) or (dense.needs_statistics and abs(number) > LARGEST):
            raise _Refused(f"{shown(value)} is not a finite number")
        if math.isnan(number) and dense.missing == "error":
            raise _Refused("is missing")
        return number

    return read


def _with_points(read: Column, decimal: str, nulls: frozenset[str]) -> Column:
    """`read` for texts with decimal commas, as data/values/decimals.py has it; numbers are numbers."""

    def read_text(value: Any) -> Any:
        if isinstance(value, str) and value not in nulls:
            if "." in value:
                raise _Refused(f"{shown(value)} has a point, and decimals of this log have a comma")
            value = value.replace(",", ".")
        return read(value)

    return read if decimal == "." else read_text


def _parse_number(text: str) -> float:
    try:
        if "_" not in text:
            return float(text)
    except ValueError:
        pass
    raise _Refused(f"{shown(text)} is not a number")


def _bag_of(
    sparse: Sparse, nulls: frozenset[str], vocabulary: Vocabulary | None, rows: int, max_bag: int
) -> tuple[Column, int]:
    """(a value to the ids of its bag, the id that stands for unknown values).

    Of a longer bag only the first `hotness` values are looked at, as in preparation.
    """
    id_of = _remembering(_id_of(sparse, vocabulary, rows))
    fill = [id_of(sparse.fill)] if sparse.missing == "fill" else []

    def present(value: Any) -> bool:
        return value is not None and not (isinstance(value, str) and value in nulls)

    def read(value: Any) -> list[int]:
        if isinstance(value, str):
            _require_short(value)
            if sparse.separator and value not in nulls:
                _require_small(value.count(sparse.separator) + 1, max_bag)
                value = value.split(sparse.separator)
        if isinstance(value, list):
            _require_small(len(value), max_bag)
            # Preparation has a list's values in one column of texts, and cuts bags before it looks at them.
            first = list(itertools.islice(filter(present, value), sparse.hotness))
            _require_short("".join(item for item in first if isinstance(item, str)))
            bag = [id_of(item) for item in first]
        else:
            bag = [id_of(value)] if present(value) else []
        if not bag and sparse.missing == "error":
            raise _Refused("is missing")
        return bag or fill

    return read, 0 if sparse.oov else EMPTY_SLOT


def _remembering(id_of: Callable[[Any], int]) -> Callable[[Any], int]:
    known: dict[str, int] = {}

    def remembered(value: Any) -> int:
        if not isinstance(value, str):  # 1, 1.0 and True are one key of a dict, but not one value.
            return id_of(value)
        found = known.get(value)
        if found is None:
            found = id_of(value)
            if len(known) < _REMEMBERED and len(value) <= _SHORT:
                known[value] = found
        return found

    return remembered


def _id_of(sparse: Sparse, vocabulary: Vocabulary | None, rows: int) -> Callable[[Any], int]:
    """One value to its id, or UNKNOWN."""
    key_of = _text_key if sparse.type == "string" else _integer_key(sparse)

    def find(value: Any) -> int:
        key, check = key_of(value)
        if sparse.ids == "hash":
            return (key if sparse.type == "string" else hash_integer(key)) % sparse.size
        if sparse.ids == "raw":
            if not 0 <= key < rows:
                raise _Refused(f"{shown(value)} is outside the table's ids 0 to {rows - 1}")
            return key
        assert vocabulary is not None
        found = vocabulary.find_one(key & 0xFFFFFFFFFFFFFFFF, check)
        return found + int(sparse.oov) if found >= 0 else UNKNOWN

    return find


def _text_key(value: Any) -> tuple[int, int]:
    try:
        text = _as_text(value).encode()
    except UnicodeEncodeError:
        raise _Refused(f"{shown(value)} is not valid Unicode") from None
    return hash_text(text), hash_text(text, seed=1)


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 2**53):
        return str(int(value))
    raise _Refused(f"{shown(value)} is neither text nor a whole number; send the text as in the log")


def _integer_key(sparse: Sparse) -> Callable[[Any], tuple[int, None]]:
    def key(value: Any) -> tuple[int, None]:
        if sparse.type == "hex":
            text = value.strip() if isinstance(value, str) else ""
            if not _HEX.fullmatch(text):
                raise _Refused(f"{shown(value)} is not a hexadecimal number, as text")
            number = int(text, 16)  # Unsigned, as it is taken modulo; hash and vocabulary see its 64 bits.
            number = number % sparse.modulo if sparse.modulo else number
            return number, None
        number = _integer(value)
        return (number % sparse.modulo if sparse.modulo else number), None

    return key


def _integer(value: Any) -> int:
    if isinstance(value, str):
        number = integer(value)
    elif isinstance(value, int):
        number = int(value)
    else:
        number = int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53 else None
    if number is None or not -(2**63) <= number < 2**63:
        raise _Refused(f"{shown(value)} is not a whole number of 64 bits")
    return number
