"""data_parallel tables: looked up at home, kept equal by exchanging (ids, gradient rows), never a table's gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.tables.collective import from_everywhere
from dlrm_jax.tables.embedding import sum_bags
from dlrm_jax.tables.forms.bags import apply_gradients, read_rows, scaled, slot_gradients
from dlrm_jax.tables.layout import PlacedStack
from dlrm_jax.tables.optimizers import SparseGrad, merge_duplicates

Arrays = dict[str, Any]


def sent_rows(stack: PlacedStack, batch: int) -> int:
    """Gradient rows that each device sends of `batch` examples: no more than its ids, nor than the tables' rows."""
    slots_T = np.bincount(stack.table_K, minlength=len(stack.tables))
    sizes = [table.num_embeddings for table in stack.tables]
    return int(sum(min(size, batch * int(slots)) for size, slots in zip(sizes, slots_T, strict=True)))


def route(stack: PlacedStack, ids_bxk: jax.Array, scale_bxk: jax.Array) -> Arrays:
    """Row numbers and scales of the device's own examples."""
    offset_k = np.array(stack.offset_T, np.int32)[stack.table_K]
    return {"rows": jnp.where(ids_bxk < 0, -1, ids_bxk + offset_k[None]), "scale": scale_bxk}


def lookup(stack: PlacedStack, tables: Arrays, routes: Arrays) -> tuple[jax.Array, Arrays]:
    """pooled_bxfxD."""
    rows = read_rows(stack, tables, routes["rows"])
    return sum_bags(scaled(stack, rows, routes["scale"]), stack.hotness), routes


def update(
    stack: PlacedStack,
    optimizers: Any,
    tables: Arrays,
    opt_state: Arrays,
    routes: Arrays,
    d_pooled: jax.Array,
    rate: jax.Array,
) -> tuple[Arrays, Arrays]:
    """Every device sends its gradient rows, those of one id merged where that makes them fewer, and applies all."""
    d_slots = d_pooled[:, np.repeat(np.arange(len(stack.hotness)), stack.hotness)]
    learned = len(tables) > 1
    rows = read_rows(stack, tables, routes["rows"]) if learned else None
    grads = slot_gradients(stack, d_slots, routes["scale"], rows)
    ids_M, grads_MxW = routes["rows"].reshape(-1), grads.reshape(-1, grads.shape[-1])
    most = sent_rows(stack, routes["rows"].shape[0])
    if most < len(ids_M) and stack.num_shards * stack.num_copies > 1:
        merged = merge_duplicates(SparseGrad(ids_M, grads_MxW), stack.rows)
        ids_M, grads_MxW = merged.ids_M[:most], merged.rows_MxD[:most]
    ids_M, grads_MxW = (from_everywhere(x, stack.num_copies, stack.num_shards) for x in (ids_M, grads_MxW))
    return apply_gradients(stack, optimizers, tables, opt_state, ids_M, grads_MxW, rate)
