"""row_wise and table_row_wise tables: each device asks the owners for the rows it needs, every row once.

A device's distinct rows, sorted by owner, go out in buffers of `capacity` row numbers a peer; rows come back, and
gradients, summed by row, go the same way. Where more are needed than fit, the exchange goes on in further rounds: all
devices agree (a minimum over the mesh) up to which row of each owner a round reaches, so that an owner sees all
gradients of a row in one round, duplicates are merged before Adagrad squares them, and no buffer is larger than
planned. Nothing is dropped, and the numbers do not depend on the capacity.

Two shards, `capacity` 2; row r lies on shard r mod 2 as its local row r // 2. One device needs rows 0, 2, 4, 1, its
peer 2, 6. Sorted by owner the first has (shard 0: 0, 1, 2; shard 1: 0), the second (shard 0: 1, 3). The first can ask
shard 0 for rows 0 and 1 only, so the first round ends before local row 2 on both devices: asked are {0, 1 | 0} and {1}.
In the second round they ask shard 0 for {2} and {3}. So row 2, local row 1, which both need, is asked in one round.

Id slots lie flat, slot by slot over all examples: M = k * b. As (b, k, W) a TPU would pad k to a multiple of eight, and
copy all rows to get there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.host.mesh import DATA, MODEL
from dlrm_jax.tables.collective import ExchangeOptions, from_copies, to_owners
from dlrm_jax.tables.forms.bags import read_rows, scaled, slot_gradients, sum_bags_of_slots, update_rows
from dlrm_jax.tables.forms.base import Form, Here, Learning, Sent, Stack, States, Work, register
from dlrm_jax.tables.rows import take_rows
from dlrm_jax.tables.rules import Arrays
from dlrm_jax.tables.updates import SparseGrad

T = TypeVar("T")


def _distinct(key_M: jax.Array, void: int) -> tuple[jax.Array, jax.Array]:
    """(distinct keys, ascending, then `void`; the place of each key among them)."""
    num = key_M.shape[0]
    sorted_M, order_M = jax.lax.sort_key_val(key_M, jnp.arange(num, dtype=jnp.int32))
    is_new_M = jnp.concatenate([jnp.zeros(1, bool), sorted_M[1:] != sorted_M[:-1]])
    place_M = jnp.cumsum(is_new_M.astype(jnp.int32))
    unique_M = jnp.full(num, void, jnp.int32).at[place_M].set(sorted_M, indices_are_sorted=True)
    return unique_M, jnp.zeros(num, jnp.int32).at[order_M].set(place_M, unique_indices=True)


def _round_end(stack: Stack, unique_M: jax.Array, start_S: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """(where in `unique_M` the round that begins at `start_S` ends, for each owner; whether another must follow).

    It ends before the first row that does not fit a device's buffer, the same row on all devices.
    """
    ends_S = (jnp.arange(stack.num_shards, dtype=jnp.int32) + 1) * stack.rows
    if capacity >= unique_M.shape[0]:
        return jnp.searchsorted(unique_M, ends_S).astype(jnp.int32), jnp.zeros((), bool)
    first_left_S = unique_M.at[jnp.minimum(start_S + capacity, unique_M.shape[0] - 1)].get(mode="promise_in_bounds")
    first_left_S = jnp.where(start_S + capacity < unique_M.shape[0], jnp.minimum(first_left_S, ends_S), ends_S)
    axes = tuple(axis for axis, size in ((DATA, stack.num_copies), (MODEL, stack.num_shards)) if size > 1)
    until_S = jax.lax.pmin(first_left_S, axes) if axes else first_left_S
    return jnp.searchsorted(unique_M, until_S).astype(jnp.int32), (until_S < ends_S).any()


def _requests(stack: Stack, unique_M: jax.Array, start_S: jax.Array, stop_S: jax.Array, capacity: int) -> jax.Array:
    """(S, C): the local rows to ask of each owner in a round; its number of rows where there is nothing to ask."""
    place_SxC, inside_SxC = _places(unique_M, start_S, stop_S, capacity)
    local_SxC = unique_M[place_SxC] - (jnp.arange(stack.num_shards, dtype=jnp.int32) * stack.rows)[:, None]
    return jnp.where(inside_SxC, local_SxC, stack.rows)


def _places(unique_M: jax.Array, start_S: jax.Array, stop_S: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    place_SxC = start_S[:, None] + jnp.arange(capacity, dtype=jnp.int32)[None]
    return jnp.minimum(place_SxC, unique_M.shape[0] - 1), place_SxC < stop_S[:, None]


def _in_rounds(stack: Stack, routes: Arrays, capacity: int, do: Callable[..., T], start: T) -> T:
    """`start` after `do(what came of the last round, rows that peers ask for, their places' start and stop)`s."""
    unique_M = routes["unique"]
    done = do(start, routes["asked"], routes["start"], routes["stop"])

    def next_round(carry: tuple) -> tuple:
        done, start_S, _ = carry
        stop_S, more = _round_end(stack, unique_M, start_S, capacity)
        asked_SxC = to_owners(_requests(stack, unique_M, start_S, stop_S, capacity), stack.num_shards)
        return do(done, asked_SxC, start_S, stop_S), stop_S, more

    if capacity < unique_M.shape[0]:
        more = routes["more"][0] > 0
        done, _, _ = jax.lax.while_loop(lambda carry: carry[2], next_round, (done, routes["stop"], more))
    return done


def _scale(routes: Arrays) -> jax.Array:
    """What each slot's row is multiplied with; the row of an empty slot is 0, and its gradient goes to no owner."""
    return routes.get("scale", jnp.ones(routes["rank"].shape, jnp.float32))


def _sent_as_stored(stack: Stack, learned: bool, options: ExchangeOptions) -> bool:
    return stack.dtype.bytes <= options.float_bytes and not learned


@register("row_wise")
class RowWise(Form):
    """Rows dealt out to all shards."""

    arrays = "routed"
    why = "each distinct row travels once each way"
    splits_rows = True
    in_rounds = True
    updates_early = True

    def route(self, here: Here, ids_bxk: jax.Array, scale_bxk: jax.Array | None) -> Arrays:
        """Distinct rows, who asks whom for which, and where each slot finds its row.

        `unique_M`: the device's distinct rows as owner * rows + local row, ascending, then the void S * rows.
        `rank_M`: each slot's place in it. `stop_S`: the first round's end in it, for each owner. `asked_SxC`: local
        rows that each peer asks of this device in the first round. `more` says whether another round must follow.
        """
        stack, capacity = here.stack, here.options.rows_at_once(here.stack.name, ids_bxk.size)
        shards, void = stack.num_shards, stack.num_shards * stack.rows
        first_k, count_k = (np.array(of_T, np.int32)[stack.table_K] for of_T in (stack.first_T, stack.count_T))
        ids_kxb = ids_bxk.T
        owner = first_k[:, None] + ids_kxb % count_k[:, None]
        local = stack.offset_k[:, None] + ids_kxb // count_k[:, None]
        unique_M, rank_M = _distinct(jnp.where(ids_kxb < 0, void, owner * stack.rows + local).reshape(-1), void)
        starts_S = jnp.searchsorted(unique_M, jnp.arange(shards, dtype=jnp.int32) * stack.rows).astype(jnp.int32)
        routes = {"unique": unique_M, "rank": rank_M, "start": starts_S}
        if scale_bxk is not None:
            routes["scale"] = scale_bxk.T.reshape(-1)
        stop_S, more = _round_end(stack, unique_M, starts_S, capacity)
        asked_SxC = to_owners(_requests(stack, unique_M, starts_S, stop_S, capacity), shards)
        return routes | {"stop": stop_S, "more": more[None].astype(jnp.int32), "asked": asked_SxC}

    def lookup(self, here: Here, routes: Arrays) -> tuple[jax.Array, Arrays]:
        """Bags of the rows that come back, as they are stored if that is not more than as `options` say.

        With learned weights they join the routes, for the way back.
        """
        assert here.take is None, "rows of other types than float32 are served under other sharding types"
        stack, rank_M = here.stack, routes["rank"]
        capacity = here.options.rows_at_once(stack.name, len(rank_M))

        def receive(rows_MxW: jax.Array, asked_SxC: jax.Array, start_S: jax.Array, stop_S: jax.Array) -> jax.Array:
            """The slots' rows, those of this round filled in."""
            if stored:
                flat_M = take_rows(here.tables[stack.name], asked_SxC.reshape(-1), stack.width)
                answers_SxCxW = to_owners(flat_M.reshape(*asked_SxC.shape, -1), stack.num_shards)
            else:
                answers_SxCxW = to_owners(read_rows(here, asked_SxC), stack.num_shards, here.options.dtype)
            owner = jnp.searchsorted(stop_S, rank_M, side="right").astype(jnp.int32)
            owner = jnp.minimum(owner, stack.num_shards - 1)
            place = rank_M - start_S[owner]
            got = (place >= 0) & (place < stop_S[owner] - start_S[owner])
            flat = owner * capacity + jnp.clip(place, 0, capacity - 1)
            new = answers_SxCxW.reshape(-1, answers_SxCxW.shape[-1]).at[flat].get(mode="promise_in_bounds")
            return jnp.where(got[:, None], stack.dtype.to_floats(new) if stored else new, rows_MxW)

        stored = _sent_as_stored(stack, here.learns_weights, here.options)
        none = jnp.zeros((len(rank_M), stack.width + here.learns_weights), jnp.float32)
        rows = _in_rounds(stack, routes, capacity, receive, none)
        slots_MxD = scaled(stack, rows, _scale(routes))
        pooled = sum_bags_of_slots(slots_MxD.reshape(len(stack.slots), -1, stack.width), stack.hotness)
        return pooled, routes | ({"rows": rows} if here.learns_weights else {})

    def update(self, here: Learning, routes: Arrays, d_pooled_bxfxD: jax.Array) -> tuple[Arrays, States]:
        """Gradients, summed by row at home, go to the owners, which merge their peers' and apply them once."""
        stack, unique_M = here.stack, routes["unique"]
        num = unique_M.shape[0]
        capacity = here.options.rows_at_once(stack.name, num)
        d_slots_kxbxD = jnp.moveaxis(d_pooled_bxfxD, 1, 0)[np.repeat(np.arange(len(stack.hotness)), stack.hotness)]
        grads_MxW = slot_gradients(stack, d_slots_kxbxD.reshape(num, -1), _scale(routes), routes.get("rows"))
        merged_MxW = jax.ops.segment_sum(grads_MxW, routes["rank"], num_segments=num)

        def apply(arrays: Any, asked_SxC: jax.Array, start_S: jax.Array, stop_S: jax.Array) -> Any:
            place_SxC, inside_SxC = _places(unique_M, start_S, stop_S, capacity)
            sent_SxCxW = jnp.where(inside_SxC[..., None], merged_MxW[place_SxC], 0)
            got_SxCxW = to_owners(sent_SxCxW, stack.num_shards, here.options.dtype)
            ids_M = from_copies(asked_SxC.reshape(-1), stack.num_copies)
            grads_MxW = from_copies(got_SxCxW.reshape(-1, got_SxCxW.shape[-1]), stack.num_copies)
            now = dataclasses.replace(here, tables=arrays[0], states=arrays[1])
            return update_rows(now, SparseGrad(ids_M, grads_MxW))

        return _in_rounds(stack, routes, capacity, apply, (here.tables, here.states))

    def sent(self, stack: Stack, batch: int, columns: int, scales: bool, options: ExchangeOptions) -> Sent:
        """Of one round."""
        del scales
        shards, copies, slots = stack.num_shards, stack.num_copies, batch * len(stack.slots)
        capacity = options.rows_at_once(stack.name, slots)
        rows = shards * capacity
        stored = _sent_as_stored(stack, columns > stack.dim, options)
        numbers = (stack.dtype.bytes if stored else options.float_bytes, options.float_bytes)  # There, and back.
        found = [("all-to-all", shards, rows * size) for size in (4, *(columns * number for number in numbers))]
        found += [("all-gather", copies, copies * rows * 4), ("all-gather", copies, copies * rows * columns * 4)]
        if capacity < slots:  # Where a round ends, for each owner.
            found.append(("all-reduce", shards * copies, shards * 4))
        return found

    def received(self, stack: Stack, batch: int, options: ExchangeOptions) -> int:
        """Buffers of all peers, and of their copies."""
        return stack.num_devices * options.rows_at_once(stack.name, batch * len(stack.slots))

    def memory(self, work: Work) -> tuple[int, int]:
        """Slots' rows and places, and rows of the peers; then gradients, before and after they are summed."""
        width, received = work.stack.width, work.received * work.stack.width
        return work.slots * (width + 2) + received, work.slots * 3 * width + received
