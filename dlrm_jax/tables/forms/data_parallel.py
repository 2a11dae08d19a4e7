"""data_parallel tables: looked up at home, kept equal by exchanging (ids, gradient rows), never a table's gradient.

On one device nothing is exchanged, and this is how every table of a single device is looked up and updated.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.tables.collective import ExchangeOptions, from_everywhere
from dlrm_jax.tables.forms.bags import States, Updates, pool_bags, row_gradients, update_bags, update_rows
from dlrm_jax.tables.layout import Stack
from dlrm_jax.tables.rules import Arrays
from dlrm_jax.tables.updates import SparseGrad, merge_duplicates


def sent_rows(stack: Stack, batch: int) -> int:
    """Gradient rows that each device sends of `batch` examples: no more than its ids, nor than the tables' rows."""
    slots_T = np.bincount(stack.table_K, minlength=len(stack.tables))
    sizes = [table.num_embeddings for table in stack.tables]
    return int(sum(min(size, batch * int(slots)) for size, slots in zip(sizes, slots_T, strict=True)))


def route(stack: Stack, ids_bxk: jax.Array, scale_bxk: jax.Array | None, options: ExchangeOptions) -> Arrays:
    """Row numbers of the device's own examples, and what their rows are multiplied with."""
    del options
    offset_k = np.array(stack.offset_T, np.int32)[stack.table_K]
    rows = {"rows": jnp.where(ids_bxk < 0, ids_bxk, ids_bxk + offset_k[None])}
    return rows if scale_bxk is None else rows | {"scale": scale_bxk}


def lookup(
    stack: Stack, tables: Arrays, routes: Arrays, options: ExchangeOptions, take: Any = None
) -> tuple[jax.Array, Arrays]:
    """pooled_bxfxD."""
    del options
    return pool_bags(stack, tables, routes["rows"], routes.get("scale"), stack.hotness, take), routes


def update(
    stack: Stack,
    updates: Updates,
    tables: Arrays,
    states: States,
    routes: Arrays,
    d_pooled: jax.Array,
    options: ExchangeOptions,
) -> tuple[Arrays, States]:
    """Every device sends its gradient rows, those of one id merged where that makes them fewer, and applies all."""
    del options
    bags = (routes["rows"], routes.get("scale"), stack.hotness, d_pooled)
    if stack.num_shards * stack.num_copies == 1:
        return update_bags(stack, updates, tables, states, *bags)
    grad = row_gradients(stack, tables, *bags)
    most = sent_rows(stack, routes["rows"].shape[0])
    if most < len(grad.ids_M):
        merged = merge_duplicates(grad, stack.rows)
        grad = SparseGrad(merged.ids_M[:most], merged.rows_MxD[:most])
    grad = jax.tree.map(lambda x: from_everywhere(x, stack.num_copies, stack.num_shards), grad)
    return update_rows(stack, updates, tables, states, grad)


def sent(stack: Stack, batch: int, columns: int, scales: bool, options: ExchangeOptions) -> list[tuple[str, int, int]]:
    """(kind, devices that take part, bytes) of each collective of a step; `batch` examples and `columns` a row."""
    del scales, options
    devices = stack.num_shards * stack.num_copies
    rows = min(sent_rows(stack, batch), batch * len(stack.slots)) * devices
    return [("all-gather", devices, rows * 4), ("all-gather", devices, rows * columns * 4)]
