"""table_wise tables: ids go to the shard that owns the table, pooled vectors come back; all-to-all both ways.

All shards run one program, so their parcels have one shape: each shard's features are sorted by hotness, and the i-th
bag of every shard has as many slots as the largest of the i-th bags. With bags of 20 and 3 ids on one shard and of 5
and 5 on another, parcels are of 20 + 5 slots, and the missing ones are empty.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.tables.collective import ExchangeOptions, from_copies, to_owners
from dlrm_jax.tables.forms.bags import bags_of, pool_bags, sent_of_bags, update_bags
from dlrm_jax.tables.forms.base import ONE, Form, Here, Learning, Sent, Stack, States, Work, register
from dlrm_jax.tables.forms.data_parallel import INTS
from dlrm_jax.tables.rules import Arrays


@dataclasses.dataclass(frozen=True)
class Parcels:
    """What is sent to each shard: `slot_SxK` of the stack's slots, and `feature_SxF` of its features; -1 is padding.

    `hotness` is that of each place of `feature_SxF`, on all shards.
    """

    slot_SxK: np.ndarray
    feature_SxF: np.ndarray
    hotness: tuple[int, ...]


def parcels(stack: Stack) -> Parcels:
    """Who gets what: a feature goes to its table's shard."""
    bounds = np.cumsum([0, *stack.hotness])
    features: list[list[int]] = [[] for _ in range(stack.num_shards)]
    for f in range(len(stack.features)):
        features[stack.first_T[stack.table_K[bounds[f]]]].append(f)
    features = [sorted(mine, key=lambda f: -stack.hotness[f]) for mine in features]
    places = range(max(map(len, features)))
    hotness = tuple(max(stack.hotness[mine[i]] for mine in features if i < len(mine)) for i in places)
    slots = [
        np.concatenate([_padded(range(bounds[f], bounds[f + 1]), h) for f, h in zip(mine, hotness, strict=False)])
        if mine
        else np.zeros(0, np.int32)
        for mine in features
    ]
    return Parcels(
        np.array([_padded(mine, sum(hotness)) for mine in slots], np.int32),
        np.array([_padded(mine, len(hotness)) for mine in features], np.int32),
        hotness,
    )


def _padded(numbers: Any, width: int) -> np.ndarray:
    return np.pad(np.array(list(numbers), np.int32), (0, width - len(numbers)), constant_values=-1)


def _parts(x_bxk: jax.Array, columns_SxK: np.ndarray) -> jax.Array:
    """(S, b, K, ...): the columns for each shard; those of padding are any."""
    return jnp.moveaxis(x_bxk[:, np.maximum(columns_SxK, 0)], 1, 0)


@register("table_wise")
class TableWise(Form):
    """Each table whole on one shard."""

    arrays = "owned"
    why = "whole on the device that carried least"
    splits_rows = True
    span = ONE

    def route(self, here: Here, ids_bxk: jax.Array, scale_bxk: jax.Array | None) -> Arrays:
        """Row numbers of all the copy's examples in this shard's tables, and their scales where ids do not say them."""
        stack, slot_SxK = here.stack, parcels(here.stack).slot_SxK
        rows_bxk = jnp.where(ids_bxk < 0, -1, ids_bxk + stack.offset_k[None])
        empty = jnp.asarray(slot_SxK < 0)[:, None]
        rows = to_owners(jnp.where(empty, -1, _parts(rows_bxk, slot_SxK)), stack.num_shards)
        rows = rows.reshape(-1, slot_SxK.shape[1])
        if scale_bxk is None:
            return {"rows": rows}
        scale = to_owners(jnp.where(empty, 0, _parts(scale_bxk, slot_SxK)), stack.num_shards)
        return {"rows": rows, "scale": scale.reshape(rows.shape)}

    def lookup(self, here: Here, routes: Arrays) -> tuple[jax.Array, Arrays]:
        """Each feature from its owner."""
        parcel, shards = parcels(here.stack), here.stack.num_shards
        pooled_BxFxD = pool_bags(here, bags_of(routes, parcel.hotness))
        pooled_BxFxD = pooled_BxFxD.reshape(shards, -1, *pooled_BxFxD.shape[1:])
        pooled_SxbxFxD = to_owners(pooled_BxFxD, shards, here.options.dtype)
        shard_F, place_F = np.nonzero(parcel.feature_SxF >= 0)
        order = np.argsort(parcel.feature_SxF[shard_F, place_F])
        return jnp.stack([pooled_SxbxFxD[shard_F[i], :, place_F[i]] for i in order], axis=1), routes

    def update(self, here: Learning, routes: Arrays, d_pooled_bxfxD: jax.Array) -> tuple[Arrays, States]:
        """Pooled gradients go to the owners, which know the ids already; copies exchange them with the ids."""
        stack, parcel, shards = here.stack, parcels(here.stack), here.stack.num_shards
        empty = jnp.asarray(parcel.feature_SxF < 0)[:, None, :, None]
        parts_SxbxFxD = jnp.where(empty, 0, _parts(d_pooled_bxfxD, parcel.feature_SxF))
        d_BxFxD = to_owners(parts_SxbxFxD, shards, here.options.dtype).reshape(-1, *parts_SxbxFxD.shape[2:])
        everyones = {name: from_copies(x, stack.num_copies) for name, x in routes.items()}
        return update_bags(here, bags_of(everyones, parcel.hotness), from_copies(d_BxFxD, stack.num_copies))

    def sent(self, stack: Stack, batch: int, columns: int, scales: bool, options: ExchangeOptions) -> Sent:
        """Parcels of ids to the owners, of pooled vectors back, and of their gradients."""
        del columns
        slots, features = parcels(stack).slot_SxK.shape[1], parcels(stack).feature_SxF.shape[1]
        return sent_of_bags(stack, "all-to-all", batch, (slots, features * stack.dim), scales, options)

    def looked_up(self, stack: Stack, batch: int) -> int:
        """Its parcels' slots of all of its copy's examples."""
        return -(-batch // stack.num_copies) * parcels(stack).slot_SxK.shape[1]

    def memory(self, work: Work) -> tuple[int, int]:
        """Ids, and where rows are sorted the places of slots, their gradients, and what is kept a weight."""
        linear, slots = work.rule.linear, work.slots * work.stack.num_copies
        if work.in_pieces:
            return (slots * (2 if linear else 4),) * 2
        return (slots * (4 if linear else work.stack.width + work.kept_a_row + INTS),) * 2
