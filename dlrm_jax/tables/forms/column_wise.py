"""column_wise tables: every shard looks up its columns for all of its copy's examples, and sends them home."""

import jax
import jax.numpy as jnp

from dlrm_jax.host.mesh import MODEL
from dlrm_jax.tables.collective import ExchangeOptions, from_all, from_copies, sum_over_shards, to_owners
from dlrm_jax.tables.forms.bags import bags_of, pool_bags, row_gradients, sent_of_bags, update_bags, update_rows
from dlrm_jax.tables.forms.base import Form, Here, Learning, Sent, Stack, States, Work, register
from dlrm_jax.tables.rules import Arrays, row_means

_INTS = 8
"""As data_parallel.INTS, and what pieces of rows need besides."""


@register("column_wise")
class ColumnWise(Form):
    """A slice of the columns on every shard."""

    arrays = "columns"
    why = "pooled vectors, not rows, travel"
    splits_columns = True

    def route(self, here: Here, ids_bxk: jax.Array, scale_bxk: jax.Array | None) -> Arrays:
        """Row numbers of all the copy's examples, and their scales, which are sent only where ids do not say them."""
        own = {"rows": jnp.where(ids_bxk < 0, -1, ids_bxk + here.stack.offset_k[None])}
        own |= {} if scale_bxk is None else {"scale": scale_bxk}
        return {name: from_all(x, MODEL, here.stack.num_shards) for name, x in own.items()}

    def lookup(self, here: Here, routes: Arrays) -> tuple[jax.Array, Arrays]:
        """Columns from every shard."""
        pooled_Bxfxw, shards = pool_bags(here, bags_of(routes, here.stack.hotness)), here.stack.num_shards
        parts_Sxbxfxw = pooled_Bxfxw.reshape(shards, -1, *pooled_Bxfxw.shape[1:])
        parts_Sxbxfxw = to_owners(parts_Sxbxfxw, shards, here.options.dtype)
        pooled_bxfxD = jnp.moveaxis(parts_Sxbxfxw, 0, 2).reshape(*parts_Sxbxfxw.shape[1:3], -1)
        return pooled_bxfxD[:, :, : here.stack.dim], routes

    def update(self, here: Learning, routes: Arrays, d_pooled_bxfxD: jax.Array) -> tuple[Arrays, States]:
        """Each shard gets its columns of every example's gradient; means over a row are agreed on by a sum."""
        stack, shards, width = here.stack, here.stack.num_shards, here.stack.width
        padded = jnp.pad(d_pooled_bxfxD, ((0, 0), (0, 0), (0, shards * width - stack.dim)))
        parts_Sxbxfxw = jnp.moveaxis(padded.reshape(*padded.shape[:2], shards, width), 2, 0)
        d_Bxfxw = to_owners(parts_Sxbxfxw, shards, here.options.dtype).reshape(-1, *parts_Sxbxfxw.shape[2:])
        everyones = {name: from_copies(x, stack.num_copies) for name, x in routes.items()}
        d_Bxfxw, bags = from_copies(d_Bxfxw, stack.num_copies), bags_of(everyones, stack.hotness)
        if not here.learns_weights:
            return update_bags(here, bags, d_Bxfxw)
        grad = row_gradients(here, bags, d_Bxfxw)
        d_weights = sum_over_shards(grad.rows_MxD[:, width:], shards)  # A weight's gradient is a sum over all columns.
        grad = grad.replace(rows_MxD=jnp.concatenate([grad.rows_MxD[:, :width], d_weights], axis=1))
        return update_rows(here, grad)

    def sent(self, stack: Stack, batch: int, columns: int, scales: bool, options: ExchangeOptions) -> Sent:
        """All but what its rule sums over a row."""
        slots = len(stack.slots)
        found = sent_of_bags(stack, "all-gather", batch, (slots, len(stack.features) * stack.width), scales, options)
        if columns > stack.dim:
            found.append(("all-reduce", stack.num_shards, stack.num_devices * batch * slots * 4))
        return found

    def looked_up(self, stack: Stack, batch: int) -> int:
        """For all of its copy's examples."""
        return -(-batch // stack.num_copies) * len(stack.slots)

    def memory(self, work: Work) -> tuple[int, int]:
        """Ids, and where rows are sorted the places of slots and their gradients; then rows, and what a rule makes."""
        width, linear, slots = work.stack.width, work.rule.linear, work.slots * work.stack.num_copies
        if work.in_pieces and not row_means(work.rule):
            return (slots * (1 if linear else 3),) * 2
        return slots * (2 if linear else width + _INTS), work.slots * ((2 if linear else 3) * width + 4)
