"""Sums of bags of rows, `pool`: all rows at once, or on CPUs in loops, which write no row down."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dlrm_jax.config import EMPTY_SLOT
from dlrm_jax.host.formulations import by_platform

POOLING_WEIGHTS = "/pooling_weights"
"""Suffix of the (rows, 1) array beside each stack when pooling weights are learned."""

IN_FLIGHT = 4
"""Rows of a bag that a CPU reads at a time; it waits for memory less, the more reads are under way."""

Take = Callable[[jax.Array, jax.Array], jax.Array]
"""(table, row numbers of any shape) -> float32 rows (..., D); what an empty slot reads counts for nothing."""


def read_rows(table_RxD: jax.Array, row_ids: jax.Array) -> jax.Array:
    """The rows of these numbers, (..., D), as they are stored; an empty slot reads row 0, and counts for nothing."""
    return table_RxD.at[jnp.maximum(row_ids, 0)].get(mode="promise_in_bounds")


def pool(take: Take, table: jax.Array, ids_BxGxh: jax.Array, scale_BxGxh: jax.Array | None) -> jax.Array:
    """(B, G, D) sums of bags of h rows, each times its scale if given; empty slots add nothing (their scale is 0)."""
    in_loops, whole = (functools.partial(function, take) for function in (pool_in_loops, pool_whole))
    return by_platform(in_loops, whole, table, ids_BxGxh, scale_BxGxh)


def pool_whole(take: Take, table: jax.Array, ids_BxGxh: jax.Array, scale_BxGxh: jax.Array | None) -> jax.Array:
    """`pool`, all rows at once: XLA for GPUs and TPUs sums them as it reads them."""
    return _read(take, table, ids_BxGxh, scale_BxGxh).sum(axis=2)


def pool_in_loops(take: Take, table: jax.Array, ids_BxGxh: jax.Array, scale_BxGxh: jax.Array | None) -> jax.Array:
    """`pool`, IN_FLIGHT rows of each bag at a time: CPUs would write all of them down before they sum."""
    batch, num_bags, hotness = ids_BxGxh.shape
    if hotness <= IN_FLIGHT:
        return _sum_of(take, table, ids_BxGxh.transpose(2, 0, 1), _first(scale_BxGxh))
    padding = -hotness % IN_FLIGHT

    def in_steps(slots: jax.Array, void: int) -> jax.Array:
        slots = jnp.pad(slots, ((0, 0), (0, 0), (0, padding)), constant_values=void)
        return slots.transpose(2, 0, 1).reshape((hotness + padding) // IN_FLIGHT, IN_FLIGHT, batch, num_bags)

    def add(sum_BxGxD: jax.Array, step: Any) -> tuple[jax.Array, None]:
        return sum_BxGxD + _sum_of(take, table, *step), None

    steps = in_steps(ids_BxGxh, EMPTY_SLOT), None if scale_BxGxh is None else in_steps(scale_BxGxh, 0)
    row = jax.eval_shape(take, table, jax.ShapeDtypeStruct((1,), jnp.int32))
    return jax.lax.scan(add, jnp.zeros((batch, num_bags, row.shape[1]), row.dtype), steps)[0]


def _first(scale_BxGxh: jax.Array | None) -> jax.Array | None:
    return None if scale_BxGxh is None else scale_BxGxh.transpose(2, 0, 1)


def _sum_of(take: Take, table: jax.Array, ids_hxBxG: jax.Array, scale_hxBxG: jax.Array | None) -> jax.Array:
    """(B, G, D): the sum over h, one read each."""
    rows = [
        _read(take, table, ids_hxBxG[j], None if scale_hxBxG is None else scale_hxBxG[j])
        for j in range(ids_hxBxG.shape[0])
    ]
    return sum(rows[1:], rows[0])


def _read(take: Take, table: jax.Array, ids: jax.Array, scale: jax.Array | None) -> jax.Array:
    """(..., D): each slot's row, times `scale` if given; zeros for an empty slot."""
    rows = take(table, ids)
    return jnp.where(ids[..., None] < 0, 0, rows) if scale is None else rows * scale[..., None]
