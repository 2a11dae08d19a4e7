"""column_wise tables: every shard looks up its columns for all of its copy's examples, and sends them home."""

import jax
import jax.numpy as jnp

from dlrm_jax.host.mesh import MODEL
from dlrm_jax.tables.collective import ExchangeOptions, from_all, from_copies, sum_over_shards, to_owners
from dlrm_jax.tables.forms.bags import bags_of, learns_weights, pool_bags, row_gradients, update_bags, update_rows
from dlrm_jax.tables.forms.base import Form, Sent, Stack, StackUpdate, States, Work, register
from dlrm_jax.tables.pooling import Take
from dlrm_jax.tables.rules import Arrays

_INTS = 9
"""As data_parallel.INTS, and what pieces of rows need besides."""


@register("column_wise")
class ColumnWise(Form):
    """A slice of the columns on every shard."""

    arrays = "columns"
    splits_columns = True

    def why(self, rows: int, lookups: int) -> str:
        """All shards have equally much to do."""
        del rows, lookups
        return "pooled vectors, not rows, travel"

    def route(self, stack: Stack, ids_bxk: jax.Array, scale_bxk: jax.Array | None, options: ExchangeOptions) -> Arrays:
        """Row numbers of all the copy's examples, and their scales, which are sent only where ids do not say them."""
        del options
        own = {"rows": jnp.where(ids_bxk < 0, -1, ids_bxk + stack.offset_k[None])}
        own |= {} if scale_bxk is None else {"scale": scale_bxk}
        return {name: from_all(x, MODEL, stack.num_shards) for name, x in own.items()}

    def lookup(
        self, stack: Stack, tables: Arrays, routes: Arrays, options: ExchangeOptions, take: Take | None = None
    ) -> tuple[jax.Array, Arrays]:
        """Columns from every shard."""
        pooled_Bxfxw = pool_bags(stack, tables, bags_of(routes, stack.hotness), take)
        shards = stack.num_shards
        parts_Sxbxfxw = to_owners(pooled_Bxfxw.reshape(shards, -1, *pooled_Bxfxw.shape[1:]), shards, options.dtype)
        pooled_bxfxD = jnp.moveaxis(parts_Sxbxfxw, 0, 2).reshape(*parts_Sxbxfxw.shape[1:3], -1)
        return pooled_bxfxD[:, :, : stack.dim], routes

    def update(
        self, step: StackUpdate, routes: Arrays, d_pooled_bxfxD: jax.Array, options: ExchangeOptions
    ) -> tuple[Arrays, States]:
        """Each shard gets its columns of every example's gradient; means over a row are agreed on by a sum."""
        stack = step.stack
        shards, width = stack.num_shards, stack.width
        padded = jnp.pad(d_pooled_bxfxD, ((0, 0), (0, 0), (0, shards * width - stack.dim)))
        parts_Sxbxfxw = jnp.moveaxis(padded.reshape(*padded.shape[:2], shards, width), 2, 0)
        d_Bxfxw = to_owners(parts_Sxbxfxw, shards, options.dtype).reshape(-1, *parts_Sxbxfxw.shape[2:])
        everyones = {name: from_copies(x, stack.num_copies) for name, x in routes.items()}
        d_Bxfxw, bags = from_copies(d_Bxfxw, stack.num_copies), bags_of(everyones, stack.hotness)
        if not learns_weights(stack, step.tables):
            return update_bags(step, bags, d_Bxfxw)
        grad = row_gradients(stack, step.tables, bags, d_Bxfxw)
        d_weights = sum_over_shards(grad.rows_MxD[:, width:], shards)  # A weight's gradient is a sum over all columns.
        grad = grad.replace(rows_MxD=jnp.concatenate([grad.rows_MxD[:, :width], d_weights], axis=1))
        return update_rows(step, grad)

    def sent(self, stack: Stack, batch: int, columns: int, scales: bool, options: ExchangeOptions) -> Sent:
        """All but what its rule sums over a row."""
        shards, copies, slots = stack.num_shards, stack.num_copies, len(stack.slots)
        found = []
        for _ in range(1 + scales):
            found.append(("all-gather", shards, shards * batch * slots * 4))
            found.append(("all-gather", copies, copies * shards * batch * slots * 4))
        pooled = shards * batch * len(stack.features) * stack.width
        found += [("all-to-all", shards, pooled * options.float_bytes)] * 2
        found.append(("all-gather", copies, copies * pooled * 4))
        if columns > stack.dim:
            found.append(("all-reduce", shards, copies * shards * batch * slots * 4))
        return found

    def looked_up(self, stack: Stack, batch: int) -> int:
        """For all of its copy's examples."""
        return -(-batch // stack.num_copies) * len(stack.slots)

    def held(self, work: Work) -> int:
        """Ids, and where rows are sorted the places of slots and their gradients."""
        return work.slots * work.stack.num_copies * (2 if work.rule.linear else work.stack.width + _INTS)

    def at_its_most(self, work: Work) -> int:
        """Rows, gradients, and what a rule makes of them."""
        return work.slots * ((2 if work.rule.linear else 3) * work.stack.width + 4)
