"""Kernels for GPUs held against XLA's on a small table: by a run before it takes one, and by the tests, interpreted."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.model.hashing import mix
from dlrm_jax.tables.dtypes import TableDtype
from dlrm_jax.tables.kernels.pooled import pool_bags
from dlrm_jax.tables.kernels.segments import update_segments
from dlrm_jax.tables.pooling import pool_whole, read_rows
from dlrm_jax.tables.rules import Rule
from dlrm_jax.tables.updates import BagGrad, Noise, Stored, Update

ROWS, BAGS, HOTNESS = 40, 200, 3
_FLOATS, _PLACE = 1e-4, 2**-6
"""What sums of another order may differ by, and what a rounded weight of two bytes may."""
Case = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]
"""(by the kernel, by XLA, arguments of both)."""


def update_case(rule: Rule, dtype: TableDtype, width: int, scaled: bool = False, interpret: bool = False) -> Case:
    """An update of a table of ROWS rows of `width`, whose slots are mostly of three rows, some of none."""
    rng = np.random.default_rng(0)
    bags = BagGrad(_ids(rng), _scale(rng) if scaled else None, _floats(rng, BAGS, width))
    # Away from 0, where a rule that divides makes much of the order of a sum.
    kept = {
        slot.name: jnp.asarray(1 + rng.random((ROWS, slot.width(width))) * 2).astype(slot.dtype) for slot in rule.slots
    }
    stored = Stored(dtype.from_floats(_floats(rng, ROWS, width)), kept)
    noise = None if dtype.exact else Noise(_row_keys, _bits, jnp.arange(width, dtype=jnp.int32))
    update = Update(rule, jnp.float32(0.1), jnp.int32(3), dtype=dtype, noise=noise, factor=jnp.float32(0.5))

    def floats(stored: Stored) -> Stored:
        return stored._replace(weights=dtype.to_floats(stored.weights))

    def ours(bags: BagGrad, stored: Stored) -> Stored:
        return floats(update_segments(update, (bags,), stored, interpret))

    return ours, lambda bags, stored: floats(update.by_bags((bags,), stored)), (bags, stored)


def pool_case(dtype: TableDtype, width: int, scaled: bool = False, interpret: bool = False) -> Case:
    """The same of sums of bags."""
    rng = np.random.default_rng(0)
    table, ids = dtype.from_floats(_floats(rng, ROWS, width)), _ids(rng).T.reshape(BAGS // 2, 2, HOTNESS)
    scale = jnp.where(ids < 0, 0, _scale(rng).T.reshape(ids.shape)) if scaled else None

    def take(table: jax.Array, ids: jax.Array) -> jax.Array:
        return dtype.to_floats(read_rows(table, ids))

    def ours(table: jax.Array, ids: jax.Array, scale: jax.Array | None) -> jax.Array:
        return pool_bags(dtype, table, ids, scale, interpret)

    return ours, functools.partial(pool_whole, take), (table, ids, scale)


def differs(case: Case, dtype: TableDtype, options: dict[str, Any] | None = None) -> str:
    """By how much a kernel's results are not XLA's; "" where they are.

    Another order of a sum may round one weight in fifty of a dtype of two bytes the other way.
    """
    ours, theirs, args = case
    found = [jax.jit(one, compiler_options=options)(*args) for one in (ours, theirs)]
    for mine, its in zip(*map(jax.tree.leaves, found), strict=True):
        rounded = ~np.isclose(mine, its, rtol=_FLOATS, atol=_FLOATS)
        all_near = np.allclose(mine, its, rtol=_PLACE, atol=_PLACE)
        if not all_near or rounded.mean() > (0 if dtype.exact else 0.02):
            return f"its numbers differ by up to {np.abs(np.asarray(mine) - np.asarray(its)).max():.3g}"
    return ""


def _ids(rng: np.random.Generator) -> jax.Array:
    """(HOTNESS, BAGS): two thirds of three rows, the rest of all; empty slots, empty bags, ids that are void."""
    few, all_rows = rng.integers(0, 3, (HOTNESS, BAGS)), rng.integers(-1, ROWS + 1, (HOTNESS, BAGS))
    ids = np.where(rng.random((HOTNESS, BAGS)) < 2 / 3, few, np.minimum(all_rows, ROWS - 1))
    ids[:, ::7] = -1
    return jnp.asarray(ids, jnp.int32)


def _scale(rng: np.random.Generator) -> jax.Array:
    return jnp.asarray(rng.normal(size=(HOTNESS, BAGS)), jnp.float32)


def _floats(rng: np.random.Generator, rows: int, width: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=(rows, width)), jnp.float32)


def _row_keys(rows_M: jax.Array) -> jax.Array:
    return jnp.stack([rows_M, rows_M], axis=1).astype(jnp.uint32)


def _bits(of_row: jax.Array, of_table: jax.Array, column: jax.Array) -> jax.Array:
    return mix(of_row ^ (column.astype(jnp.uint32) + of_table))
