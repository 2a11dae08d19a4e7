"""column_wise tables: every shard looks up its columns for all of its copy's examples, and sends them home."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.host.mesh import MODEL
from dlrm_jax.tables.collective import from_all, from_copies, sum_over_shards, to_owners
from dlrm_jax.tables.embedding import sum_bags
from dlrm_jax.tables.forms.bags import apply_gradients, read_rows, scale_of, scaled, slot_gradients
from dlrm_jax.tables.layout import PlacedStack

Arrays = dict[str, Any]


def route(stack: PlacedStack, ids_bxk: jax.Array, scale_bxk: jax.Array, plain_scale: bool) -> Arrays:
    """Row numbers of all the copy's examples, and their scales, which are sent only where ids do not say them."""
    offset_k = np.array(stack.offset_T, np.int32)[stack.table_K]
    rows = from_all(jnp.where(ids_bxk < 0, -1, ids_bxk + offset_k[None]), MODEL, stack.num_shards)
    if plain_scale:
        return {"rows": rows}
    return {"rows": rows, "scale": from_all(scale_bxk, MODEL, stack.num_shards)}


def lookup(stack: PlacedStack, tables: Arrays, routes: Arrays, dtype: str) -> tuple[jax.Array, Arrays]:
    """pooled_bxfxD, its columns from every shard."""
    rows = read_rows(stack, tables, routes["rows"])
    pooled_Bxfxw = sum_bags(scaled(stack, rows, scale_of(routes)), stack.hotness)
    shards = stack.num_shards
    parts_Sxbxfxw = to_owners(pooled_Bxfxw.reshape(shards, -1, *pooled_Bxfxw.shape[1:]), shards, dtype)
    pooled_bxfxD = jnp.moveaxis(parts_Sxbxfxw, 0, 2).reshape(*parts_Sxbxfxw.shape[1:3], -1)
    return pooled_bxfxD[:, :, : stack.dim], routes


def update(
    stack: PlacedStack,
    optimizers: Any,
    tables: Arrays,
    opt_state: Arrays,
    routes: Arrays,
    d_pooled: jax.Array,
    rate: jax.Array,
    dtype: str,
) -> tuple[Arrays, Arrays]:
    """Each shard gets its columns of every example's gradient; a row's accumulator is agreed on by a sum of squares."""
    shards, width = stack.num_shards, stack.width
    padded = jnp.pad(d_pooled, ((0, 0), (0, 0), (0, shards * width - stack.dim)))
    parts_Sxbxfxw = jnp.moveaxis(padded.reshape(*padded.shape[:2], shards, width), 2, 0)
    d_Bxfxw = to_owners(parts_Sxbxfxw, shards, dtype).reshape(-1, *parts_Sxbxfxw.shape[2:])
    everyones = {name: from_copies(x, stack.num_copies) for name, x in routes.items()}
    row_ids, scale, d_Bxfxw = everyones["rows"], scale_of(everyones), from_copies(d_Bxfxw, stack.num_copies)
    d_slots = d_Bxfxw[:, np.repeat(np.arange(len(stack.hotness)), stack.hotness)]
    rows = read_rows(stack, tables, row_ids) if len(tables) > 1 else None
    grads = slot_gradients(stack, d_slots, scale, rows)
    if rows is not None:  # A weight's gradient is a sum over all columns.
        d_weights = sum_over_shards(grads[..., width:], shards)
        grads = jnp.concatenate([grads[..., :width], d_weights], axis=-1)
    grads_MxW = grads.reshape(-1, grads.shape[-1])
    return apply_gradients(stack, optimizers, tables, opt_state, row_ids.reshape(-1), grads_MxW, rate)
