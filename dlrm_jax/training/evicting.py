"""Rows that no example asked for in a while become what their table's out-of-vocabulary row is (`--evict_after`).

An evicted row has that row's weights, and nothing is kept of it: whoever asks for it later goes on from there. With
`after` 2, a row that period 3 asked for last is evicted behind period 5. Which rows those are follows from the periods
alone, so that a run that goes on need not remember it. Tables are made anew, through the host's memory, where a row is
evicted.
"""

import functools
from typing import Any

import numpy as np

from dlrm_jax.config import require
from dlrm_jax.data.read.dataset import Dataset, Rows
from dlrm_jax.data.schema.schema_io import from_dict as schema_from_dict
from dlrm_jax.host import processes
from dlrm_jax.tables import reshard
from dlrm_jax.tables.grown import WEIGHTS
from dlrm_jax.tables.reshard import Kind, Source
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.saved import TABLES, read_tables
from dlrm_jax.training.state import TrainState
from dlrm_jax.training.touched import Touched


class Eviction:
    """Evicts rows of the tables of `dataset` that have an out-of-vocabulary row, id 0; `periods` are its rows."""

    def __init__(self, placed: Placed, dataset: Dataset, periods: list[Rows], after: int) -> None:
        self._placed, self._periods, self._after = placed, periods, after
        tables = schema_from_dict(dict(dataset.schema)).tables() if dataset.schema else {}
        self._tables = {name for name, (rule, *_) in tables.items() if rule.oov}
        require(
            bool(self._tables),
            f"--evict_after={after}: no table of {dataset.name} has an out-of-vocabulary row; prepare with oov: true",
        )
        require(
            processes.count() == 1, f"--evict_after={after} is for one process; leave it out where there are several"
        )
        plain = dataset.expander is None and not any(feature.parts for feature in placed.model.features)
        require(
            plain,
            f"--evict_after={after} goes with tables whose rows are ids: leave --compress_tables and --multi_hot out",
        )
        self._seen = functools.lru_cache(maxsize=after + 1)(self._read)

    def __call__(self, state: TrainState, number: int) -> tuple[TrainState, dict[str, int]]:
        """(the state behind period `number` without what is evicted, rows evicted by table)."""
        rows = self.rows(number)
        counts = {table: len(own) for table, own in rows.items() if len(own)}
        if not counts:
            return state, counts
        arrays = {name: getattr(state, name) for name in TABLES}
        source = _Evicted(Source(self._placed.stacks, functools.partial(_array, arrays)), rows)
        abstract = {name: getattr(self._placed.abstract_state, name) for name in TABLES}
        return state.replace(**read_tables(source, self._placed, abstract, by_slot=True)), counts

    def rows(self, number: int) -> dict[str, np.ndarray]:
        """The rows of each table that are evicted behind period `number`."""
        if number < self._after:
            return {}
        last, *since = (self._seen(i) for i in range(number - self._after, number + 1))
        return {
            name: np.flatnonzero(asked & ~np.any([one[name] for one in since], axis=0)) for name, asked in last.items()
        }

    def _read(self, number: int) -> dict[str, np.ndarray]:
        """Which rows a period asks for, by table; the out-of-vocabulary row itself is never evicted."""
        touched = Touched(self._placed.model)
        for window, _ in self._periods[number].windows(0, 0, shuffle=False):
            touched.see(window.ids_RxK)
        seen = {name: touched.of(name).copy() for name in self._tables}
        for rows in seen.values():
            rows[0] = False
        return seen


def _array(arrays: dict[str, Any], group: str, name: str) -> np.ndarray:
    stack, _, slot = name.rpartition(".")
    return np.asarray(arrays[group][name] if group == WEIGHTS else arrays[group][stack][slot])


class _Evicted:
    """Rows of tables (reshard.Rows), those evicted as they are then."""

    def __init__(self, before: reshard.Rows, evicted: dict[str, np.ndarray]) -> None:
        self._before, self._evicted = before, evicted

    def rows(self, kind: Kind, table: str, first: int, step: int, count: int) -> np.ndarray:
        """(count, columns): logical rows first, first + step, ... of a table."""
        rows = self._before.rows(kind, table, first, step, count)
        gone = np.isin(first + step * np.arange(count), self._evicted.get(table, ()))
        if gone.any():
            rows = rows.copy()
            rows[gone] = self._before.rows(kind, table, 0, 1, 1) if kind.group == WEIGHTS else kind.first
        return rows
