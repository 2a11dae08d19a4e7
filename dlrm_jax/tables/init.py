"""Tables born on their shards: the values of embedding.init_tables, drawn where they will live."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dlrm_jax.config import ModelConfig
from dlrm_jax.tables.collective import shard_index
from dlrm_jax.tables.embedding import FILL_FLOATS, draw, table_keys, table_scales
from dlrm_jax.tables.layout import COLUMNS, OWNED, ROUTED, PlacedStack, tables_on_shard


def fill_stack(model: ModelConfig, stack: PlacedStack, mesh: Mesh, seed: int) -> jax.Array:
    """A stack's array, split as its spec says; padding is 0. For use under jit, with that sharding for its output."""
    keys = jnp.asarray(table_keys(stack.tables, seed))
    scales = jnp.asarray(table_scales(model, stack.tables))
    normal = model.table_init == "flax"
    function = jax.shard_map(
        lambda: _fill_shard(stack, keys, scales, normal), mesh=mesh, in_specs=(), out_specs=stack.spec, check_vma=False
    )
    return function()


def _fill_shard(stack: PlacedStack, key_Tx2: jax.Array, scale_T: jax.Array, normal: bool) -> jax.Array:
    lines, lanes = stack.local_shape
    piece = min(max(1, FILL_FLOATS // lanes), lines)
    shard = shard_index(stack.num_shards)
    constants = _table_constants(stack)

    def fill(i: jax.Array, rows: jax.Array) -> jax.Array:
        # In pieces, because the compiler keeps a handful of numbers per row beside the rows that it fills.
        start = jnp.minimum(i * piece, lines - piece)
        drawn = _draw_lines(stack, start, piece, shard, constants, key_Tx2, scale_T, normal)
        return jax.lax.dynamic_update_slice(rows, drawn, (start, jnp.int32(0)))

    rows = jnp.zeros((lines, lanes), jnp.float32)
    return jax.lax.fori_loop(0, -(-lines // piece), fill, rows)


def _table_constants(stack: PlacedStack) -> dict[str, np.ndarray]:
    """For each shard, its tables in the order of their rows: first row, number, and residue of the rows it holds."""
    shards = [tables_on_shard(stack, s) for s in range(stack.num_shards)]
    most = max(map(len, shards))
    none = 2**31 - 1
    starts = [[stack.offset_T[t] for t in tables] + [none] * (most - len(tables)) for tables in shards]
    numbers = [tables + [0] * (most - len(tables)) for tables in shards]
    return {"start": np.array(starts, np.int32), "table": np.array(numbers, np.int32)}


def _draw_lines(
    stack: PlacedStack,
    start: jax.Array,
    num_lines: int,
    shard: jax.Array,
    constants: dict[str, np.ndarray],
    key_Tx2: jax.Array,
    scale_T: jax.Array,
    normal: bool,
) -> jax.Array:
    """The lines from `start` on of shard `shard`."""
    shape = (num_lines, stack.pack * stack.width)
    local_P = start * stack.pack + jnp.arange(num_lines * stack.pack, dtype=jnp.int32)
    start_X = jnp.asarray(constants["start"])[shard]
    place_P = jnp.searchsorted(start_X, local_P, side="right") - 1
    place_P = jnp.maximum(place_P, 0)
    table_P = jnp.asarray(constants["table"])[shard][place_P]
    first_T, count_T = np.array(stack.first_T, np.int32), np.array(stack.count_T, np.int32)
    split_rows = stack.form in (OWNED, ROUTED)
    residue_P = shard - jnp.asarray(first_T)[table_P] if split_rows else jnp.zeros_like(table_P)
    row_P = (local_P - start_X[place_P]) * jnp.asarray(count_T)[table_P] + residue_P
    size_T = np.array([table.num_embeddings for table in stack.tables], np.int64)
    valid_P = (row_P < jnp.asarray(size_T, jnp.int32)[table_P]) & (local_P >= start_X[0]) & (row_P >= 0)
    first_column = shard * stack.width if stack.form == COLUMNS else 0
    column_1xw = first_column + jnp.arange(stack.width, dtype=jnp.int32)[None]
    drawn = draw(
        row_P[:, None].astype(jnp.uint32),
        jnp.broadcast_to(column_1xw, (len(local_P), stack.width)).astype(jnp.uint32),
        key_Tx2[table_P][:, None],
        scale_T[table_P][:, None],
        normal,
    )
    return jnp.where(valid_P[:, None] & (column_1xw < stack.dim), drawn, 0).reshape(shape)
