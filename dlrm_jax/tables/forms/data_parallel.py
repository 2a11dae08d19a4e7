"""data_parallel tables: looked up at home, kept equal by exchanging (ids, gradient rows), never a table's gradient.

On one device nothing is exchanged, and this is how every table of a single device is looked up and updated.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.tables.collective import ExchangeOptions, from_everywhere
from dlrm_jax.tables.forms.bags import bags_of, pool_bags, row_gradients, update_bags, update_rows
from dlrm_jax.tables.forms.base import Form, Sent, Stack, StackUpdate, States, Work, register
from dlrm_jax.tables.pooling import Take
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
    updates_early = True

    def why(self, rows: int, lookups: int) -> str:
        """Lookups send nothing, and updates little."""
        return "fewer rows than the batch looks up" if rows <= lookups else "lookups at home"

    def route(self, stack: Stack, ids_bxk: jax.Array, scale_bxk: jax.Array | None, options: ExchangeOptions) -> Arrays:
        """Row numbers of the device's own examples, and what their rows are multiplied with."""
        del options
        rows = {"rows": jnp.where(ids_bxk < 0, ids_bxk, ids_bxk + stack.offset_k[None])}
        return rows if scale_bxk is None else rows | {"scale": scale_bxk}

    def lookup(
        self, stack: Stack, tables: Arrays, routes: Arrays, options: ExchangeOptions, take: Take | None = None
    ) -> tuple[jax.Array, Arrays]:
        """At home."""
        del options
        return pool_bags(stack, tables, bags_of(routes, stack.hotness), take), routes

    def update(
        self, step: StackUpdate, routes: Arrays, d_pooled_bxfxD: jax.Array, options: ExchangeOptions
    ) -> tuple[Arrays, States]:
        """Every device sends its gradient rows, those of one id merged where that makes them fewer, and applies all."""
        del options
        stack, bags = step.stack, bags_of(routes, step.stack.hotness)
        if stack.num_devices == 1:
            return update_bags(step, bags, d_pooled_bxfxD)
        grad = row_gradients(stack, step.tables, bags, d_pooled_bxfxD)
        most = _sent_rows(stack, bags.rows_Nxk.shape[0])
        if most < len(grad.ids_M):
            merged = merge_duplicates(grad, stack.rows)
            grad = SparseGrad(merged.ids_M[:most], merged.rows_MxD[:most])
        grad = jax.tree.map(lambda x: from_everywhere(x, stack.num_copies, stack.num_shards), grad)
        return update_rows(step, grad)

    def sent(self, stack: Stack, batch: int, columns: int, scales: bool, options: ExchangeOptions) -> Sent:
        """Ids and gradient rows of all devices."""
        del scales
        rows = self.received(stack, batch, options)
        return [("all-gather", stack.num_devices, rows * 4), ("all-gather", stack.num_devices, rows * columns * 4)]

    def travels(self, rows: int, ids: float, bags: float, distinct: float) -> tuple[float, float]:
        """An id and a gradient row each."""
        del bags, distinct
        return min(rows, ids), min(rows, ids)

    def received(self, stack: Stack, batch: int, options: ExchangeOptions) -> int:
        """Of all devices."""
        del options
        return min(_sent_rows(stack, batch), batch * len(stack.slots)) * stack.num_devices

    def held(self, work: Work) -> int:
        """Ids, and where rows are sorted the places of slots and the gradients to come."""
        slots, width, linear = work.slots, work.stack.width, work.rule.linear
        if work.stack.num_devices > 1:
            return slots * (width + 1) if linear else slots * (width + 2) + work.received * (width + 5)
        if work.bags and not work.learned:  # Updated by bags.
            return slots * (1 if linear else 3)
        return slots * (width * work.learned if linear else width + INTS)

    def at_its_most(self, work: Work) -> int:
        """The gradients of its own slots, and those of all devices."""
        if work.stack.num_devices == 1:
            return self.held(work)
        received = 0 if work.rule.linear else work.received * (work.stack.width + 5)
        return work.slots * (3 * work.stack.width + 4) + received
