"""Row-sparse updates: the gradients of a batch's id slots become steps of the rows that they name, and of no other.

A gradient is a `SparseGrad`, one row per id slot; ids repeat within a batch. A linear rule adds repeats as they come.
Others square, so repeats are summed first (`merge_duplicates`), which makes an update equal to the dense formula.

All slots of a bag have the same gradient but for a factor. `BagGrad` says so, and an update from it works through the
slots in pieces, so that no row per slot is ever written down: with 100 ids in a bag that is most of a step's traffic.
Pieces of 4 slots, ids sorted, of table rows 2, 2, 5, 5 | 5, 7, 7, 9: the first piece updates row 2 and leaves the sum
of 5 waiting, as its slots may go on; the second adds its 5, updates 5 and 7, and leaves 9 waiting, which the padding
behind the last slot flushes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlrm_jax.host.formulations import sort_ids
from dlrm_jax.tables.dtypes import FLOAT32, TableDtype
from dlrm_jax.tables.rows import (
    add_rows,
    add_unique_rows,
    num_rows,
    set_unique_rows,
    take_rows,
)
from dlrm_jax.tables.rules import Arrays, Rows, Rule

SUM = "sum_of_squares"
NOT_FINITE = "not_finite"
"""Counter of an update: more than 0 where a row's gradients, or their sum, are NaN or infinite."""

PIECE = 4096
"""Slots that an update by bags merges at a time: their rows stay in a core's cache."""


class SparseGrad(struct.PyTreeNode):
    """Gradient of a (V, D) table in M rows: `rows_MxD[m]` belongs to row `ids_M[m]`; ids outside [0, V) are void."""

    ids_M: jax.Array
    rows_MxD: jax.Array


class BagGrad(struct.PyTreeNode):
    """Gradient of N bags of h slots: `d_bags_NxD[n]`, times `scale_hxN[j, n]` if given, belongs to row `ids_hxN[j, n]`.

    Ids outside the table are void. Their scale need not be 0.
    """

    ids_hxN: jax.Array
    scale_hxN: jax.Array | None
    d_bags_NxD: jax.Array


class Noise(NamedTuple):
    """32 random bits for each number of a row, in two steps, so that a kernel may take the second by itself.

    of_rows: row numbers (M,) -> (M, 2), what stands for each row.
    bits: (the first of these, the second, columns), of one shape or broadcast to it -> bits.
    """

    of_rows: Callable[[jax.Array], jax.Array]
    bits: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    columns_w: jax.Array

    def __call__(self, rows_M: jax.Array) -> jax.Array:
        """(M, w): those of rows by number."""
        keys_Mx2 = self.of_rows(rows_M)
        return self.bits(keys_Mx2[:, :1], keys_Mx2[:, 1:], self.columns_w[None])


class Stored(NamedTuple):
    """A table's array and the slots of its rule, by name."""

    weights: jax.Array
    slots: Arrays


Segments = Callable[["Update", tuple[BagGrad, ...], Stored], Stored]
"""`Update.by_bags` by a kernel (tables/kernels), which adds to NOT_FINITE where that is among the slots."""


def _mean(rows_MxD: jax.Array) -> jax.Array:
    return jnp.mean(rows_MxD, axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Update:
    """One update of a table: its rule, the rate, the number of the update (from 1 on).

    `row_mean`, (M, D) to (M, 1), and `dim` are given where a row's columns lie on several devices. `noise` is
    given where weights are stored as a `dtype` that rounds them. Gradients are multiplied with `factor` first. Where
    there are `segments`, a kernel, they merge and update in place of XLA.
    """

    rule: Rule
    rate: jax.Array
    count: jax.Array
    row_mean: Callable[[jax.Array], jax.Array] = _mean
    dim: int = 0
    dtype: TableDtype = FLOAT32
    noise: Noise | None = None
    factor: jax.Array | float = 1.0
    segments: Segments | None = None

    def by_rows(self, grad: SparseGrad, stored: Stored) -> Stored:
        """The table after the gradient of its slots, in place if donated."""
        if self.segments is not None:
            return self.segments(self, (BagGrad(grad.ids_M[None], None, grad.rows_MxD),), stored)
        if self.rule.linear and self.noise is None:
            added_MxD, _ = self.rule.step(self._seen(grad.rows_MxD, grad.rows_MxD, {}))
            return Stored(add_rows(stored.weights, grad.ids_M, added_MxD), stored.slots)
        return self.of_merged(merge_duplicates(grad, num_rows(stored.weights, grad.rows_MxD.shape[1])), stored)

    def by_all_rows(self, gradient_MxD: jax.Array, stored: Stored) -> Stored:
        """The table after a gradient of all of its rows."""
        return self.of_merged(SparseGrad(jnp.arange(len(gradient_MxD), dtype=jnp.int32), gradient_MxD), stored)

    def by_bags(self, bags: tuple[BagGrad, ...], stored: Stored) -> Stored:
        """`by_rows` by the bags of one or more hotnesses, together one gradient."""
        if self.segments is not None:
            return self.segments(self, bags, stored)
        if self.rule.linear and self.noise is None:
            return Stored(self._add_bags(bags, stored.weights), stored.slots)
        return self._in_pieces(bags, stored)

    def _seen(self, grad_MxD: jax.Array, weights_MxD: jax.Array, old: Arrays) -> Rows:
        dim = self.dim or grad_MxD.shape[1]
        if not isinstance(self.factor, float):
            grad_MxD = grad_MxD * self.factor
        return Rows(grad_MxD, weights_MxD, old, self.rate, self.count, self.row_mean, dim, self.factor)

    def of_merged(self, merged: SparseGrad, stored: Stored) -> Stored:
        """The table after a gradient of rows that are inside it at most once each."""
        # A slot that merging emptied has id V: it reads row V - 1 (clamped), adds nothing, and its writes are dropped.
        ids_M, width = merged.ids_M, merged.rows_MxD.shape[1]
        old = {s.name: take_rows(stored.slots[s.name], ids_M, s.width(width)) for s in self.rule.slots}
        # Compiled away where nobody looks at them.
        weights_MxD = self.dtype.to_floats(take_rows(stored.weights, ids_M, width))
        added_MxD, new = self.rule.step(self._seen(merged.rows_MxD, weights_MxD, old))
        slots = {}
        for slot in self.rule.slots:
            array, name = stored.slots[slot.name], slot.name
            if slot.adds:
                slots[name] = add_unique_rows(array, ids_M, old[name], new[name])
            else:
                slots[name] = set_unique_rows(array, ids_M, new[name])
        if self.noise is None:
            return Stored(add_rows(stored.weights, ids_M, added_MxD), slots)
        rounded_MxD = self.dtype.from_floats(weights_MxD + added_MxD, self.noise(ids_M))
        return Stored(set_unique_rows(stored.weights, ids_M, rounded_MxD), slots)

    def _add_bags(self, bags: tuple[BagGrad, ...], table: jax.Array) -> jax.Array:
        for grad in bags:
            steps_NxD, _ = self.rule.step(self._seen(grad.d_bags_NxD, grad.d_bags_NxD, {}))

            def add(table: jax.Array, slot: Any, steps_NxD: jax.Array = steps_NxD) -> tuple[jax.Array, None]:
                ids_N, scale_N = slot
                return add_rows(table, ids_N, steps_NxD if scale_N is None else steps_NxD * scale_N[:, None]), None

            table, _ = jax.lax.scan(add, table, (grad.ids_hxN, grad.scale_hxN))
        return table

    def _in_pieces(self, bags: tuple[BagGrad, ...], stored: Stored) -> Stored:
        """Merge and update PIECE sorted slots at a time; an id whose slots go on in the next piece waits for it."""
        width = bags[0].d_bags_NxD.shape[1]
        void = num_rows(stored.weights, width)
        ids_M, bag_M, scale_M, d_bags = flat_slots(bags)
        sorted_ids_M, order_M = sort_ids(jnp.where((ids_M >= 0) & (ids_M < void), ids_M, void))
        # At least one void slot follows the last id, so that none waits in the end.
        padding = -(len(ids_M) + 1) % PIECE + 1
        sorted_ids_M = jnp.pad(sorted_ids_M, (0, padding), constant_values=void)
        pieces = (sorted_ids_M.reshape(-1, PIECE), jnp.pad(order_M, (0, padding)).reshape(-1, PIECE))

        def update_piece(carry: tuple[Any, ...], piece: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            stored, waiting_id, waiting_D = carry
            ids_P, slots_P = piece
            rows_PxD = d_bags.at[bag_M[slots_P]].get(mode="promise_in_bounds")
            if scale_M is not None:
                rows_PxD = rows_PxD * scale_M[slots_P][:, None]
            segment_P = jnp.cumsum((ids_P != jnp.concatenate([waiting_id[None], ids_P[:-1]])).astype(jnp.int32))
            last = segment_P[-1]
            sums = jnp.zeros((PIECE + 1, width), rows_PxD.dtype).at[0].set(waiting_D)
            sums = sums.at[segment_P].add(rows_PxD, indices_are_sorted=True, mode="promise_in_bounds")
            ids = jnp.full(PIECE + 1, void, jnp.int32).at[0].set(waiting_id)
            ids = ids.at[segment_P].set(ids_P, indices_are_sorted=True, mode="promise_in_bounds").at[last].set(void)
            return (self.of_merged(SparseGrad(ids, sums), stored), ids_P[-1], sums[last]), None

        start = (stored, jnp.int32(void), jnp.zeros(width, d_bags.dtype))
        return jax.lax.scan(update_piece, start, pieces)[0][0]


class _Still(Rule):
    """No update; gradients are merged for it as for rules that square them."""


@dataclasses.dataclass(frozen=True)
class Squares(Update):
    """Instead of an update: the squares of the rows' gradients, merged and with `l2` of the rows, are added to a slot.

    The slot is `SUM`, one number; the table is only read.
    """

    l2: float = 0.0

    def of_merged(self, merged: SparseGrad, stored: Stored) -> Stored:
        """The table, and SUM with this gradient's squares added."""
        ids_M, rows_MxD = merged.ids_M, merged.rows_MxD
        if self.l2:
            rows_MxD = rows_MxD + self.l2 * self.dtype.to_floats(take_rows(stored.weights, ids_M, rows_MxD.shape[1]))
        inside_M = ids_M < num_rows(stored.weights, rows_MxD.shape[1])
        added = jnp.where(inside_M[:, None], jnp.square(rows_MxD), 0).sum()
        return Stored(stored.weights, {SUM: stored.slots[SUM] + added})


def squares(dtype: TableDtype = FLOAT32, l2: float = 0.0) -> Squares:
    """The Squares of a table of a dtype."""
    return Squares(_Still(), jnp.float32(0), jnp.int32(1), dtype=dtype, l2=l2)


def merge_duplicates(grad: SparseGrad, num_rows: int) -> SparseGrad:
    """The same gradient with every id at most once: rows of equal ids summed in slot order; the rest get id `num_rows`.

    Sorting costs O(M log M) and no array grows with the table. The sums are deterministic.
    """
    num_slots = grad.ids_M.shape[0]
    valid_M = (grad.ids_M >= 0) & (grad.ids_M < num_rows)
    sorted_ids_M, order_M = sort_ids(jnp.where(valid_M, grad.ids_M, num_rows))
    starts_M = jnp.concatenate([jnp.ones(1, bool), sorted_ids_M[1:] != sorted_ids_M[:-1]])
    segment_M = jnp.cumsum(starts_M.astype(jnp.int32)) - 1
    rows_MxD = jax.ops.segment_sum(grad.rows_MxD[order_M], segment_M, num_segments=num_slots, indices_are_sorted=True)
    ids_M = jnp.full(num_slots, num_rows, jnp.int32).at[segment_M].set(sorted_ids_M, indices_are_sorted=True)
    return SparseGrad(ids_M=ids_M, rows_MxD=rows_MxD)


def flat_slots(bags: tuple[BagGrad, ...]) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """(ids of all slots, each one's bag, each one's scale or None, all bags' gradients)."""
    first, bag_of = 0, []
    for grad in bags:
        bag_of.append(
            np.broadcast_to(np.arange(first, first + grad.ids_hxN.shape[1], dtype=np.int32), grad.ids_hxN.shape)
        )
        first += grad.ids_hxN.shape[1]
    scales = [grad.scale_hxN.reshape(-1) for grad in bags if grad.scale_hxN is not None]
    return (
        jnp.concatenate([grad.ids_hxN.reshape(-1) for grad in bags]),
        jnp.concatenate([jnp.asarray(one).reshape(-1) for one in bag_of]),
        jnp.concatenate(scales) if scales else None,
        jnp.concatenate([grad.d_bags_NxD for grad in bags]),
    )
