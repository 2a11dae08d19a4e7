"""Tables that grew: the rows that there were, and those that were born since.

A new row has the weights that it would have had from the start: the hash of (seed, table name, row, column) that draws
a table (init.py), at the scale of the table's new size. Nothing is kept of it yet: its slots hold their first values.
"""

from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import ModelConfig, TableConfig
from dlrm_jax.tables.dtypes import table_dtype
from dlrm_jax.tables.init import born_rows
from dlrm_jax.tables.reshard import Kind, Rows

WEIGHTS = "tables"
"""Kind.group of weights; of slots it is another."""


class Grown:
    """`before`'s rows of the tables `old`, by name, and beyond them those that `model`'s tables have more.

    Of tables without a place in `with_slots` all slots are new. A weight of another type is rounded to the nearest.
    """

    def __init__(
        self, before: Rows, old: Mapping[str, TableConfig], model: ModelConfig, seed: int, with_slots: Collection[str]
    ) -> None:
        self._before, self._old, self._model, self._seed, self._with_slots = before, old, model, seed, with_slots

    def rows(self, kind: Kind, table: str, first: int, step: int, count: int) -> np.ndarray:
        """(count, columns): logical rows first, first + step, ... of a table."""
        there = self._old[table].num_embeddings if table in self._old else 0
        if kind.group != WEIGHTS and table not in self._with_slots:
            there = 0
        taken = min(count, max(0, -(-(there - first) // step)))
        parts = [self._taken(kind, table, first, step, taken)] if taken else []
        if taken < count:
            parts.append(self._born(kind, self._model.table(table), first + step * np.arange(taken, count)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _taken(self, kind: Kind, table: str, first: int, step: int, count: int) -> np.ndarray:
        rows = self._before.rows(kind, table, first, step, count)
        then, now = self._old[table].dtype, self._model.table(table).dtype
        if kind.group != WEIGHTS or kind.weights or then == now:
            return rows
        return np.asarray(table_dtype(now).from_floats(jnp.asarray(table_dtype(then).to_floats(rows))))

    def _born(self, kind: Kind, table: TableConfig, row_R: np.ndarray) -> np.ndarray:
        if kind.group == WEIGHTS and not kind.weights:
            return born_rows(self._model, table, self._seed, row_R)
        return np.full((len(row_R), 1 if kind.per_row else table.embedding_dim), kind.first, kind.dtype)
