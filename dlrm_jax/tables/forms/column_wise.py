"""column_wise tables: every shard looks up its columns for all of its copy's examples, and sends them home."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.host.mesh import MODEL
from dlrm_jax.tables.collective import ExchangeOptions, from_all, from_copies, sum_over_shards, to_owners
from dlrm_jax.tables.forms.bags import (
    States,
    Updates,
    learns_weights,
    pool_bags,
    row_gradients,
    update_bags,
    update_rows,
)
from dlrm_jax.tables.layout import Stack
from dlrm_jax.tables.rules import Arrays


def route(stack: Stack, ids_bxk: jax.Array, scale_bxk: jax.Array | None, options: ExchangeOptions) -> Arrays:
    """Row numbers of all the copy's examples, and their scales, which are sent only where ids do not say them."""
    del options
    offset_k = np.array(stack.offset_T, np.int32)[stack.table_K]
    rows = {"rows": from_all(jnp.where(ids_bxk < 0, -1, ids_bxk + offset_k[None]), MODEL, stack.num_shards)}
    return rows if scale_bxk is None else rows | {"scale": from_all(scale_bxk, MODEL, stack.num_shards)}


def lookup(
    stack: Stack, tables: Arrays, routes: Arrays, options: ExchangeOptions, take: Any = None
) -> tuple[jax.Array, Arrays]:
    """pooled_bxfxD, its columns from every shard."""
    pooled_Bxfxw = pool_bags(stack, tables, routes["rows"], routes.get("scale"), stack.hotness, take)
    shards = stack.num_shards
    parts_Sxbxfxw = to_owners(pooled_Bxfxw.reshape(shards, -1, *pooled_Bxfxw.shape[1:]), shards, options.dtype)
    pooled_bxfxD = jnp.moveaxis(parts_Sxbxfxw, 0, 2).reshape(*parts_Sxbxfxw.shape[1:3], -1)
    return pooled_bxfxD[:, :, : stack.dim], routes


def update(
    stack: Stack,
    updates: Updates,
    tables: Arrays,
    states: States,
    routes: Arrays,
    d_pooled: jax.Array,
    options: ExchangeOptions,
) -> tuple[Arrays, States]:
    """Each shard gets its columns of every example's gradient; means over a row are agreed on by a sum."""
    shards, width = stack.num_shards, stack.width
    padded = jnp.pad(d_pooled, ((0, 0), (0, 0), (0, shards * width - stack.dim)))
    parts_Sxbxfxw = jnp.moveaxis(padded.reshape(*padded.shape[:2], shards, width), 2, 0)
    d_Bxfxw = to_owners(parts_Sxbxfxw, shards, options.dtype).reshape(-1, *parts_Sxbxfxw.shape[2:])
    everyones = {name: from_copies(x, stack.num_copies) for name, x in routes.items()}
    d_Bxfxw = from_copies(d_Bxfxw, stack.num_copies)
    bags = (everyones["rows"], everyones.get("scale"), stack.hotness, d_Bxfxw)
    if not learns_weights(stack, tables):
        return update_bags(stack, updates, tables, states, *bags)
    grad = row_gradients(stack, tables, *bags)
    d_weights = sum_over_shards(grad.rows_MxD[:, width:], shards)  # A weight's gradient is a sum over all columns.
    grad = grad.replace(rows_MxD=jnp.concatenate([grad.rows_MxD[:, :width], d_weights], axis=1))
    return update_rows(stack, updates, tables, states, grad)


def sent(stack: Stack, batch: int, columns: int, scales: bool, options: ExchangeOptions) -> list[tuple[str, int, int]]:
    """(kind, devices that take part, bytes) of each collective of a step but for what its rule sums over a row."""
    shards, copies, slots = stack.num_shards, stack.num_copies, len(stack.slots)
    found = []
    for _ in range(1 + scales):
        found.append(("all-gather", shards, shards * batch * slots * 4))
        found.append(("all-gather", copies, copies * shards * batch * slots * 4))
    pooled = shards * batch * len(stack.features) * stack.width
    found += [("all-to-all", shards, pooled * options.float_bytes)] * 2
    found.append(("all-gather", copies, copies * pooled * 4))
    if columns > stack.dim:
        found.append(("all-reduce", shards, copies * shards * batch * slots * 4))
    return found
