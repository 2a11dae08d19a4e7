"""data_parallel tables: looked up at home, kept equal by exchanging (ids, gradient rows), never a table's gradient.

On one device nothing is exchanged, and this is how every table of a single device is looked up and updated.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.tables.collective import ExchangeOptions, from_everywhere
from dlrm_jax.tables.forms.bags import bags_of, pool_bags, row_gradients, update_bags, update_rows
from dlrm_jax.tables.forms.base import Form, Here, Learning, Sent, Stack, States, Work, register
from dlrm_jax.tables.rules import Arrays
from dlrm_jax.tables.updates import SparseGrad, merge_duplicates

INTS = 7
"""Numbers an id slot where rows are sorted: keys of 64 bits, places before and after, counts; and its id, gathered."""


def _sent_rows(stack: Stack, batch: int) -> int:
    """Gradient rows that each device sends of `batch` examples: no more than its ids, nor than the tables' rows."""
    slots_T = np.bincount(stack.table_K, minlength=len(stack.tables))
    sizes = [table.num_embeddings for table in stack.tables]
    return int(sum(min(size, batch * int(slots)) for size, slots in zip(sizes, slots_T, strict=True)))


@register("data_parallel")
class DataParallel(Form):
    """A copy on every device."""

    arrays = "stack"
    why = "lookups at home"
    updates_early = True

    def route(self, here: Here, ids_bxk: jax.Array, scale_bxk: jax.Array | None) -> Arrays:
        """Row numbers of the device's own examples, and what their rows are multiplied with."""
        rows = {"rows": jnp.where(ids_bxk < 0, ids_bxk, ids_bxk + here.stack.offset_k[None])}
        return rows if scale_bxk is None else rows | {"scale": scale_bxk}

    def lookup(self, here: Here, routes: Arrays) -> tuple[jax.Array, Arrays]:
        """At home."""
        return pool_bags(here, bags_of(routes, here.stack.hotness)), routes

    def update(self, here: Learning, routes: Arrays, d_pooled_bxfxD: jax.Array) -> tuple[Arrays, States]:
        """Every device sends its gradient rows, those of one id merged where that makes them fewer, and applies all."""
        stack, bags = here.stack, bags_of(routes, here.stack.hotness)
        if stack.num_devices == 1:
            return update_bags(here, bags, d_pooled_bxfxD)
        grad = row_gradients(here, bags, d_pooled_bxfxD)
        most = _sent_rows(stack, bags.rows_Nxk.shape[0])
        if most < len(grad.ids_M):
            merged = merge_duplicates(grad, stack.rows)
            grad = SparseGrad(merged.ids_M[:most], merged.rows_MxD[:most])
        grad = jax.tree.map(lambda x: from_everywhere(x, stack.num_copies, stack.num_shards), grad)
        return update_rows(here, grad)

    def sent(self, stack: Stack, batch: int, columns: int, scales: bool, options: ExchangeOptions) -> Sent:
        """Ids and gradient rows of all devices."""
        del scales
        rows = self.received(stack, batch, options)
        return [("all-gather", stack.num_devices, rows * 4), ("all-gather", stack.num_devices, rows * columns * 4)]

    def received(self, stack: Stack, batch: int, options: ExchangeOptions) -> int:
        """Of all devices."""
        del options
        return min(_sent_rows(stack, batch), batch * len(stack.slots)) * stack.num_devices

    def memory(self, work: Work) -> tuple[int, int]:
        """Ids, and where rows are sorted the places of slots, the gradients to come and what is kept a weight."""
        slots, width, linear = work.slots, work.stack.width, work.rule.linear
        if work.stack.num_devices > 1:
            received = 0 if linear else work.received * (width + 5)
            gradients = int(2.3 * width) + 4  # Before they are sorted and after, and gaps between.
            return slots * (width + (1 if linear else 2)) + received, slots * gradients + received
        if work.in_pieces:
            return (slots * (1 if linear else 3),) * 2
        by_slot = work.learned or any(
            hotness > 1 for hotness in work.stack.hotness
        )  # Else the pooled vectors' gradients are those of rows.
        return (slots * (width * by_slot if linear else width + work.kept_a_row + INTS),) * 2
