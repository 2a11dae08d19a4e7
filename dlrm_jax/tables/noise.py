"""The random bits that weights in two bytes are rounded by: a function of what is rounded, and of nothing else."""

import jax
import jax.numpy as jnp

from dlrm_jax.model.hashing import mix
from dlrm_jax.tables.collective import shard_index
from dlrm_jax.tables.forms.base import Stack
from dlrm_jax.tables.table_keys import table_keys
from dlrm_jax.tables.updates import Noise


def noise_of(stack: Stack, count: jax.Array) -> Noise:
    """Random bits of (table name, row, column, number of the update), the same wherever a row lies."""

    def of_rows(rows_M: jax.Array) -> jax.Array:
        table_M, row_M = stack.owners(rows_M, shard_index(stack.num_shards))
        key_Mx2 = jnp.asarray(table_keys(stack.tables, 0))[table_M]
        of_row_M = mix(
            mix(row_M.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + key_Mx2[:, 0]) + count.astype(jnp.uint32)
        )
        return jnp.stack([of_row_M, key_Mx2[:, 1]], axis=1)

    def bits(of_row: jax.Array, of_table: jax.Array, column: jax.Array) -> jax.Array:
        return mix(of_row ^ (column.astype(jnp.uint32) * jnp.uint32(0x85EBCA77) + of_table))

    return Noise(of_rows, bits, stack.columns(shard_index(stack.num_shards)))
