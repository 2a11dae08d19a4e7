"""Row-sparse optimizers of the tables: (init, update) pairs that touch only the rows a batch looked up.

A gradient is a `SparseGrad`, one row per id slot; ids repeat within a batch. SGD is linear, so it adds repeats as
they come. Adagrad squares, so repeats are summed first (`merge_duplicates`), which makes it equal to the dense update.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from dlrm_jax.config import OptimizerConfig
from dlrm_jax.rows import LANES, add_rows, add_unique_rows, num_rows, take_rows


class SparseGrad(struct.PyTreeNode):
    """Gradient of a (V, D) table in M rows: `rows_MxD[m]` belongs to row `ids_M[m]`; ids outside [0, V) are void."""

    ids_M: jax.Array
    rows_MxD: jax.Array


class SparseOptimizer(NamedTuple):
    """`init(table, width) -> state`; `update(grad, state, table, rate) -> (table, state)`, in place if donated.

    `width` is a row's: the table's own, unless several rows share a line (rows.py).
    """

    init: Callable[[jax.Array, int], Any]
    update: Callable[[SparseGrad, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


def merge_duplicates(grad: SparseGrad, num_rows: int) -> SparseGrad:
    """The same gradient with every id at most once: rows of equal ids summed in slot order; the rest get id `num_rows`.

    Sorting costs O(M log M) and no array grows with the table. The sums are deterministic.
    """
    num_slots = grad.ids_M.shape[0]
    valid_M = (grad.ids_M >= 0) & (grad.ids_M < num_rows)
    sorted_ids_M, order_M = jax.lax.sort_key_val(
        jnp.where(valid_M, grad.ids_M, num_rows), jnp.arange(num_slots, dtype=jnp.int32)
    )
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

    return SparseOptimizer(init, update)


def adagrad(eps: float) -> SparseOptimizer:
    """s[r] += g[r]^2, w[r] -= lr * g[r] / (sqrt(s[r]) + eps); state: one float per weight."""

    def init(table: jax.Array, width: int) -> jax.Array:
        del width
        return jnp.zeros_like(table)

    def update(grad: SparseGrad, sums: jax.Array, table: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        merged = merge_duplicates(grad, num_rows(table, grad.rows_MxD.shape[1]))
        return _adaptive_update(merged, jnp.square(merged.rows_MxD), sums, table, rate, eps)

    return SparseOptimizer(init, update)


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
        if mean_square is None:
            squares_Mx1 = jnp.mean(jnp.square(merged.rows_MxD), axis=1, keepdims=True)
        else:
            squares_Mx1 = mean_square(merged.rows_MxD)
        return _adaptive_update(merged, squares_Mx1, means, table, rate, eps)

    return SparseOptimizer(init, update)


def _adaptive_update(
    merged: SparseGrad, squares: jax.Array, accumulator: jax.Array, table: jax.Array, rate: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    # A slot that merging emptied has id V: it reads row V - 1 (clamped), adds nothing, and its writes are dropped.
    old = take_rows(accumulator, merged.ids_M, squares.shape[1])
    step = -rate * merged.rows_MxD / (jnp.sqrt(old + squares) + eps)
    table = add_rows(table, merged.ids_M, step)
    return table, add_unique_rows(accumulator, merged.ids_M, old, squares)


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
