"""The data on the devices, by three roads: batches travel, or rows stay, or rows are made there from their positions.

A step gets (state, window) and cuts its batch out of the window, at the place that `state.step` says. Of rows that stay
or are made only an epoch's order travels; the order is the same on all three roads, and so is every bit.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlrm_jax.data import packed_rows
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.packed_rows import PackedRows, row_bytes, row_words
from dlrm_jax.data.read.dataset import BatchExpander, Dataset, Rows
from dlrm_jax.data.read.pipeline import (
    MOST_ROWS,
    MOST_STEPS,
    Cut,
    Prefetcher,
    batch_windows,
    made_batch,
    order_windows,
    steps_per_epoch,
    train_epochs,
    window_steps,
)
from dlrm_jax.data.read.windows import made_by_host
from dlrm_jax.host import memory, processes
from dlrm_jax.host.formulations import by_platform
from dlrm_jax.host.mesh import BATCH_SPEC, batch_sharding, replicated
from dlrm_jax.host.recycled import Recycler
from dlrm_jax.training.options import AUTO
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.placement import prediction
from dlrm_jax.training.run_config import ALWAYS, RunConfig

_SHARE = 0.5
"""Of the memory that a model leaves free, what rows may take: a prediction may be off, and windows travel too."""


class Window(struct.PyTreeNode):
    """T batches on the devices, that of step `first_step` first.

    Without `order_TxB` the `rows` are (T, B); with it they are all rows of a split, (R,), or there are none as they are
    made, and the order says which are in which batch; R stands for padding.
    """

    first_step: jax.Array
    rows: PackedRows | None
    order_TxB: jax.Array | None = None


Traveller = PackedRows | np.ndarray
"""What travels, on the host: rows or an order, (T, B)."""


@dataclasses.dataclass(frozen=True)
class Feed:
    """The windows of `split`, cut as `cut` says, on the devices of `mesh`, or on the default one.

    Where it is `resident` all its rows are on every device from the first window on; where it is `made` a step makes
    those of its batch. `row_bytes` are those that a device holds of each row that stays or is in a window.
    """

    split: Rows
    cut: Cut
    mesh: Mesh | None = None
    expander: BatchExpander | None = None
    resident: bool = False
    made: bool = False
    row_bytes: int = 0

    @functools.cached_property
    def shardings(self) -> Window | None:
        """How the parts of a window are placed: batches split over all devices; None on the default device."""
        if self.mesh is None:
            return None
        split, everywhere = NamedSharding(self.mesh, PartitionSpec(None, *BATCH_SPEC)), replicated(self.mesh)
        rows = None if self.made else everywhere if self.resident else split
        return Window(everywhere, rows, split if self._orders else None)

    @property
    def _orders(self) -> bool:
        """Whether only the order travels."""
        return self.resident or self.made

    @functools.cached_property
    def _rows(self) -> PackedRows | None:
        """All rows, on every device, where they stay."""
        if not self.resident:
            return None
        in_order = iter([self.split.sources(0, 0, shuffle=False)])
        (rows,) = batch_windows(in_order, Cut(len(self.split)))
        where = None if self.shardings is None else self.shardings.rows
        return self._placed(self._expanded(rows)[0].without_gaps(), where)

    def train_windows(
        self, seed: int, start_step: int, shuffle: bool, began_at: int = 0
    ) -> Prefetcher[Traveller, Window]:
        """(what travels, the window) from step `start_step` on, for ever; the first epoch begins at step `began_at`."""
        visit = "positions" if self._orders else "sources"
        position = start_step - began_at
        return self.windows(train_epochs(self.split, self.cut.batch_size, seed, position, shuffle, visit), start_step)

    def eval_windows(self) -> Prefetcher[Traveller, Window]:
        """The same of every row once, in order; behind the last row there may be batches of padding alone."""
        visit = self.split.positions if self._orders else self.split.sources
        return self.windows(iter([visit(0, 0, False)]), 0)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every row once."""
        return steps_per_epoch(len(self.split), self.cut.batch_size)

    def batch(self, window: Window, step: jax.Array) -> Batch:
        """The batch of a step, inside jit; a window is gone through again and again."""
        i = (step - window.first_step) % self.cut.steps
        batch = _as_from_outside(functools.partial(self._cut, window, i), i)
        return batch if self.mesh is None else jax.lax.with_sharding_constraint(batch, batch_sharding(self.mesh))

    def _cut(self, window: Window, i: jax.Array) -> Batch:
        at = functools.partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
        if self.made:
            batch = self._made(jnp, at(window.order_TxB))
        elif window.order_TxB is None:
            batch = jax.tree.map(at, window.rows).batch
        else:
            assert window.rows is not None
            batch = packed_rows.taken(jnp, window.rows, at(window.order_TxB)).batch
        if self.expander is not None and self.expander.on_device:
            batch = batch.replace(ids_BxK=self.expander.compute(jnp, batch.ids_BxK))
        return batch

    def host_batch(self, traveller: Traveller, i: int) -> Batch:
        """This process's part of batch `i` of what travelled, on the host."""
        if isinstance(traveller, PackedRows):
            return traveller[i].batch
        if self.made:
            return self._made(np, traveller[i])
        rows = jax.tree.map(lambda words: np.asarray(words.addressable_data(0)), self._rows)
        return packed_rows.taken(np, rows, traveller[i]).batch

    def host_ids(self, traveller: Traveller, first: int, stop: int) -> np.ndarray:
        """(examples, K): the ids of batches `first` to `stop` - 1 of what travelled, as steps see them, on the host."""
        if isinstance(traveller, PackedRows):
            ids = np.asarray(traveller[first:stop].batch.ids_BxK)
            ids = ids.reshape(-1, ids.shape[-1])
        else:
            order = traveller[first:stop].reshape(-1)
            order = order[order < len(self.split)]
            ids = self._host_ids(order)
        on_device = self.expander is not None and self.expander.on_device
        return self.expander.on_host(ids) if self.expander is not None and on_device else ids

    def windows(self, epochs: Iterator[Any], start_step: int) -> Prefetcher[Traveller, Window]:
        """The same of any epochs, each as `Rows.sources` has it, or where rows stay as `Rows.positions` has it."""
        source: Iterator[Traveller]
        if self._orders:
            source = order_windows(epochs, self.cut, len(self.split))
        else:
            source = map(self._expanded, batch_windows(epochs, self.cut))
        first_steps = itertools.count(start_step, self.cut.steps)
        return Prefetcher(source, lambda traveller: self.transfer(traveller, next(first_steps)))

    def transfer(self, traveller: Traveller, first_step: int = 0) -> Window:
        """What travels as a window on the devices."""
        here = np.int32(first_step)
        if isinstance(traveller, PackedRows):
            return self._placed(Window(here, traveller), self.shardings)
        where = self.shardings and dataclasses.replace(self.shardings, rows=None)
        return self._placed(Window(here, None, traveller), where).replace(rows=self._rows)

    @property
    def device_bytes(self) -> int:
        """Bytes that a device holds of rows that stay, or of a window."""
        rows = len(self.split) if self.resident else self.cut.steps * self.cut.rows
        sharing = 1 if self.resident or self.mesh is None else len(self.mesh.local_devices)
        return self.row_bytes * rows // sharing

    def _made(self, xp: Any, order_B: Any) -> Batch:
        assert self.split.maker is not None
        return made_batch(xp, self.split.maker, order_B, len(self.split))

    def _host_ids(self, order: np.ndarray) -> np.ndarray:
        """The ids of rows that do not travel."""
        if self.resident:
            return self._ids_here[order]
        assert self.split.maker is not None
        return made_by_host(self.split.maker, order)[1]

    @functools.cached_property
    def _ids_here(self) -> np.ndarray:
        """The ids of all rows that stay, on the host."""
        rows = jax.tree.map(lambda words: np.asarray(words.addressable_data(0)), self._rows)
        return np.ascontiguousarray(rows.batch.ids_BxK)

    def _expanded(self, rows: PackedRows) -> PackedRows:
        if self.expander is None or self.expander.on_device:
            return rows
        ids = np.asarray(rows.batch.ids_BxK)
        bags = self.expander.on_host(ids.reshape(-1, ids.shape[-1]))
        batch = rows.batch.replace(ids_BxK=bags.reshape(*ids.shape[:-1], -1))
        return packed_rows.of_batch(batch, self._memory.empty)

    @functools.cached_property
    def _memory(self) -> Recycler:
        """Of windows whose bags the host makes."""
        return Recycler()

    @staticmethod
    def _placed(values: Any, shardings: Any) -> Any:
        if shardings is None:
            return jax.device_put(values)

        def placed(to: NamedSharding, part: Any) -> Any:
            return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, to), part)

        return jax.tree.map(placed, shardings, values)


def _as_from_outside(cut: Callable[[], Batch], i: jax.Array) -> Batch:
    """What `cut` gives, whose making is not merged with what is computed of it.

    So a step's sums have the same bits, wherever its batch comes from. The compiler for CPUs drops a barrier before it
    merges operations, but does not merge across a condition, even one that always holds: `i` is never negative.
    """
    other = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(cut))
    batch: Batch = by_platform(
        lambda i: jax.lax.cond(i >= 0, cut, lambda: other), lambda _: jax.lax.optimization_barrier(cut()), i
    )
    return batch


class Room:
    """Memory beside the model of the device that has least, for rows that stay there; `--data_on_device` says how."""

    def __init__(self, config: RunConfig, placed: Placed) -> None:
        self._choice = config.data_on_device
        devices = jax.local_devices()
        free = [memory.device_available(device) or 0 for device in devices]
        if devices[0].platform == "cpu":  # They share the machine's.
            free = [(memory.host_available() or 0) // len(devices)]
        self._left = _SHARE * (min(free) - prediction(config, placed).bytes_held)
        self._all_left, self._allow = self._left / _SHARE, config.allow_oversubscription

    def keeps(self, num_bytes: int, can_be_made: bool = False) -> bool:
        """Whether rows of so many bytes stay, in all processes; then they have their room.

        Those that can be made stay where they must only: a step makes them about as fast as it looks them up, takes no
        memory for them, and does not wait until the host has made all of them.

        ConfigError where they must, by --data_on_device=always, and do not fit.
        """
        if self._choice == ALWAYS:
            needs = ("--data_on_device=always, beside the model,", num_bytes, self._all_left, "a device's memory")
            memory.require_room(*needs, "these rows", "--data_on_device=auto", self._allow)
            self._all_left -= num_bytes
        if self._choice != AUTO or can_be_made:
            return self._choice == ALWAYS
        if processes.largest(int(num_bytes > self._left)):
            return False
        self._left -= num_bytes
        return True


def make_feed(
    placed: Placed, dataset: Dataset, split: Rows, cut: Cut, room: Room | None = None, most_steps: int = MOST_STEPS
) -> Feed:
    """The windows of a split of `dataset` for a model, `cut` into batches; without `room` its rows travel.

    A window has as many batches as its bytes allow, at most `most_steps`.
    """
    expander = dataset.expander
    expands = expander is not None and expander.on_device
    slots = len(dataset.features) if expands else placed.model.num_slots
    num_dense = placed.model.num_dense
    here, travelling = row_bytes(num_dense, slots, placed.packed), 4 * row_words(num_dense, slots)
    can_be_made = split.maker is not None and len(split) <= MOST_ROWS and (expander is None or expands)
    resident = bool(len(split)) and room is not None and room.keeps(here * len(split), can_be_made)
    made = can_be_made and room is not None and not resident
    steps = window_steps(travelling, cut.batch_size, most_steps)
    if resident or made:
        steps = min(MOST_STEPS, most_steps)
    held = here if resident else 4 if made else travelling
    return Feed(split, dataclasses.replace(cut, steps=steps), placed.mesh, expander, resident, made, held)
