"""The rows of a state's tables where they lie, read from its devices without a copy of a table.

Of several processes the first reads, and the others answer with the rows that they hold, until it is done: what it
reads, and what fails meanwhile, it alone knows.

    the first, in `reading`            the others, in `reading`
    array 0, rows 5 and 9        ->
                                <-     their rows, zeros in place of those that they have not
    done                         ->
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.host import processes
from dlrm_jax.tables.grown import WEIGHTS
from dlrm_jax.tables.reshard import Source
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.state import TrainState

_DONE = -1
"""In place of the number of an array: nothing is asked for any more."""
_PIECE_NUMBERS = 2**22
"""Numbers that processes send each other at a time."""


def live_rows(placed: Placed, state: TrainState) -> Source:
    """Rows of the weights of a state; it must not be given away meanwhile. Of several processes only in `reading`."""
    numbers = {name: number for number, name in enumerate(sorted(state.tables))}
    arrays = {WEIGHTS: state.tables}
    return Source(placed.stacks, lambda group, name: _OnDevices(arrays[group][name], numbers[name]))


@contextlib.contextmanager
def reading(state: TrainState) -> Iterator[bool]:
    """True in the first process, which may read the rows of a state inside; False in the others once it has left."""
    if not processes.is_first():
        _answer([state.tables[name] for name in sorted(state.tables)])
        yield False
        return
    try:
        yield True
    finally:
        if processes.count() > 1:
            processes.from_first(np.array([_DONE, 0], np.int32))


def _answer(arrays: Sequence[jax.Array]) -> None:
    while True:
        number, size = processes.from_first(np.zeros(2, np.int32))
        if number == _DONE:
            return
        array, row_M = arrays[number], processes.from_first(np.zeros(size, np.int32))
        processes.of_all(_bits(_held(array, row_M, _parts(array))))


class _OnDevices:
    """An array that is indexed by rows as NumPy's are; what is asked for comes to the host."""

    def __init__(self, array: jax.Array, number: int) -> None:
        self._array, self._number, self.shape = array, number, array.shape

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(self.shape[0]))
        array = self._array
        if array.is_fully_addressable or array.is_fully_replicated:
            return _held(array, rows, _parts(array) if array.is_fully_addressable else array.addressable_shards[:1])
        piece = max(1, _PIECE_NUMBERS // self.shape[1])
        return np.concatenate([self._of_all(rows[i : i + piece]) for i in range(0, max(len(rows), 1), piece)])

    def _of_all(self, rows: np.ndarray) -> np.ndarray:
        row_M = _padded(rows)
        processes.from_first(np.array([self._number, len(row_M)], np.int32))
        processes.from_first(row_M)
        parts = processes.of_all(_bits(_held(self._array, row_M, _parts(self._array))))
        # A row is of one process, and no bit of it is lost: -0.0 and NaN are what they were.
        return parts.sum(axis=0, dtype=parts.dtype)[: len(rows)].view(self._array.dtype)


def _parts(array: jax.Array) -> list[jax.Shard]:
    """What this process holds of an array; what several devices hold is of one of them."""
    return [shard for shard in array.addressable_shards if shard.replica_id == 0]


def _held(array: jax.Array, row_M: np.ndarray, parts: Sequence[jax.Shard]) -> np.ndarray:
    """(M, columns): rows of an array by its `parts`, zeros where they have none."""
    found = np.zeros((len(row_M), array.shape[1]), array.dtype)
    for part in parts:
        rows, columns = part.index
        first, stop, _ = rows.indices(array.shape[0])
        here = np.flatnonzero((first <= row_M) & (row_M < stop))
        if len(here):
            found[here, columns] = np.asarray(_taken(part.data, _padded(row_M[here] - first)))[: len(here)]
    return found


def _padded(row_M: np.ndarray) -> np.ndarray:
    """Row numbers and as many zeros behind as make their number a power of two, so that a few programs do for all."""
    size = 1 << max(len(row_M) - 1, 0).bit_length()
    return np.pad(row_M.astype(np.int32), (0, size - len(row_M)))


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.dtype.itemsize}")


@jax.jit
def _taken(array: jax.Array, row_M: jax.Array) -> jax.Array:
    return array.at[jnp.asarray(row_M)].get(mode="clip")
