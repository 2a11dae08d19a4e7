"""From looked-up rows to pooled vectors and back, on one device's part of a batch.

With learned pooling weights a row carries its weight in one more column: (..., D + 1).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.tables.embedding import POOLING_WEIGHTS
from dlrm_jax.tables.layout import PlacedStack
from dlrm_jax.tables.optimizers import SparseGrad, SparseOptimizer
from dlrm_jax.tables.rows import take_rows


def read_rows(stack: PlacedStack, tables: dict[str, jax.Array], row_ids: jax.Array) -> jax.Array:
    """(*row_ids.shape, W): local rows by number; where a number is outside, any row."""
    flat = row_ids.reshape(-1)
    rows = take_rows(tables[stack.name], flat, stack.width)
    if stack.name + POOLING_WEIGHTS in tables:
        rows = jnp.concatenate([rows, take_rows(tables[stack.name + POOLING_WEIGHTS], flat, 1)], axis=1)
    return rows.reshape(*row_ids.shape, -1)


def scale_of(routes: dict[str, jax.Array]) -> jax.Array:
    """What each slot's row is multiplied with: `scale`, or 1 where `rows` has a row; then scales need not travel."""
    return routes["scale"] if "scale" in routes else (routes["rows"] >= 0).astype(jnp.float32)


def scaled(stack: PlacedStack, rows: jax.Array, scale: jax.Array) -> jax.Array:
    """What each slot adds to its bag: its row times `scale` and its learned weight."""
    if rows.shape[-1] > stack.width:
        scale = scale * rows[..., -1]
    return rows[..., : stack.width] * scale[..., None]


def sum_bags_of_slots(slots_kxbxD: jax.Array, hotness: tuple[int, ...]) -> jax.Array:
    """pooled_bxfxD: sums over each feature's consecutive slots, of arrays with the slots first."""
    starts = np.cumsum((0, *hotness))
    bags = [slots_kxbxD[start:stop].sum(axis=0) for start, stop in itertools.pairwise(starts)]
    return jnp.stack(bags, axis=1)


def slot_gradients(stack: PlacedStack, d_slots: jax.Array, scale: jax.Array, rows: jax.Array | None) -> jax.Array:
    """The gradient of `scaled` in the rows, (..., W): `rows` are those looked up, None without learned weights."""
    if rows is None:
        return d_slots * scale[..., None]
    d_weights = (d_slots * rows[..., : stack.width]).sum(axis=-1) * scale
    return jnp.concatenate([d_slots * (scale * rows[..., -1])[..., None], d_weights[..., None]], axis=-1)


def apply_gradients(
    stack: PlacedStack,
    optimizers: tuple[SparseOptimizer, SparseOptimizer],
    tables: dict[str, jax.Array],
    opt_state: dict[str, jax.Array],
    ids_M: jax.Array,
    grads_MxW: jax.Array,
    rate: jax.Array,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The stack's tables and optimizer state after one update; `optimizers` of the rows and of learned weights."""
    parts = {stack.name: (optimizers[0], grads_MxW[:, : stack.width])}
    if grads_MxW.shape[1] > stack.width:
        parts[stack.name + POOLING_WEIGHTS] = optimizers[1], grads_MxW[:, stack.width :]
    new_tables, new_state = {}, {}
    for name, (optimizer, rows_MxD) in parts.items():
        new_tables[name], new_state[name] = optimizer.update(
            SparseGrad(ids_M, rows_MxD), opt_state[name], tables[name], rate
        )
    return new_tables, new_state
