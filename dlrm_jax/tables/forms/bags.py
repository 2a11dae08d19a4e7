"""Bags on one device: from row numbers to pooled vectors, and from their gradients to updates of the rows.

Every form of a table comes down to this on the shard that holds its rows, and one device is the case of one shard.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import ModelConfig
from dlrm_jax.host.formulations import by_platform
from dlrm_jax.tables import pooling
from dlrm_jax.tables.collective import ExchangeOptions
from dlrm_jax.tables.forms.base import Here, Learning, Sent, Stack, States
from dlrm_jax.tables.pooling import POOLING_WEIGHTS, Take
from dlrm_jax.tables.rows import take_rows
from dlrm_jax.tables.rules import Arrays, row_means
from dlrm_jax.tables.updates import BagGrad, SparseGrad, Stored


class Bags(NamedTuple):
    """Id slots of N examples, features side by side with `hotness` slots each; those of one feature are a bag.

    `rows_Nxk` are their row numbers, negative where a slot is empty. `scale_Nxk` is what a slot's row is multiplied
    with, None where bags are the bare sums of their rows.
    """

    rows_Nxk: jax.Array
    scale_Nxk: jax.Array | None
    hotness: tuple[int, ...]


def bags_of(routes: Arrays, hotness: tuple[int, ...]) -> Bags:
    """Those that `routes` holds as `rows` and perhaps `scale`."""
    return Bags(routes["rows"], routes.get("scale"), hotness)


def sent_of_bags(
    stack: Stack, kind: str, batch: int, each: tuple[int, int], scales: bool, options: ExchangeOptions
) -> Sent:
    """Ids, and perhaps their scales, to whoever has the rows by a collective of `kind`, pooled vectors back and forth.

    `each` says how many slots and floats of pooled vectors an example has on a shard; copies exchange what arrived.
    """
    shards, copies = stack.num_shards, stack.num_copies
    slots, pooled = (shards * batch * count for count in each)
    found = [(kind, shards, slots * 4), ("all-gather", copies, copies * slots * 4)] * (1 + scales)
    found += [("all-to-all", shards, pooled * options.float_bytes)] * 2
    return [*found, ("all-gather", copies, copies * pooled * 4)]


def slot_scale(model: ModelConfig, ids_BxK: jax.Array, id_weights_BxK: jax.Array | None) -> jax.Array | None:
    """What each slot's row is multiplied with: 0 if empty, 1/count for mean pooling, the id's weight; None: bare sums.

    Learned pooling weights come on top (`pool_bags`).
    """
    means = any(feature.pooling == "mean" and feature.hotness > 1 for feature in model.features)
    if id_weights_BxK is None and not means:
        return None
    filled_BxK = (ids_BxK >= 0).astype(jnp.float32)
    scale_BxK = filled_BxK if id_weights_BxK is None else filled_BxK * id_weights_BxK
    if any(feature.pooling == "mean" for feature in model.features):
        hotness = [feature.hotness for feature in model.features]
        count_BxF = jnp.maximum(sum_bags(filled_BxK[:, :, None], tuple(hotness))[:, :, 0], 1)
        mean_K = np.repeat([feature.pooling == "mean" for feature in model.features], hotness)
        count_BxK = count_BxF[:, np.repeat(np.arange(len(hotness)), hotness)]
        scale_BxK = jnp.where(mean_K[None], scale_BxK / count_BxK, scale_BxK)
    return scale_BxK


def sum_bags(slots_BxKxD: jax.Array, hotness: tuple[int, ...]) -> jax.Array:
    """(B, F, D): sums over each feature's consecutive slots."""
    if len(set(hotness)) == 1:
        batch, _, width = slots_BxKxD.shape
        return slots_BxKxD.reshape(batch, len(hotness), hotness[0], width).sum(axis=2)
    starts = np.cumsum((0, *hotness))
    bags = [slots_BxKxD[:, start:stop].sum(axis=1) for start, stop in itertools.pairwise(starts)]
    return jnp.stack(bags, axis=1)


def sum_bags_of_slots(slots_kxbxD: jax.Array, hotness: tuple[int, ...]) -> jax.Array:
    """pooled_bxfxD: sums over each feature's consecutive slots, of arrays with the slots first."""
    starts = np.cumsum((0, *hotness))
    bags = [slots_kxbxD[start:stop].sum(axis=0) for start, stop in itertools.pairwise(starts)]
    return jnp.stack(bags, axis=1)


def read_rows(here: Here, row_ids: jax.Array) -> jax.Array:
    """(*row_ids.shape, W): local rows by number; where a number is outside, any row.

    With learned pooling weights a row carries its weight in one more column: W is the width + 1.
    """
    flat, stack = row_ids.reshape(-1), here.stack
    rows = stack.dtype.to_floats(take_rows(here.tables[stack.name], flat, stack.width))
    if here.learns_weights:
        rows = jnp.concatenate([rows, take_rows(here.tables[stack.name + POOLING_WEIGHTS], flat, 1)], axis=1)
    return rows.reshape(*row_ids.shape, -1)


def scaled(stack: Stack, rows: jax.Array, scale: jax.Array) -> jax.Array:
    """What each slot adds to its bag: its row times `scale` and its learned weight."""
    if rows.shape[-1] > stack.width:
        scale = scale * rows[..., -1]
    return rows[..., : stack.width] * scale[..., None]


def pool_bags(here: Here, bags: Bags) -> jax.Array:
    """pooled_Nxfxw: each bag's rows, times their scales, summed."""
    take, table, (rows_Nxk, scale_Nxk, hotness) = here.take or _take_of(here.stack), here.tables[here.stack.name], bags
    if here.learns_weights:
        # In one read, which the way back shares: it needs the rows again, before the update writes to them.
        weights_M = take_rows(here.tables[here.stack.name + POOLING_WEIGHTS], rows_Nxk.reshape(-1), 1)
        scale_Nxk = _filled(rows_Nxk, scale_Nxk) * weights_M.reshape(rows_Nxk.shape)
        return sum_bags(take(table, rows_Nxk) * scale_Nxk[:, :, None], hotness)
    pooled: list[jax.Array] = []
    features: list[int] = []
    for group, members in _groups(hotness):
        scale = None if scale_Nxk is None else scale_Nxk[:, group]
        if here.pool is None:
            pooled.append(pooling.pool(take, table, rows_Nxk[:, group], scale))
        else:
            pooled.append(here.pool(here.stack, table, rows_Nxk[:, group], scale))
        features += members
    return pooled[0] if len(pooled) == 1 else jnp.concatenate(pooled, axis=1)[:, np.argsort(features)]


def _take_of(stack: Stack) -> Take:
    def take(table: jax.Array, ids: jax.Array) -> jax.Array:
        if stack.pack == 1:
            return stack.dtype.to_floats(pooling.read_rows(table, ids))
        return stack.dtype.to_floats(take_rows(table, ids.reshape(-1), stack.width)).reshape(*ids.shape, stack.width)

    return take


def _filled(rows: jax.Array, scale: jax.Array | None) -> jax.Array:
    """`scale`, or where it is None what it would be: 1 for a slot with a row, else 0."""
    return (rows >= 0).astype(jnp.float32) if scale is None else scale


def _groups(hotness: tuple[int, ...]) -> Iterator[tuple[np.ndarray, list[int]]]:
    """(slots as (G, h) positions, features) of the features of one hotness h."""
    starts = np.cumsum((0, *hotness))
    for h in sorted(set(hotness)):
        members = [i for i, own in enumerate(hotness) if own == h]
        yield starts[members][:, None] + np.arange(h), members


def slot_gradients(stack: Stack, d_slots: jax.Array, scale: jax.Array, rows: jax.Array | None) -> jax.Array:
    """The gradient of `scaled` in the rows, (..., W): `rows` are those looked up, None without learned weights."""
    if rows is None:
        return d_slots * scale[..., None]
    d_weights = (d_slots * rows[..., : stack.width]).sum(axis=-1) * scale
    return jnp.concatenate([d_slots * (scale * rows[..., -1])[..., None], d_weights[..., None]], axis=-1)


def row_gradients(here: Here, bags: Bags, d_pooled_Nxfxw: jax.Array) -> SparseGrad:
    """The gradient of `pool_bags` in the stack's rows, one a slot, (N * k, W)."""
    d_slots = d_pooled_Nxfxw[:, np.repeat(np.arange(len(bags.hotness)), bags.hotness)]
    rows = read_rows(here, bags.rows_Nxk) if here.learns_weights else None
    grads = slot_gradients(here.stack, d_slots, _filled(bags.rows_Nxk, bags.scale_Nxk), rows)
    return SparseGrad(bags.rows_Nxk.reshape(-1), grads.reshape(-1, grads.shape[-1]))


def _bag_gradients(bags: Bags, d_pooled_Nxfxw: jax.Array) -> tuple[BagGrad, ...]:
    """`row_gradients` by bags, those of one hotness together. Not where pooling weights are learned."""
    gradients = []
    for group, members in _groups(bags.hotness):
        by_slot = group.T[:, None]  # (h, 1, G), to have slots first and bags of all examples next to each other.
        examples = np.arange(bags.rows_Nxk.shape[0])[None, :, None]
        scale = None if bags.scale_Nxk is None else bags.scale_Nxk[examples, by_slot].reshape(group.shape[1], -1)
        gradients.append(
            BagGrad(
                ids_hxN=bags.rows_Nxk[examples, by_slot].reshape(group.shape[1], -1),
                scale_hxN=scale,
                d_bags_NxD=d_pooled_Nxfxw[:, np.array(members)].reshape(-1, d_pooled_Nxfxw.shape[2]),
            )
        )
    return tuple(gradients)


def update_bags(here: Learning, bags: Bags, d_pooled_Nxfxw: jax.Array) -> tuple[Arrays, States]:
    """The stack's tables and slots after the gradient of `pool_bags`."""
    name, hotness = here.stack.name, bags.hotness

    def by_rows(tables: Arrays, states: States, rows: Any, scale: Any, d_pooled: Any) -> tuple[Arrays, States]:
        now = dataclasses.replace(here, tables=tables, states=states)
        return update_rows(now, row_gradients(now, Bags(rows, scale, hotness), d_pooled))

    def by_bags(tables: Arrays, states: States, rows: Any, scale: Any, d_pooled: Any) -> tuple[Arrays, States]:
        gradients = _bag_gradients(Bags(rows, scale, hotness), d_pooled)
        stored = here.of_rows.by_bags(gradients, Stored(tables[name], states[name]))
        return {name: stored.weights}, {name: stored.slots}

    args: Any = (here.tables, here.states, bags.rows_Nxk, bags.scale_Nxk, d_pooled_Nxfxw)
    one_id_a_bag = sum(hotness) == len(hotness) and here.of_rows.segments is None
    shared = here.stack.num_shards > 1 and here.of_rows.dim and row_means(here.of_rows.rule)
    if one_id_a_bag or shared or here.learns_weights:
        return by_rows(*args)  # Devices that share rows agree on a mean in one collective, not in one a piece.
    if here.of_rows.segments is not None:
        return by_bags(*args)
    return by_platform(by_bags, by_rows, *args)


def update_rows(here: Learning, grad: SparseGrad) -> tuple[Arrays, States]:
    """The stack's tables and slots after a gradient of their rows, (M, W)."""
    name, rows_MxW, width = here.stack.name, grad.rows_MxD, here.stack.width
    parts = {name: (here.of_rows, rows_MxW[:, :width])}
    if here.learns_weights:
        parts[name + POOLING_WEIGHTS] = (here.of_weights, rows_MxW[:, width:])
    new_tables, new_states = {}, {}
    for name, (update, rows_MxD) in parts.items():
        stored = update.by_rows(SparseGrad(grad.ids_M, rows_MxD), Stored(here.tables[name], here.states[name]))
        new_tables[name], new_states[name] = stored
    return new_tables, new_states
