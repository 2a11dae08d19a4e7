"""Tables saved under one plan, read under another, piece by piece: no process holds more than one device's shard.

A plan's layout (layout.py) says where a logical row of a table lies. Reading asks for every `step`-th logical row, as
a row-wise shard needs them, and gathers them from the stored array in strided slices, one for each stored shard.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from dlrm_jax.tables.forms.base import Stack
from dlrm_jax.tables.pooling import POOLING_WEIGHTS

_PIECE_FLOATS = 2**22
"""Floats read at a time."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """Which of a stack's arrays: `weights` the learned pooling weights', `per_row` with one number a row.

    `slot` is which of an optimizer's arrays; `first` is what rows of padding hold.
    """

    group: str
    weights: bool
    per_row: bool
    slot: str = ""
    first: float = 0.0
    dtype: str = "float32"

    def key(self, stack: Stack) -> str:
        """The array's name in its group."""
        name = stack.name + POOLING_WEIGHTS if self.weights else stack.name
        return f"{name}.{self.slot}" if self.slot else name


class Rows(Protocol):
    """Where logical rows of tables come from."""

    def rows(self, kind: Kind, table: str, first: int, step: int, count: int) -> np.ndarray:
        """(count, columns): logical rows first, first + step, ... of a table."""


class Source:
    """Logical rows of tables in stored arrays; `open_array(group, name)` gives what can be sliced like NumPy."""

    def __init__(self, stacks: tuple[Stack, ...], open_array: Callable[[str, str], Any]) -> None:
        self._open = open_array
        self._arrays: dict[tuple[str, str], Any] = {}
        self._where = {table.name: (stack, t) for stack in stacks for t, table in enumerate(stack.tables)}

    def rows(self, kind: Kind, table: str, first: int, step: int, count: int) -> np.ndarray:
        """(count, columns): logical rows first, first + step, ... of a table."""
        stack, t = self._where[table]
        array = self._array(kind.group, kind.key(stack))
        num_shards, found = stack.count_T[t], None
        # Row first + step * i lies on stored shard (first + step * i) mod num_shards: that repeats in i.
        period = num_shards // math.gcd(step, num_shards)
        for i in range(min(period, count)):
            row = first + step * i
            part = self._local_rows(
                stack,
                kind,
                array,
                stack.first_T[t] + row % num_shards,
                stack.offset_T[t] + row // num_shards,
                step * period // num_shards,
                -(-(count - i) // period),
            )
            if found is None:
                found = np.empty((count, part.shape[1]), part.dtype)
            found[i::period] = part
        assert found is not None
        return found

    def at(self, kind: Kind, table: str, row_M: np.ndarray) -> np.ndarray:
        """(M, columns): these logical rows of a table. The array must take row numbers, as NumPy's do."""
        stack, t = self._where[table]
        array = self._array(kind.group, kind.key(stack))
        width, parts = (1, 1) if kind.per_row else (stack.width, stack.column_shards)
        pack, lines = array.shape[1] // parts // width, array.shape[0] // stack.row_shards
        shard_M = stack.first_T[t] + row_M % stack.count_T[t]
        local_M = stack.offset_T[t] + row_M // stack.count_T[t]
        found = np.asarray(array[shard_M * lines + local_M // pack])
        if pack > 1:
            found = found.reshape(len(row_M), parts, pack, width)[np.arange(len(row_M)), :, local_M % pack]
        found = found.reshape(len(row_M), -1)
        return found if kind.per_row else found[:, : stack.dim]

    def _array(self, group: str, name: str) -> Any:
        if (group, name) not in self._arrays:
            self._arrays[group, name] = self._open(group, name)
        return self._arrays[group, name]

    def _local_rows(
        self, stack: Stack, kind: Kind, array: Any, shard: int, first: int, step: int, count: int
    ) -> np.ndarray:
        """Rows first, first + step, ... of one stored shard, all their columns."""
        width, parts = (1, 1) if kind.per_row else (stack.width, stack.column_shards)
        pack = array.shape[1] // parts // width
        lines = array.shape[0] // stack.row_shards
        last = first + step * (count - 1)
        if pack == 1:
            start = shard * lines + first
            found = np.asarray(array[start : start + step * (count - 1) + 1 : step])
        else:
            start = shard * lines
            whole = np.asarray(array[start + first // pack : start + last // pack + 1])
            by_part = whole.reshape(len(whole), parts, pack, width)
            found = np.moveaxis(by_part, 1, 2).reshape(len(whole) * pack, parts * width)
            found = found[first - first // pack * pack :][::step][:count]
        return found if kind.per_row else found[:, : stack.dim]


def read_array(source: Rows, kind: Kind, stack: Stack, shape: tuple[int, int], sharding: NamedSharding) -> jax.Array:
    """A stack's array under its own plan, each shard read for the device that holds it, one after the other."""
    place: Any = None
    shards: list[jax.Array] = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        if place != index:  # Copies of a shard come one after the other.
            place, rows = index, None  # The one before goes first.
            rows = _read_shard(source, kind, stack, shape, place)
        # Not all at once, as by make_array_from_callback, which holds them twice.
        shards.append(jax.block_until_ready(jax.device_put(rows, device)))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _read_shard(source: Rows, kind: Kind, stack: Stack, shape: tuple[int, int], index: tuple[slice, ...]) -> np.ndarray:
    width, parts = (1, 1) if kind.per_row else (stack.width, stack.column_shards)
    lines, lanes = shape[0] // stack.row_shards, shape[1] // parts
    shard = (index[0].start or 0) // lines + (index[1].start or 0) // lanes
    rows = np.full((lines * (lanes // width), width), kind.first, kind.dtype)
    columns = slice(shard * width, (shard + 1) * width) if parts > 1 else slice(None)
    for t in stack.tables_on(shard):
        residue = shard - stack.first_T[t] if stack.form.splits_rows else 0
        step = stack.count_T[t]
        held = -(-(stack.tables[t].num_embeddings - residue) // step)
        piece = max(1, _PIECE_FLOATS // (1 if kind.per_row else stack.dim))
        for start in range(0, held, piece):
            count = min(piece, held - start)
            found = source.rows(kind, stack.tables[t].name, residue + step * start, step, count)[:, columns]
            local = stack.offset_T[t] + start
            rows[local : local + count, : found.shape[1]] = found
    return rows.reshape(lines, lanes)
