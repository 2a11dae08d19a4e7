"""Rows of raw values to a model's inputs, as preparation made them from the log: same ids, same dense values.

Preparation reads columns of millions of values with Arrow (data/values/columns.py, data/values/bags.py); here come a
few rows at a time, so that values are taken one by one, in plain Python. The rules are the same and a test holds them
together. What preparation calls a bad row is a BadRequest; so is what is ambiguous outside of a typed column.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlrm_jax.config import EMPTY_SLOT
from dlrm_jax.data.schema.schema import Dense, Schema
from dlrm_jax.data.schema.schema_io import from_dict as schema_from_dict
from dlrm_jax.data.values.dense import finish_dense, transform
from dlrm_jax.data.values.vocabulary import Vocabulary
from dlrm_jax.serving.artifact.errors import BadRequest, TooLate, shown
from dlrm_jax.serving.artifact.raw_bags import UNKNOWN, BagReader, bag_readers, plain_bag
from dlrm_jax.serving.artifact.raw_values import Column, Refused, dense_of, plain_number, with_points
from dlrm_jax.serving.artifact.signature import Signature

Row = Mapping[str, Any]
Inputs = tuple[np.ndarray, np.ndarray, dict[str, int]]


class Reader:
    """Turns rows into (dense_BxN float32, ids_BxK int32, unknown values by feature)."""

    def __init__(self, signature: Signature, vocabularies: Mapping[str, Vocabulary], max_bag: int = 1000) -> None:
        self._signature = signature
        self._schema = schema_from_dict(dict(signature.schema)) if signature.schema is not None else None
        if self._schema is None:
            self._dense: list[tuple[str, Column]] = [(name, plain_number) for name in signature.dense_names]
            self._bags = [plain_bag(f.name, f.rows, f.hotness) for f in signature.features]
            self._allowed: frozenset[str] = frozenset()
        else:
            nulls = frozenset(self._schema.null_values)
            decimal = self._schema.decimal
            self._dense = [(d.source, with_points(dense_of(d, nulls), decimal, nulls)) for d in self._schema.dense]
            self._bags = bag_readers(self._schema, signature, vocabularies, max_bag)
            self._allowed = frozenset(_unused_columns(self._schema))
        read = [name for name, _ in self._dense] + [name for bag in self._bags for name, _ in bag.columns]
        self.columns = tuple(dict.fromkeys(read))
        """What a row must have, under these names."""
        self._required = frozenset(self.columns)
        self._statistics = signature.dense_statistics or {}
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
        for reader, feature in zip(self._bags, self._signature.features, strict=True):
            hotness = feature.hotness
            for row, bag in enumerate(self._bags_of(feature.name, reader, rows, shared, deadline)):
                if bag:
                    ids_BxK[row, start : start + len(bag)] = bag
            slots = ids_BxK[:, start : start + hotness]
            missed = slots == UNKNOWN
            if missed.any():
                unknown[feature.name] = int(missed.sum())
                slots[missed] = reader.when_unknown
            start += hotness
        return dense_BxN, ids_BxK, unknown

    def ids(self, feature: str, *values: Any) -> list[int]:
        """The bag of one feature, of its column's value, or of a cross of its columns'; BadRequest for a wrong one.

        A value that training did not have is UNKNOWN (-2).
        """
        names = [served.name for served in self._signature.features]
        reader = self._bags[names.index(feature)]
        try:
            read = [column(value) for (_, column), value in zip(reader.columns, values, strict=True)]
            bag: list[int] = read[0] if reader.combine is None else reader.combine(read)
        except Refused as refused:
            raise BadRequest(f"feature {feature!r}: {refused}") from None
        return bag

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

    def _bags_of(
        self, name: str, reader: BagReader, rows: Sequence[Row], shared: Row, deadline: float | None
    ) -> list[list[int]]:
        columns = [self._column(rows, shared, column, read, deadline) for column, read in reader.columns]
        if reader.combine is None:
            return columns[0]
        out = []
        for i, values in enumerate(zip(*columns, strict=True)):
            try:
                out.append(reader.combine(values))
            except Refused as refused:
                raise BadRequest(f"row {i}, feature {name!r}: {refused}") from None
        return out

    def _column(self, rows: Sequence[Row], shared: Row, name: str, read: Column, deadline: float | None) -> list[Any]:
        if name in shared:
            try:
                return [read(shared[name])] * len(rows)
            except Refused as refused:
                raise BadRequest(f"shared, feature {name!r}: {refused}") from None
        out = []
        for i, row in enumerate(rows):
            try:
                out.append(read(row[name]))
            except Refused as refused:
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


def _unused_columns(schema: Schema) -> list[str]:
    """Columns of the log that a row may have, and that a score does not need."""
    return [name for name in (schema.label.column, schema.weight, schema.timestamp, schema.split.column) if name]
