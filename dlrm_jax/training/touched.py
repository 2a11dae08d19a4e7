"""Which rows of the tables some batches named: a step moves these alone, so that all others have the bits they had.

Marked on the host, from the ids as they travel, a window of batches at a time: the compiled step is the same with it
and without, whoever looks up and updates (XLA, kernels), wherever tables lie, and no device waits or holds anything.
"""

from typing import Any

import numpy as np

from dlrm_jax.config import ModelConfig
from dlrm_jax.host import processes
from dlrm_jax.planning.cost import marks_bytes
from dlrm_jax.tables.id_maps import row_numbers

_PIECE = 1 << 15
"""Ids that are marked at a time."""


class Touched:
    """A mark for each row of a model's tables, one byte each (planning.cost.marks_bytes)."""

    def __init__(self, model: ModelConfig) -> None:
        starts = np.cumsum([0, *(feature.hotness for feature in model.features)])
        # Before each table is a mark more, which empty slots set: their id is -1.
        ends = np.cumsum([table.num_embeddings + 1 for table in model.tables])
        self._marks = np.zeros(marks_bytes(model), bool)
        self._first = {
            table.name: int(end) - table.num_embeddings for table, end in zip(model.tables, ends, strict=True)
        }
        self._rows = {table.name: table.num_embeddings for table in model.tables}
        self._lookups = [
            (slice(starts[one.feature], starts[one.feature + 1]), one.part, self._first[one.part.table])
            for one in model.lookups
        ]
        self._plain = all(part.id_map == "same" for _, part, _ in self._lookups)
        self._first_K = np.zeros(model.num_slots, np.int64)
        for slots, _, first in self._lookups:
            self._first_K[slots] = first
        self._plain &= len(self._lookups) == len(model.features)
        self._table_K = [feature.table for feature in model.features for _ in range(feature.hotness)]

    def see(self, ids_RxK: np.ndarray) -> None:
        """Mark what examples ask for, a few at a time: their row numbers then stay in a core's cache.

        Of a small table all rows are soon marked, and its columns are no longer looked at.
        """
        columns: Any = slice(None)
        if self._plain:
            full = {table for table in self._rows if self.of(table).all()}
            left = [k for k, table in enumerate(self._table_K) if table not in full]
            columns = left if len(left) < len(self._table_K) else columns
        piece = max(1, _PIECE // max(1, ids_RxK.shape[1]))
        for start in range(0, len(ids_RxK), piece):
            self._see(ids_RxK[start : start + piece], columns)

    def _see(self, ids_RxK: np.ndarray, columns: Any) -> None:
        if self._plain:
            self._marks[ids_RxK[:, columns] + self._first_K[columns]] = True
            return
        for slots, part, first in self._lookups:
            self._marks[row_numbers(part, self._rows[part.table], ids_RxK[:, slots]).astype(np.int64) + first] = True

    def of(self, table: str) -> np.ndarray:
        """Whether each row of a table was asked for."""
        return self._marks[self._first[table] :][: self._rows[table]]

    def rows(self) -> dict[str, np.ndarray]:
        """The rows that were asked for, rising, by table."""
        return {table: np.flatnonzero(self.of(table)) for table in self._rows}

    def mark(self, table: str, row_M: np.ndarray) -> None:
        """Mark rows of a table that something else than a step has moved."""
        self.of(table)[row_M] = True

    def join(self) -> None:
        """Mark what the batches of other processes named too; every process must ask."""
        if processes.count() > 1:
            of_each = processes.of_all(np.packbits(self._marks))
            self._marks[:] = np.unpackbits(np.bitwise_or.reduce(of_each), count=len(self._marks))

    def clear(self) -> None:
        """Forget all."""
        self._marks[:] = False
