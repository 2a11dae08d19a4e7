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
from dlrm_jax.model.hashing import mix
from dlrm_jax.tables.collective import shard_index
from dlrm_jax.tables.dtypes import table_dtype
from dlrm_jax.tables.forms.base import Stack
from dlrm_jax.tables.layout import local_stacks
from dlrm_jax.tables.pooling import POOLING_WEIGHTS
from dlrm_jax.tables.table_keys import table_keys

FILL_FLOATS = 2**23
"""Floats drawn at a time."""
_LEAST_BORN = 256


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
    fill = functools.partial(_fill_shard, model, stack, jnp.asarray(table_keys(stack.tables, seed)))
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


def born_rows(model: ModelConfig, table: TableConfig, seed: int, row_R: np.ndarray) -> np.ndarray:
    """Some rows of a table as they are stored before any step: what `init_stack` puts there, to the bit."""
    size = max(_LEAST_BORN, 1 << (len(row_R) - 1).bit_length())  # Of few sizes, so that little is compiled.
    scale_T, shift_T = table_scales(model, (table,))
    normal, dim = model.table_init != "dlrm", table.embedding_dim
    padded_R = np.resize(row_R, size).astype(np.uint32)
    rows = _born(padded_R, table_keys((table,), seed)[0], scale_T[0], shift_T[0], normal, dim, table.dtype)
    return np.asarray(rows)[: len(row_R)]


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _born(
    row_R: jax.Array, key_2: jax.Array, scale: jax.Array, shift: jax.Array, normal: bool, dim: int, dtype: str
) -> jax.Array:
    shape = (len(row_R), dim)
    row_RxD, column_RxD = jnp.broadcast_to(row_R[:, None], shape), jax.lax.broadcasted_iota(jnp.uint32, shape, 1)
    return table_dtype(dtype).from_floats(draw(row_RxD, column_RxD, key_2, scale, normal) + shift)


def _fill_shard(model: ModelConfig, stack: Stack, key_Tx2: jax.Array) -> jax.Array:
    lines, lanes = stack.local_shape
    piece = min(max(1, FILL_FLOATS // lanes), lines)
    shard = shard_index(stack.num_shards)
    scale_T, shift_T = map(jnp.asarray, table_scales(model, stack.tables))
    size_T = jnp.asarray(np.array([table.num_embeddings for table in stack.tables], np.int32))
    column_1xw = stack.columns(shard)[None]

    def drawn(start: jax.Array) -> jax.Array:
        """The `piece` lines from `start` on."""
        local_P = start * stack.pack + jnp.arange(piece * stack.pack, dtype=jnp.int32)
        table_P, row_P = stack.owners(local_P, shard)
        valid_P = (row_P < size_T[table_P]) & (row_P >= 0)
        weights = draw(
            row_P[:, None].astype(jnp.uint32),
            jnp.broadcast_to(column_1xw, (len(local_P), stack.width)).astype(jnp.uint32),
            key_Tx2[table_P][:, None],
            scale_T[table_P][:, None],
            model.table_init != "dlrm",
        )
        weights = weights + shift_T[table_P][:, None]
        return jnp.where(valid_P[:, None] & (column_1xw < stack.dim), weights, 0).reshape(piece, lanes)

    def fill(i: jax.Array, rows: jax.Array) -> jax.Array:
        # In pieces, because the compiler keeps a handful of numbers per row beside the rows that it fills.
        start = jnp.minimum(i * piece, lines - piece)
        return jax.lax.dynamic_update_slice(rows, stack.dtype.from_floats(drawn(start)), (start, jnp.int32(0)))

    return jax.lax.fori_loop(0, -(-lines // piece), fill, jnp.zeros((lines, lanes), stack.dtype.stored))
