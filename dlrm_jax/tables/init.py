"""Initial values of tables, drawn on the shards where they will live.

A weight is a hash of (seed, table name, row, column): the same under every placement.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dlrm_jax.config import NORMAL, ModelConfig, TableConfig
from dlrm_jax.tables.collective import shard_index
from dlrm_jax.tables.hashing import mix, table_keys
from dlrm_jax.tables.layout import COLUMNS, POOLING_WEIGHTS, Stack, local_stacks
from dlrm_jax.tables.rows import as_stored, stored_type

FILL_FLOATS = 2**23
"""Floats drawn at a time."""


def init_tables(model: ModelConfig, seed: int) -> dict[str, jax.Array]:
    """All stacks of one device."""
    tables: dict[str, jax.Array] = {}
    for stack in local_stacks(model):
        tables |= init_stack(model, stack, None, seed)
    return tables


def init_stack(model: ModelConfig, stack: Stack, mesh: Mesh | None, seed: int) -> dict[str, jax.Array]:
    """A stack's arrays, split over `mesh` as its specs say. For use under jit with those shardings for its outputs.

    `table_init="dlrm"` is U(+-sqrt(1 / num_embeddings)), `"flax"` N(0, 1/sqrt(D)) as flax.linen.Embed, `"normal:S"`
    N(0, S); a table's own `init_range` goes before. Padding is 0.
    Learned pooling weights start at 1.
    """
    keys = jnp.asarray(table_keys(stack.tables, seed))
    scales, shifts = map(jnp.asarray, table_scales(model, stack.tables))
    fill = functools.partial(_fill_shard, stack, keys, scales, shifts, model.table_init != "dlrm")
    if mesh is not None:
        fill = jax.shard_map(fill, mesh=mesh, in_specs=(), out_specs=stack.spec, check_vma=False)
    rows = {stack.name: fill() if mesh is not None else jax.jit(fill)()}
    return rows | (
        {stack.name + POOLING_WEIGHTS: jnp.ones(stack.row_shape(), jnp.float32)} if model.learned_pooling else {}
    )


def draw(row: jax.Array, column: jax.Array, key: jax.Array, scale: jax.Array, normal: bool) -> jax.Array:
    """Initial weights at (row, column) of the tables whose `table_keys` and scales are given; uint32, any one shape."""
    bits = mix(row * jnp.uint32(0x9E3779B1) + key[..., 0])
    bits = mix(bits ^ (column * jnp.uint32(0x85EBCA77) + key[..., 1]))
    # (k + 1/2) / 2^23 for a signed 24-bit k is exact in float32, symmetric around 0 and never +-1.
    signed = jax.lax.bitcast_convert_type(bits, jnp.int32) >> 8
    unit = (signed.astype(jnp.float32) + 0.5) * jnp.float32(2**-23)
    if normal:
        unit = jax.lax.erf_inv(unit) * jnp.float32(2**0.5)
    return unit * scale


def table_scales(model: ModelConfig, tables: tuple[TableConfig, ...]) -> tuple[np.ndarray, np.ndarray]:
    """((T,) float32: the half-width or standard deviation of each table's initial weights, (T,) their mean)."""
    scales, shifts = [], []
    for table in tables:
        low, high = table.init_range or (0.0, 0.0)
        uniform = model.table_init == "dlrm"
        if table.init_range:  # Of a normal distribution the deviation that such a uniform one has.
            scales.append((high - low) / (2 if uniform else math.sqrt(12)))
        elif model.table_init.startswith(NORMAL):
            scales.append(float(model.table_init.removeprefix(NORMAL)))
        else:
            scales.append(math.sqrt(1 / table.num_embeddings) if uniform else table.embedding_dim**-0.5)
        shifts.append((high + low) / 2)
    return np.array(scales, np.float32), np.array(shifts, np.float32)


def _fill_shard(stack: Stack, key_Tx2: jax.Array, scale_T: jax.Array, shift_T: jax.Array, normal: bool) -> jax.Array:
    lines, lanes = stack.local_shape
    piece = min(max(1, FILL_FLOATS // lanes), lines)
    shard = shard_index(stack.num_shards)

    def fill(i: jax.Array, rows: jax.Array) -> jax.Array:
        # In pieces, because the compiler keeps a handful of numbers per row beside the rows that it fills.
        start = jnp.minimum(i * piece, lines - piece)
        drawn = _draw_lines(stack, start, piece, shard, key_Tx2, scale_T, shift_T, normal)
        return jax.lax.dynamic_update_slice(rows, as_stored(drawn.astype(stack.dtype)), (start, jnp.int32(0)))

    rows = jnp.zeros((lines, lanes), stored_type(stack.dtype))
    return jax.lax.fori_loop(0, -(-lines // piece), fill, rows)


def _draw_lines(
    stack: Stack,
    start: jax.Array,
    num_lines: int,
    shard: jax.Array,
    key_Tx2: jax.Array,
    scale_T: jax.Array,
    shift_T: jax.Array,
    normal: bool,
) -> jax.Array:
    """The lines from `start` on of shard `shard`."""
    shape = (num_lines, stack.pack * stack.width)
    local_P = start * stack.pack + jnp.arange(num_lines * stack.pack, dtype=jnp.int32)
    table_P, row_P = stack.owners(local_P, shard)
    size_T = np.array([table.num_embeddings for table in stack.tables], np.int32)
    valid_P = (row_P < jnp.asarray(size_T)[table_P]) & (row_P >= 0)
    first_column = shard * stack.width if stack.form == COLUMNS else 0
    column_1xw = first_column + jnp.arange(stack.width, dtype=jnp.int32)[None]
    drawn = draw(
        row_P[:, None].astype(jnp.uint32),
        jnp.broadcast_to(column_1xw, (len(local_P), stack.width)).astype(jnp.uint32),
        key_Tx2[table_P][:, None],
        scale_T[table_P][:, None],
        normal,
    )
    drawn = drawn + shift_T[table_P][:, None]
    return jnp.where(valid_P[:, None] & (column_1xw < stack.dim), drawn, 0).reshape(shape)
