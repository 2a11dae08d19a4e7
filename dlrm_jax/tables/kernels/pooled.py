"""Sums of bags of rows on GPUs, by Pallas: `pooling.pool` in a kernel that reads each row once and writes sums only."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dlrm_jax.tables.dtypes import TableDtype
from dlrm_jax.tables.kernels import blocks
from dlrm_jax.tables.kernels.blocks import Block


def pool_bags(
    dtype: TableDtype,
    table: jax.Array,
    ids_BxGxh: jax.Array,
    scale_BxGxh: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """(B, G, D): as `pooling.pool` of a table stored as `dtype`; `interpret`: by XLA, anywhere, for tests."""
    batch, num_bags, hotness = ids_BxGxh.shape
    block, total = Block(table.shape[1]), batch * num_bags
    given = [table, ids_BxGxh.reshape(total, hotness)]
    if scale_BxGxh is not None:
        given.append(scale_BxGxh.reshape(total, hotness))

    def kernel(table_ref: Any, ids_ref: Any, *refs: Any) -> None:
        *scales, sums_ref = refs
        bag_R = block.numbers()
        exists_R = bag_R < total

        def step(i: jax.Array, sum_RxW: jax.Array) -> jax.Array:
            for j in range(blocks.IN_FLIGHT):
                slot = i * blocks.IN_FLIGHT + j
                place = bag_R, jnp.full(block.rows, slot)
                filled_R = exists_R & (slot < hotness)
                ids_R = triton.load(ids_ref.at[place], mask=filled_R, other=-1)
                rows_RxW = dtype.to_floats(block.load(table_ref, ids_R, ids_R >= 0))
                if scales:
                    scale_R = triton.load(scales[0].at[place], mask=filled_R, other=0.0)
                    rows_RxW = rows_RxW * block.spread(scale_R)
                sum_RxW = sum_RxW + rows_RxW
            return sum_RxW

        nothing = jnp.zeros(block.shape, jnp.float32)
        sum_RxW = jax.lax.fori_loop(0, pl.cdiv(hotness, blocks.IN_FLIGHT), step, nothing)
        block.store(sums_ref, bag_R, sum_RxW, exists_R)

    sums = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(total, block.rows),),
        in_specs=[blocks.ANYWHERE] * len(given),
        out_specs=blocks.ANYWHERE,
        out_shape=jax.ShapeDtypeStruct((total, block.width), jnp.float32),
        compiler_params=blocks.warp(),
        interpret=interpret,
    )(*given)
    return sums.reshape(batch, num_bags, block.width)
