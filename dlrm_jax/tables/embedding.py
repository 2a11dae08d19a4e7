"""Embedding tables on one device: birth, lookup and gradient of the rows. The meaning; placement changes speed.

Tables are stored in stacks: one (rows, D) array holds many tables one below the other, so that one gather and one
scatter serve them all. Only this file knows row offsets; everybody else speaks of table names.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import ModelConfig, TableConfig
from dlrm_jax.tables.optimizers import BagGrad, SparseGrad
from dlrm_jax.tables.pooling import pool, read_rows

MAX_STACK_ROWS = 2**31 - 1
"""Row numbers are int32; more rows start another stack."""

FILL_FLOATS = 2**23
"""Floats drawn at a time when a stack is born."""

POOLING_WEIGHTS = "/pooling_weights"
"""Suffix of the (rows, 1) array beside each stack when pooling weights are learned."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """Tables stored in one array, with each one's first row and the id slots that read the stack."""

    name: str
    tables: tuple[TableConfig, ...]
    first_rows: tuple[int, ...]
    num_rows: int
    slots: np.ndarray
    slot_first_rows: np.ndarray
    hotness: tuple[int, ...]
    features: tuple[int, ...]


def make_stacks(config: ModelConfig, max_rows: int = MAX_STACK_ROWS) -> tuple[Stack, ...]:
    """The stacks of a model: tables in config order, a new stack where `max_rows` would be exceeded."""
    groups: list[list[TableConfig]] = [[]]
    for table in config.tables:
        if groups[-1] and sum(t.num_embeddings for t in groups[-1]) + table.num_embeddings > max_rows:
            groups.append([])
        groups[-1].append(table)
    return tuple(_make_stack(config, f"stack_{i}", group) for i, group in enumerate(groups))


def _make_stack(config: ModelConfig, name: str, tables: list[TableConfig]) -> Stack:
    first_rows = np.cumsum([0] + [table.num_embeddings for table in tables])
    first_row_of = dict(zip((table.name for table in tables), first_rows[:-1].tolist(), strict=True))
    feature_starts = np.cumsum([0] + [feature.hotness for feature in config.features])
    features = [i for i, feature in enumerate(config.features) if feature.table in first_row_of]
    hotness = tuple(config.features[i].hotness for i in features)
    return Stack(
        name=name,
        tables=tuple(tables),
        first_rows=tuple(first_rows[:-1].tolist()),
        num_rows=int(first_rows[-1]),
        slots=np.concatenate([np.arange(feature_starts[i], feature_starts[i + 1]) for i in features]),
        slot_first_rows=np.repeat([first_row_of[config.features[i].table] for i in features], hotness).astype(np.int32),
        hotness=hotness,
        features=tuple(features),
    )


def init_tables(config: ModelConfig, seed: int) -> dict[str, jax.Array]:
    """All stacks, drawn by a hash of (seed, table name, row, column): the same values under every placement.

    `table_init="dlrm"` is U(+-sqrt(1 / num_embeddings)), `"flax"` N(0, 1/sqrt(D)) as flax.linen.Embed.
    Learned pooling weights start at 1.
    """
    tables = {}
    for stack in make_stacks(config):
        tables[stack.name] = _fill(stack, config, seed)
        if config.learned_pooling:
            tables[stack.name + POOLING_WEIGHTS] = jnp.ones((stack.num_rows, 1), jnp.float32)
    return tables


def _fill(stack: Stack, config: ModelConfig, seed: int) -> jax.Array:
    sizes = np.array([table.num_embeddings for table in stack.tables])
    table_R = np.repeat(np.arange(len(sizes), dtype=np.int16 if len(sizes) < 2**15 else np.int32), sizes)
    keys_Tx2, scale_T = table_keys(stack.tables, seed), table_scales(config, stack.tables)
    constants = (np.array(stack.first_rows, np.uint32), keys_Tx2, scale_T)
    rows = jnp.zeros((stack.num_rows, config.embedding_dim), jnp.float32)
    # In pieces, because the compiler keeps a handful of numbers per row beside the rows that it fills.
    piece = min(max(1, FILL_FLOATS // config.embedding_dim), stack.num_rows)
    fill = jax.jit(_fill_piece, static_argnames="normal", donate_argnums=0)
    for start in range(0, stack.num_rows, piece):
        start = min(start, stack.num_rows - piece)
        table_P = table_R[start : start + piece]
        rows = fill(rows, np.uint32(start), table_P, *constants, normal=config.table_init == "flax")
    return rows


def _fill_piece(
    rows_RxD: jax.Array,
    start: jax.Array,
    table_P: jax.Array,
    first_row_T: jax.Array,
    key_Tx2: jax.Array,
    scale_T: jax.Array,
    normal: bool,
) -> jax.Array:
    """`rows_RxD` with the P rows from `start` drawn; `table_P` says which table each belongs to."""
    shape = (table_P.shape[0], rows_RxD.shape[1])
    row_PxD = jax.lax.broadcasted_iota(jnp.uint32, shape, 0) + (start - first_row_T[table_P])[:, None]
    column_PxD = jax.lax.broadcasted_iota(jnp.uint32, shape, 1)
    drawn_PxD = draw(row_PxD, column_PxD, key_Tx2[table_P][:, None], scale_T[table_P][:, None], normal)
    return jax.lax.dynamic_update_slice(rows_RxD, drawn_PxD, (start, jnp.uint32(0)))


def draw(row: jax.Array, column: jax.Array, key: jax.Array, scale: jax.Array, normal: bool) -> jax.Array:
    """Initial weights at (row, column) of the tables whose `table_keys` and scales are given; uint32, any one shape."""
    bits = _mix(row * jnp.uint32(0x9E3779B1) + key[..., 0])
    bits = _mix(bits ^ (column * jnp.uint32(0x85EBCA77) + key[..., 1]))
    # (k + 1/2) / 2^23 for a signed 24-bit k is exact in float32, symmetric around 0 and never +-1.
    signed = jax.lax.bitcast_convert_type(bits, jnp.int32) >> 8
    unit = (signed.astype(jnp.float32) + 0.5) * jnp.float32(2**-23)
    if normal:
        unit = jax.lax.erf_inv(unit) * jnp.float32(2**0.5)
    return unit * scale


def table_keys(tables: tuple[TableConfig, ...], seed: int) -> np.ndarray:
    """(T, 2) uint32: what stands for (seed, table name) in `draw`."""
    digests = [hashlib.blake2b(f"{seed}/{table.name}".encode(), digest_size=8).digest() for table in tables]
    return np.array([np.frombuffer(digest, np.uint32) for digest in digests])


def table_scales(config: ModelConfig, tables: tuple[TableConfig, ...]) -> np.ndarray:
    """(T,) float32: the half-width or standard deviation of each table's initial weights."""
    sizes = np.array([table.num_embeddings for table in tables])
    scale_T = np.sqrt(1 / sizes) if config.table_init == "dlrm" else np.full(len(sizes), config.embedding_dim**-0.5)
    return scale_T.astype(np.float32)


def _mix(x: jax.Array) -> jax.Array:
    """The 32-bit finalizer of MurmurHash3: every input bit flips every output bit with probability one half."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def lookup(
    config: ModelConfig,
    tables: dict[str, jax.Array],
    ids_BxK: jax.Array,
    id_weights_BxK: jax.Array | None = None,
    take: Callable[[jax.Array, jax.Array], jax.Array] = read_rows,
) -> jax.Array:
    """pooled_BxFxD: each bag's rows, times `id_weights_BxK` if given, summed or averaged over its non-empty slots.

    An empty bag pools to zeros. Ids must be inside their table or EMPTY_SLOT (batch.check_ids sees to it). `take` reads
    float32 rows from however a stack is stored (serving/artifact/quantise.py).
    """
    pooled: list[jax.Array] = []
    features: list[int] = []
    for stack, row_ids, scale in stack_slots(config, ids_BxK, id_weights_BxK):
        if config.learned_pooling:
            assert scale is not None
            # In one read, which the way back shares: it needs the rows again, before the update writes to them.
            weights = _learned_scale(config, stack, tables, row_ids, scale)
            pooled.append(sum_bags(take(tables[stack.name], row_ids) * weights[:, :, None], stack.hotness))
            features += stack.features
            continue
        for group, members in _groups(stack):
            group_scale = None if scale is None else scale[:, group]
            pooled.append(pool(take, tables[stack.name], row_ids[:, group], group_scale))
            features += members
    if len(pooled) == 1:
        return pooled[0]
    return jnp.concatenate(pooled, axis=1)[:, np.argsort(features)]


def stack_slots(
    config: ModelConfig, ids_BxK: jax.Array, id_weights_BxK: jax.Array | None
) -> Iterator[tuple[Stack, jax.Array, jax.Array | None]]:
    """(stack, row numbers of the slots that read it, what each slot's row is multiplied with) of every stack.

    The last is None where bags are bare sums. Empty slots have negative row numbers.
    """
    scale_BxK = None if _sums_plainly(config, id_weights_BxK) else slot_scale(config, ids_BxK, id_weights_BxK)
    for stack in make_stacks(config):
        yield stack, _row_ids(stack, ids_BxK), None if scale_BxK is None else scale_BxK[:, stack.slots]


def _sums_plainly(config: ModelConfig, id_weights_BxK: jax.Array | None) -> bool:
    """Whether a bag is the bare sum of its rows."""
    means = any(feature.pooling == "mean" and feature.hotness > 1 for feature in config.features)
    return id_weights_BxK is None and not config.learned_pooling and not means


def _groups(stack: Stack) -> Iterator[tuple[np.ndarray, list[int]]]:
    """(slots as (G, h) positions in the stack's slots, features) of the stack's features of one hotness h."""
    starts = np.cumsum((0, *stack.hotness))
    for h in sorted(set(stack.hotness)):
        members = [i for i, hotness in enumerate(stack.hotness) if hotness == h]
        yield starts[members][:, None] + np.arange(h), [stack.features[i] for i in members]


def row_gradients(
    config: ModelConfig,
    tables: dict[str, jax.Array],
    ids_BxK: jax.Array,
    id_weights_BxK: jax.Array | None,
    d_pooled_BxFxD: jax.Array,
) -> dict[str, SparseGrad]:
    """The gradient of `lookup` in the tables, one row an id slot: what the sparse optimizer sees, keyed as `tables`."""
    grads = {}
    scale_BxK = slot_scale(config, ids_BxK, id_weights_BxK)
    for stack in make_stacks(config):
        row_ids = _row_ids(stack, ids_BxK)
        plain_scale = scale_BxK[:, stack.slots]
        scale = _learned_scale(config, stack, tables, row_ids, plain_scale)
        d_slots = d_pooled_BxFxD[:, np.repeat(stack.features, stack.hotness)]
        d_rows = d_slots * scale[:, :, None]
        grads[stack.name] = SparseGrad(ids_M=row_ids.reshape(-1), rows_MxD=d_rows.reshape(-1, config.embedding_dim))
        if config.learned_pooling:
            rows = read_rows(tables[stack.name], row_ids)
            d_weights = (d_slots * rows).sum(axis=2) * plain_scale
            grads[stack.name + POOLING_WEIGHTS] = SparseGrad(row_ids.reshape(-1), d_weights.reshape(-1, 1))
    return grads


def bag_gradients(
    config: ModelConfig, ids_BxK: jax.Array, id_weights_BxK: jax.Array | None, d_pooled_BxFxD: jax.Array
) -> dict[str, tuple[BagGrad, ...]]:
    """`row_gradients` by bags, of features of one hotness each. Not where pooling weights are learned."""
    grads = {}
    for stack, row_ids, scale in stack_slots(config, ids_BxK, id_weights_BxK):
        bags = []
        for group, members in _groups(stack):
            by_slot = group.T[:, None]  # (h, 1, G), to have slots first and bags of all examples next to each other.
            rows = np.arange(ids_BxK.shape[0])[None, :, None]
            bags.append(
                BagGrad(
                    ids_hxN=row_ids[rows, by_slot].reshape(group.shape[1], -1),
                    scale_hxN=None if scale is None else scale[rows, by_slot].reshape(group.shape[1], -1),
                    d_bags_NxD=d_pooled_BxFxD[:, np.array(members)].reshape(-1, config.embedding_dim),
                )
            )
        grads[stack.name] = tuple(bags)
    return grads


def _row_ids(stack: Stack, ids_BxK: jax.Array) -> jax.Array:
    """Row numbers in the stack of the slots that read it; empty slots stay negative."""
    ids = ids_BxK[:, stack.slots]
    return jnp.where(ids < 0, ids, ids + stack.slot_first_rows[None])


def slot_scale(config: ModelConfig, ids_BxK: jax.Array, id_weights_BxK: jax.Array | None) -> jax.Array:
    """What each slot's row is multiplied with before summing: 0 if empty, 1/count for mean pooling, the id's weight."""
    filled_BxK = (ids_BxK >= 0).astype(jnp.float32)
    scale_BxK = filled_BxK if id_weights_BxK is None else filled_BxK * id_weights_BxK
    if any(feature.pooling == "mean" for feature in config.features):
        hotness = [feature.hotness for feature in config.features]
        count_BxF = jnp.maximum(sum_bags(filled_BxK[:, :, None], tuple(hotness))[:, :, 0], 1)
        mean_K = np.repeat([feature.pooling == "mean" for feature in config.features], hotness)
        count_BxK = count_BxF[:, np.repeat(np.arange(len(hotness)), hotness)]
        scale_BxK = jnp.where(mean_K[None], scale_BxK / count_BxK, scale_BxK)
    return scale_BxK


def _learned_scale(
    config: ModelConfig, stack: Stack, tables: dict[str, jax.Array], row_ids: jax.Array, scale: jax.Array
) -> jax.Array:
    """`scale` times the trained weight of each slot's row, where pooling weights are learned."""
    if not config.learned_pooling:
        return scale
    weights = tables[stack.name + POOLING_WEIGHTS].at[jnp.maximum(row_ids, 0), 0].get(mode="promise_in_bounds")
    return scale * weights


def sum_bags(slots_BxKxD: jax.Array, hotness: tuple[int, ...]) -> jax.Array:
    """(B, F, D): sums over each feature's consecutive slots."""
    if len(set(hotness)) == 1:
        batch, _, width = slots_BxKxD.shape
        return slots_BxKxD.reshape(batch, len(hotness), hotness[0], width).sum(axis=2)
    starts = np.cumsum((0, *hotness))
    bags = [slots_BxKxD[:, start:stop].sum(axis=1) for start, stop in itertools.pairwise(starts)]
    return jnp.stack(bags, axis=1)


def named_tables(config: ModelConfig, tables: dict[str, jax.Array]) -> Iterator[tuple[str, jax.Array]]:
    """(table name, its (rows, D) part) for every table; pooling weights as `<table name>/pooling_weights`."""
    for stack in make_stacks(config):
        for table, first_row in zip(stack.tables, stack.first_rows, strict=True):
            rows = slice(first_row, first_row + table.num_embeddings)
            yield table.name, tables[stack.name][rows]
            if config.learned_pooling:
                yield table.name + POOLING_WEIGHTS, tables[stack.name + POOLING_WEIGHTS][rows]


def stack_tables(config: ModelConfig, named: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The inverse of `named_tables`: arrays by table name to the stored form."""
    suffixes = ("", POOLING_WEIGHTS) if config.learned_pooling else ("",)
    return {
        stack.name + suffix: jnp.concatenate([jnp.asarray(named[table.name + suffix]) for table in stack.tables])
        for stack in make_stacks(config)
        for suffix in suffixes
    }
