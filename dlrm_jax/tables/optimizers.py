"""Row-sparse optimizers of the tables: (init, update) pairs that touch only the rows a batch looked up.

A gradient is a `SparseGrad`, one row per id slot; ids repeat within a batch. SGD is linear, so it adds repeats as
they come. Adagrad squares, so repeats are summed first (`merge_duplicates`), which makes it equal to the dense update.

All slots of a bag have the same gradient but for a factor. `BagGrad` says so, and an update from it works through the
slots in pieces, so that no row per slot is ever written down: with 100 ids in a bag that is most of a step's traffic.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlrm_jax.config import OptimizerConfig
from dlrm_jax.host.formulations import sort_ids
from dlrm_jax.tables.rows import LANES, add_rows, add_unique_rows, num_rows, take_rows

PIECE = 4096
"""Slots that Adagrad's update by bags merges at a time: their rows stay in a core's cache."""


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


class SparseOptimizer(NamedTuple):
    """`init(table, width) -> state`; `update(grad, state, table, rate) -> (table, state)`, in place if donated.

    `width` is a row's: the table's own, unless several rows share a line (rows.py). `update_bags` is `update` by the
    bags of one or more hotnesses, together one gradient.
    """

    init: Callable[[jax.Array, int], Any]
    update: Callable[[SparseGrad, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
    update_bags: Callable[[tuple[BagGrad, ...], Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


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


def sgd() -> SparseOptimizer:
    """w[r] -= lr * g[r]; no state."""

    def init(table: jax.Array, width: int) -> tuple[()]:
        del table, width
        return ()

    def update(grad: SparseGrad, state: tuple[()], table: jax.Array, rate: jax.Array) -> tuple[jax.Array, tuple[()]]:
        return add_rows(table, grad.ids_M, -rate * grad.rows_MxD), state

    def update_bags(
        bags: tuple[BagGrad, ...], state: tuple[()], table: jax.Array, rate: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        for grad in bags:
            steps_NxD = -rate * grad.d_bags_NxD

            def add(table: jax.Array, slot: Any, steps_NxD: jax.Array = steps_NxD) -> tuple[jax.Array, None]:
                ids_N, scale_N = slot
                return add_rows(table, ids_N, steps_NxD if scale_N is None else steps_NxD * scale_N[:, None]), None

            table, _ = jax.lax.scan(add, table, (grad.ids_hxN, grad.scale_hxN))
        return table, state

    return SparseOptimizer(init, update, update_bags)


def adagrad(eps: float) -> SparseOptimizer:
    """s[r] += g[r]^2, w[r] -= lr * g[r] / (sqrt(s[r]) + eps); state: one float per weight."""

    def init(table: jax.Array, width: int) -> jax.Array:
        del width
        return jnp.zeros_like(table)

    def update(grad: SparseGrad, sums: jax.Array, table: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        merged = merge_duplicates(grad, num_rows(table, grad.rows_MxD.shape[1]))
        return _adaptive_update(merged, jnp.square(merged.rows_MxD), sums, table, rate, eps)

    return SparseOptimizer(init, update, functools.partial(_update_in_pieces, jnp.square, eps))


def rowwise_adagrad(eps: float, mean_square: Callable[[jax.Array], jax.Array] | None = None) -> SparseOptimizer:
    """m[r] += mean_d(g[r, d]^2), w[r] -= lr * g[r] / (sqrt(m[r]) + eps); state: one float per row, as (V, 1).

    FBGEMM calls it EXACT_ROWWISE_ADAGRAD; the reference has it in optim/rwsadagrad.py. `mean_square`, (M, D) to
    (M, 1), is given where a row's columns lie on several devices. Of a table in lines of 128 lanes (rows.py) the state
    is kept in such lines too.
    """

    def init(table: jax.Array, width: int) -> jax.Array:
        rows = num_rows(table, width)
        shape = (rows, 1) if table.shape[1] == width else (-(-rows // LANES), LANES)
        return jnp.zeros(shape, table.dtype)

    def update(grad: SparseGrad, means: jax.Array, table: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        merged = merge_duplicates(grad, num_rows(table, grad.rows_MxD.shape[1]))
        return _adaptive_update(merged, squares_of(merged.rows_MxD), means, table, rate, eps)

    squares_of = mean_square or (lambda rows_MxD: jnp.mean(jnp.square(rows_MxD), axis=1, keepdims=True))
    return SparseOptimizer(init, update, functools.partial(_update_in_pieces, squares_of, eps))


def _adaptive_update(
    merged: SparseGrad, squares: jax.Array, accumulator: jax.Array, table: jax.Array, rate: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    # A slot that merging emptied has id V: it reads row V - 1 (clamped), adds nothing, and its writes are dropped.
    old = take_rows(accumulator, merged.ids_M, squares.shape[1])
    step = -rate * merged.rows_MxD / (jnp.sqrt(old + squares) + eps)
    table = add_rows(table, merged.ids_M, step)
    return table, add_unique_rows(accumulator, merged.ids_M, old, squares)


def _update_in_pieces(
    squares_of: Callable[[jax.Array], jax.Array],
    eps: float,
    bags: tuple[BagGrad, ...],
    accumulator: jax.Array,
    table: jax.Array,
    rate: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Merge and update PIECE sorted slots at a time; an id whose slots go on in the next piece waits for it."""
    width = bags[0].d_bags_NxD.shape[1]
    void = num_rows(table, width)
    ids_M, bag_M, scale_M, d_bags = _flat(bags)
    sorted_ids_M, order_M = sort_ids(jnp.where((ids_M >= 0) & (ids_M < void), ids_M, void))
    # At least one void slot follows the last id, so that none waits in the end.
    padding = -(len(ids_M) + 1) % PIECE + 1
    sorted_ids_M = jnp.pad(sorted_ids_M, (0, padding), constant_values=void)
    pieces = (sorted_ids_M.reshape(-1, PIECE), jnp.pad(order_M, (0, padding)).reshape(-1, PIECE))

    def update_piece(carry: tuple[jax.Array, ...], piece: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        table, accumulator, waiting_id, waiting_D = carry
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
        table, accumulator = _adaptive_update(SparseGrad(ids, sums), squares_of(sums), accumulator, table, rate, eps)
        return (table, accumulator, ids_P[-1], sums[last]), None

    start = (table, accumulator, jnp.int32(void), jnp.zeros(width, d_bags.dtype))
    (table, accumulator, _, _), _ = jax.lax.scan(update_piece, start, pieces)
    return table, accumulator


def _flat(bags: tuple[BagGrad, ...]) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
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


def make_sparse_optimizer(config: OptimizerConfig) -> SparseOptimizer:
    """The optimizer named `config.table`."""
    match config.table:
        case "sgd":
            return sgd()
        case "adagrad":
            return adagrad(config.eps)
        case "rowwise_adagrad":
            return rowwise_adagrad(config.eps)
        case name:
            raise ValueError(f"unknown table optimizer {name!r}")
