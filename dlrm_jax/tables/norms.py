"""Histograms of row norms: of the rows of each table, and of the gradients of the rows that a batch names.

They are counted where the rows lie, so that a few kilobytes a table travel. Of a table of more than so many rows each
n-th is counted, the same ones every time. Gradients are merged by the code of the update (updates.py), with norms
counted in place of a step.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dlrm_jax.config import ModelConfig
from dlrm_jax.host.mesh import BATCH_SPEC, MODEL
from dlrm_jax.tables.collective import ExchangeOptions, shard_index, sum_over_shards
from dlrm_jax.tables.exchange import Pooled, array_specs, arrays_of, of_stacks
from dlrm_jax.tables.forms.base import Learning, Stack
from dlrm_jax.tables.rows import num_rows, take_rows
from dlrm_jax.tables.rules import Arrays, Rows, Rule
from dlrm_jax.tables.updates import SparseGrad, Stored, Update

_POSITIVE = 1e-12 * 1.1 ** np.arange(774)
LIMITS = np.concatenate([-_POSITIVE[::-1], [0.0], _POSITIVE, [np.finfo(np.float32).max]]).astype(np.float32)
"""TensorBoard's buckets: the i-th holds what is above LIMITS[i - 1] and at most LIMITS[i]."""
_PIECE = 4096
"""Rows that are read at a time."""

RowNorms = Callable[[Arrays, Any, Pooled], tuple[dict[str, Arrays], dict[str, Arrays]]]


def no_values(series: int) -> Arrays:
    """Of so many series of numbers none yet: `counts` by bucket, `least`, `most`, `sum` and sum of `squares`."""
    return {
        "counts": jnp.zeros((series, len(LIMITS)), jnp.int32),
        "least": jnp.full(series, jnp.inf),
        "most": jnp.full(series, -jnp.inf),
        "sum": jnp.zeros(series),
        "squares": jnp.zeros(series),
    }


def with_values(found: Arrays, series_M: jax.Array, values_M: jax.Array, counted_M: jax.Array) -> Arrays:
    """`found`, with those of these numbers that are counted, each in its series."""
    series_M = jnp.where(counted_M, series_M, len(found["sum"]))  # Beyond the end, where nothing is written.
    bucket_M = jnp.searchsorted(jnp.asarray(LIMITS), values_M)
    return {
        "counts": found["counts"].at[series_M, bucket_M].add(1, mode="drop"),
        "least": found["least"].at[series_M].min(values_M, mode="drop"),
        "most": found["most"].at[series_M].max(values_M, mode="drop"),
        "sum": found["sum"].at[series_M].add(values_M, mode="drop"),
        "squares": found["squares"].at[series_M].add(jnp.square(values_M), mode="drop"),
    }


def row_norms(
    model: ModelConfig, stacks: tuple[Stack, ...], mesh: Mesh, options: ExchangeOptions, most_rows: int
) -> RowNorms:
    """`(tables, routes, d_pooled) -> (of rows, of gradients)`: by stack, a series for each of its tables.

    Of at most `most_rows` rows of each table, and of all rows that the batch names; every device has the result.
    """

    def counted(tables: Arrays, routes: Any, d_pooled: Pooled) -> tuple[dict[str, Arrays], dict[str, Arrays]]:
        weights, gradients = {}, {}
        for stack, of_stack in of_stacks(model, stacks, d_pooled):
            arrays = arrays_of(stack, tables)
            weights[stack.name] = _over_shards(stack, _of_rows(stack, arrays[stack.name], most_rows))
            gradients[stack.name] = _over_shards(stack, _of_gradients(stack, options, arrays, routes, of_stack))
        return weights, gradients

    if mesh.size == 1:
        return counted
    in_specs = (array_specs(model, stacks), BATCH_SPEC, BATCH_SPEC)
    return jax.shard_map(counted, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=False)


def _over_shards(stack: Stack, found: Arrays) -> Arrays:
    """What all shards of a stack found, where each has rows of its own."""
    if not stack.form.splits_rows or stack.num_shards == 1:
        return found
    sums = {name: jax.lax.psum(found[name], MODEL) for name in ("counts", "sum", "squares")}
    return sums | {"least": jax.lax.pmin(found["least"], MODEL), "most": jax.lax.pmax(found["most"], MODEL)}


def _of_rows(stack: Stack, table: jax.Array, most_rows: int) -> Arrays:
    """Of every n-th row of each table, n so that they are at most `most_rows`; a shard counts its own."""
    every = [-(-one.num_embeddings // most_rows) for one in stack.tables]
    number = [-(-one.num_embeddings // n) for one, n in zip(stack.tables, every, strict=True)]
    of_T = jnp.asarray(np.array([every, number, stack.first_T, stack.count_T, stack.offset_T], np.int32).T)
    piece = min(_PIECE, max(number))
    pieces = [(t, start) for t, rows in enumerate(number) for start in range(0, rows, piece)]
    shard = shard_index(stack.num_shards)

    def next_piece(found: Arrays, place: jax.Array) -> tuple[Arrays, None]:
        t, place_P = place[0], place[1] + jnp.arange(piece, dtype=jnp.int32)
        every, number, first, count, offset = of_T[t]
        row_P = place_P * every
        counted_P = place_P < number
        if stack.form.splits_rows:
            counted_P &= first + row_P % count == shard
        local_P = jnp.where(counted_P, offset + row_P // count, 0)
        rows_Pxw = stack.dtype.to_floats(take_rows(table, local_P, stack.width))
        rows_Pxw = jnp.where((stack.columns(shard) < stack.dim)[None], rows_Pxw, 0)
        return with_values(found, jnp.full(piece, t), _norms(stack, rows_Pxw), counted_P), None

    return jax.lax.scan(next_piece, no_values(len(stack.tables)), jnp.asarray(np.array(pieces, np.int32)))[0]


def _of_gradients(
    stack: Stack, options: ExchangeOptions, arrays: Arrays, routes: Any, d_pooled_bxfxD: jax.Array
) -> Arrays:
    """Of each row that the batch names, its gradient merged from all of its slots."""
    norms = _Norms(_Meaning(), jnp.float32(0), jnp.int32(1), dim=stack.dim, stack=stack)
    here = Learning(
        stack,
        options,
        arrays,
        states={name: no_values(len(stack.tables)) for name in arrays},
        of_rows=norms,
        of_weights=norms,
    )
    _, found = stack.form.update(here, routes[stack.name], d_pooled_bxfxD)
    return found[stack.name]


def _norms(stack: Stack, rows_Mxw: jax.Array) -> jax.Array:
    """(M,): of whole rows, whose columns may lie on several shards."""
    squares_M = jnp.square(rows_Mxw).sum(axis=1)
    return jnp.sqrt(sum_over_shards(squares_M, stack.num_shards) if stack.form.splits_columns else squares_M)


class _Meaning(Rule):
    """No update, but one that agrees on something about whole rows: shards that share rows merge them in one go."""

    def step(self, row: Rows) -> tuple[jax.Array, Arrays]:
        """Only to be counted by rules.row_means."""
        return row.row_mean(row.grad_MxD), {}


@dataclasses.dataclass(frozen=True)
class _Norms(Update):
    """Instead of an update: the norms of the rows' gradients are counted in the slots; the table is only read."""

    stack: Stack = dataclasses.field(kw_only=True)

    def of_merged(self, merged: SparseGrad, stored: Stored) -> Stored:
        """The table, and the slots with this gradient's norms."""
        held = num_rows(stored.weights, merged.rows_MxD.shape[1])
        table_M, _ = self.stack.owners(merged.ids_M, shard_index(self.stack.num_shards))
        norms_M = _norms(self.stack, merged.rows_MxD)
        return Stored(stored.weights, with_values(stored.slots, table_M, norms_M, merged.ids_M < held))


def of_arrays(arrays: Sequence[jax.Array], most: int) -> Arrays:
    """A series for each array: of every n-th of its numbers, n so that they are at most `most`."""
    samples = [one.reshape(-1)[:: -(-one.size // most)] for one in arrays]
    series_M = jnp.asarray(np.repeat(np.arange(len(samples), dtype=np.int32), [len(one) for one in samples]))
    values_M = jnp.concatenate(samples).astype(jnp.float32)
    return with_values(no_values(len(samples)), series_M, values_M, jnp.ones(values_M.shape, bool))
