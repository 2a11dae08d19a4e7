"""table_wise tables: ids go to the shard that owns the table, pooled vectors come back; all-to-all both ways."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.tables.collective import from_copies, shard_index, to_owners
from dlrm_jax.tables.forms.bags import apply_gradients, read_rows, scale_of, scaled, slot_gradients
from dlrm_jax.tables.layout import PlacedStack

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Parcels:
    """What is sent to each shard: `slot_SxK` of the stack's slots, and `feature_SxF` of its features; -1 is padding.

    `bag_SxK` says to which of a shard's features each slot belongs.
    """

    slot_SxK: np.ndarray
    bag_SxK: np.ndarray
    feature_SxF: np.ndarray


def parcels(stack: PlacedStack) -> Parcels:
    """Who gets what: a feature goes to its table's shard."""
    bounds = np.cumsum([0, *stack.hotness])
    features: list[list[int]] = [[] for _ in range(stack.num_shards)]
    for f in range(len(stack.features)):
        features[stack.first_T[stack.table_K[bounds[f]]]].append(f)
    slots = [[k for f in mine for k in range(bounds[f], bounds[f + 1])] for mine in features]
    bags = [[i for i, f in enumerate(mine) for _ in range(stack.hotness[f])] for mine in features]
    last = max(map(len, features)) - 1
    return Parcels(_padded(slots, -1), _padded(bags, last), _padded(features, -1))


def _padded(lists: list[list[int]], filler: int) -> np.ndarray:
    width = max(map(len, lists))
    return np.array([row + [filler] * (width - len(row)) for row in lists], np.int32).reshape(len(lists), width)


def route(stack: PlacedStack, ids_bxk: jax.Array, scale_bxk: jax.Array, plain_scale: bool) -> Arrays:
    """Row numbers of all the copy's examples in this shard's tables, and their scales."""
    slot_SxK = parcels(stack).slot_SxK
    offset_k = np.array(stack.offset_T, np.int32)[stack.table_K]
    rows_bxk = jnp.where(ids_bxk < 0, -1, ids_bxk + offset_k[None])
    empty = jnp.asarray(slot_SxK < 0)[:, None]
    rows = to_owners(jnp.where(empty, -1, _parts(rows_bxk, slot_SxK)), stack.num_shards)
    rows = rows.reshape(-1, slot_SxK.shape[1])
    if plain_scale:
        return {"rows": rows}
    scale = to_owners(jnp.where(empty, 0, _parts(scale_bxk, slot_SxK)), stack.num_shards)
    return {"rows": rows, "scale": scale.reshape(rows.shape)}


def _parts(x_bxk: jax.Array, columns_SxK: np.ndarray) -> jax.Array:
    """(S, b, K, ...): the columns for each shard; those of padding are any."""
    return jnp.moveaxis(x_bxk[:, np.maximum(columns_SxK, 0)], 1, 0)


def lookup(stack: PlacedStack, tables: Arrays, routes: Arrays, dtype: str) -> tuple[jax.Array, Arrays]:
    """pooled_bxfxD, each feature from its owner."""
    parcel, shards = parcels(stack), stack.num_shards
    slots_BxKxD = scaled(stack, read_rows(stack, tables, routes["rows"]), scale_of(routes))
    pooled_BxFxD = _sum_bags(stack, slots_BxKxD, parcel)
    pooled_SxbxFxD = to_owners(pooled_BxFxD.reshape(shards, -1, *pooled_BxFxD.shape[1:]), shards, dtype)
    shard_F, place_F = np.nonzero(parcel.feature_SxF >= 0)
    order = np.argsort(parcel.feature_SxF[shard_F, place_F])
    return jnp.stack([pooled_SxbxFxD[shard_F[i], :, place_F[i]] for i in order], axis=1), routes


def _sum_bags(stack: PlacedStack, slots_BxKxD: jax.Array, parcel: Parcels) -> jax.Array:
    """(B, F, D): sums over each of this shard's bags; which slots those are differs from shard to shard."""
    num_bags = parcel.feature_SxF.shape[1]
    if max(stack.hotness) == 1:
        return slots_BxKxD
    bag_K = jnp.asarray(parcel.bag_SxK)[shard_index(stack.num_shards)]
    slots_KxBxD = jnp.moveaxis(slots_BxKxD, 1, 0)
    pooled = jax.ops.segment_sum(slots_KxBxD, bag_K, num_segments=num_bags, indices_are_sorted=True)
    return jnp.moveaxis(pooled, 0, 1)


def update(
    stack: PlacedStack,
    optimizers: Any,
    tables: Arrays,
    opt_state: Arrays,
    routes: Arrays,
    d_pooled: jax.Array,
    rate: jax.Array,
    dtype: str,
) -> tuple[Arrays, Arrays]:
    """Pooled gradients go to the owners, which know the ids already; copies exchange them with the ids."""
    parcel, shards = parcels(stack), stack.num_shards
    empty = jnp.asarray(parcel.feature_SxF < 0)[:, None, :, None]
    parts_SxbxFxD = jnp.where(empty, 0, _parts(d_pooled, parcel.feature_SxF))
    d_BxFxD = to_owners(parts_SxbxFxD, shards, dtype).reshape(-1, *parts_SxbxFxD.shape[2:])
    everyones = {name: from_copies(x, stack.num_copies) for name, x in routes.items()}
    row_ids, scale, d_BxFxD = everyones["rows"], scale_of(everyones), from_copies(d_BxFxD, stack.num_copies)
    d_slots = d_BxFxD
    if max(stack.hotness) > 1:
        d_slots = jnp.take(d_BxFxD, jnp.asarray(parcel.bag_SxK)[shard_index(shards)], axis=1)
    rows = read_rows(stack, tables, row_ids) if len(tables) > 1 else None
    grads = slot_gradients(stack, d_slots, scale, rows)
    return apply_gradients(
        stack, optimizers, tables, opt_state, row_ids.reshape(-1), grads.reshape(-1, grads.shape[-1]), rate
    )
