"""How a plan's tables are stored: which array, which rows, which columns, on which shard. Only shapes; no arrays.

Tables of one form and one optimizer are stored one below the other in an array, a stack, so that one gather and one
scatter serve them all. Only stacks know row offsets; everybody else speaks of table names. One device is a mesh of one
shard. Forms:

    replicated   all rows on every device                                  data_parallel
    owned        each table whole on one shard of `model`                  table_wise
    routed       row r on shard first + r mod count, at offset + r // count  row_wise, table_row_wise
    columns      all rows on every shard, `width` of the columns each      column_wise

Shards hold equally many rows, a number with divisors; what is over is padding that nobody reads. Arrays of `owned` and
`routed` are the shards' rows one below the other.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dlrm_jax.config import ModelConfig, Part, TableConfig
from dlrm_jax.host.mesh import MODEL, MeshShape
from dlrm_jax.tables.id_maps import row_numbers
from dlrm_jax.tables.plan import (
    COLUMN_WISE,
    DATA_PARALLEL,
    ROW_WISE,
    TABLE_ROW_WISE,
    TABLE_WISE,
    Placement,
    Plan,
    make_plan,
)
from dlrm_jax.tables.rows import LANES, pack_for

MAX_STACK_ROWS = 2**31 - 1
"""Row numbers are int32; more rows start another stack."""

POOLING_WEIGHTS = "/pooling_weights"
"""Suffix of the (rows, 1) array beside each stack when pooling weights are learned."""

REPLICATED, OWNED, ROUTED, COLUMNS = "stack", "owned", "routed", "columns"
FORMS = {
    DATA_PARALLEL: REPLICATED,
    TABLE_WISE: OWNED,
    ROW_WISE: ROUTED,
    TABLE_ROW_WISE: ROUTED,
    COLUMN_WISE: COLUMNS,
}


@dataclasses.dataclass(frozen=True)
class Stack:
    """Tables of one form, and of one dim, optimizer and learning rate, in one array.

    `rows` are those of one shard, `width` the columns that one device holds of `dim`, `pack` rows share a line
    (rows.py). `num_shards` and `num_copies` are the mesh's. `first_T`, `count_T`: each table's shards; `offset_T`: its
    first row on each of them. `features` are the lookups that read the stack (ModelConfig.lookups), by number; `slots`
    the columns of ids_BxK that these take their ids from, `table_K` the table that each of them reads.
    """

    name: str
    form: str
    tables: tuple[TableConfig, ...]
    first_T: tuple[int, ...]
    count_T: tuple[int, ...]
    offset_T: tuple[int, ...]
    num_shards: int
    num_copies: int
    rows: int
    width: int
    dim: int
    pack: int
    features: tuple[int, ...]
    parts: tuple[Part, ...]
    hotness: tuple[int, ...]
    slots: np.ndarray
    table_K: np.ndarray

    def row_numbers(self, ids_BxK: Any) -> Any:
        """(B, slots of the stack): which row of its table each id means, by NumPy or JAX; empty slots are negative."""
        ids = ids_BxK[:, self.slots]
        if all(part.id_map == "same" for part in self.parts):
            return ids
        starts = np.cumsum([0, *self.hotness])
        columns = [
            row_numbers(part, self.tables[self.table_K[start]].num_embeddings, ids[:, start:stop])
            for part, start, stop in zip(self.parts, starts, starts[1:], strict=False)
        ]
        return (np if isinstance(ids, np.ndarray) else jnp).concatenate(columns, axis=1)

    @property
    def dtype(self) -> str:
        """What the weights are stored as; slots of optimizers have their own."""
        return self.tables[0].dtype

    def owners(self, rows_M: jax.Array, shard: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(which of the stack's tables each local row of a shard belongs to, its number in that table).

        A row of padding has a number outside of its table.
        """
        places = [tables_on_shard(self, s) for s in range(self.num_shards)]
        most, none = max(map(len, places)), 2**31 - 1
        starts = [[self.offset_T[t] for t in tables] + [none] * (most - len(tables)) for tables in places]
        numbers = [tables + [0] * (most - len(tables)) for tables in places]
        start_X = jnp.asarray(np.array(starts, np.int32))[shard]
        place_M = jnp.maximum(jnp.searchsorted(start_X, rows_M, side="right") - 1, 0)
        table_M = jnp.asarray(np.array(numbers, np.int32))[shard][place_M]
        first_M, count_M = (jnp.asarray(np.array(of_T, np.int32))[table_M] for of_T in (self.first_T, self.count_T))
        residue_M = shard - first_M if self.form in (OWNED, ROUTED) else jnp.zeros_like(table_M)
        return table_M, (rows_M - start_X[place_M]) * count_M + residue_M

    @property
    def layout(self) -> tuple[Any, ...]:
        """What decides where each number lies: arrays of equal layouts are the same arrays, on any mesh."""
        shards = self.num_shards if self.form != REPLICATED else 1
        return (
            self.name,
            self.tables,
            self.first_T,
            self.count_T,
            self.offset_T,
            shards,
            self.rows,
            self.width,
            self.pack,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """The global array's."""
        lines, lanes = self.local_shape
        if self.form in (OWNED, ROUTED):
            return self.num_shards * lines, lanes
        return (lines, self.num_shards * lanes) if self.form == COLUMNS else (lines, lanes)

    @property
    def local_shape(self) -> tuple[int, int]:
        """One device's part of it."""
        return self.rows // self.pack, self.pack * self.width

    @property
    def spec(self) -> PartitionSpec:
        """How the array is split."""
        if self.form in (OWNED, ROUTED):
            return PartitionSpec(MODEL)
        return PartitionSpec(None, MODEL) if self.form == COLUMNS else PartitionSpec()

    @property
    def row_spec(self) -> PartitionSpec:
        """How an array is split that holds one number a row: as `spec`, but columns share theirs."""
        return PartitionSpec(MODEL) if self.form in (OWNED, ROUTED) else PartitionSpec()

    def row_shape(self) -> tuple[int, int]:
        """Shape of an array that holds one number a row, stored as the rows are."""
        rows = self.rows if self.pack == 1 else -(-self.rows // LANES) * LANES
        local = (rows, 1) if self.pack == 1 else (rows // LANES, LANES)
        return (self.num_shards * local[0], local[1]) if self.form in (OWNED, ROUTED) else local


def place_stacks(
    model: ModelConfig, plan: Plan, packed: bool = False, max_rows: int = MAX_STACK_ROWS, divisible: bool = True
) -> tuple[Stack, ...]:
    """The stacks of a plan, by form and in config order; a new one where `max_rows`, all shards', would be exceeded.

    Without `divisible` (see `divisible_rows`) no row is padding but those that make shards equal.
    """
    stacks = []
    for form in dict.fromkeys(FORMS.values()):
        tables = [table for table in model.tables if FORMS[plan.tables[table.name].sharding] == form]
        # Tables on every shard first: those of a group of shards then begin at one row on all of them.
        tables.sort(key=lambda table: plan.tables[table.name].sharding == TABLE_ROW_WISE)
        groups = []
        for kind in dict.fromkeys(table.kind for table in tables):
            groups += _groups([table for table in tables if table.kind == kind], plan, form, max_rows)
        for i, group in enumerate(groups):
            stacks.append(_place(model, plan, f"{form}_{i}", form, group, packed, divisible))
    return tuple(stacks)


@functools.lru_cache(maxsize=16)
def local_stacks(model: ModelConfig, divisible: bool = True) -> tuple[Stack, ...]:
    """The stacks of one device."""
    return place_stacks(model, make_plan(model, MeshShape(1, 1), DATA_PARALLEL), divisible=divisible)


def _groups(tables: list[TableConfig], plan: Plan, form: str, max_rows: int) -> list[list[TableConfig]]:
    """Tables in stacks of at most `max_rows` rows, so that a row's number, of all shards, is an int32."""
    groups: list[list[TableConfig]] = []
    used = np.zeros(plan.mesh.model, np.int64)
    for table in tables:
        placement = plan.tables[table.name]
        after = used.copy()
        after[_shards(placement, form)] += _rows_a_shard(table, placement, form)
        total = divisible_rows(int(after.max())) * (plan.mesh.model if form in (OWNED, ROUTED) else 1)
        if not groups or total > max_rows:
            groups.append([])
            after = np.zeros_like(used)
            after[_shards(placement, form)] += _rows_a_shard(table, placement, form)
        groups[-1].append(table)
        used = after
    return groups


def divisible_rows(rows: int, pack: int = 1) -> int:
    """At least `rows`, in whole lines and at most a thousandth more, with a large power of two as a factor.

    Orbax stores an array in equal pieces, so that one of a prime number of rows would become a piece a row.
    """
    multiple = pack << max(rows // (1024 * pack), 1).bit_length() - 1
    return -(-rows // multiple) * multiple


def _shards(placement: Placement, form: str) -> slice:
    if form in (OWNED, ROUTED):
        return slice(placement.first, placement.first + placement.count)
    return slice(None)


def _rows_a_shard(table: TableConfig, placement: Placement, form: str) -> int:
    return -(-table.num_embeddings // placement.count) if form in (OWNED, ROUTED) else table.num_embeddings


def _place(
    model: ModelConfig, plan: Plan, name: str, form: str, tables: list[TableConfig], packed: bool, divisible: bool
) -> Stack:
    placements = [plan.tables[table.name] for table in tables]
    used, offsets = np.zeros(plan.mesh.model, np.int64), []
    for table, placement in zip(tables, placements, strict=True):
        shards = _shards(placement, form)
        offsets.append(int(used[shards].max()))
        used[shards] = offsets[-1] + _rows_a_shard(table, placement, form)
    dim = tables[0].embedding_dim
    width = -(-dim // plan.mesh.model) if form == COLUMNS else dim
    pack = pack_for(width, packed)
    rows = int(used.max())
    number_of = {table.name: i for i, table in enumerate(tables)}
    starts = np.cumsum([0, *(feature.hotness for feature in model.features)])
    read_by = [i for i, lookup in enumerate(model.lookups) if lookup.part.table in number_of]
    lookups = [model.lookups[i] for i in read_by]
    hotness = tuple(lookup.hotness for lookup in lookups)
    return Stack(
        name=name,
        form=form,
        tables=tuple(tables),
        first_T=tuple(placement.first if form in (OWNED, ROUTED) else 0 for placement in placements),
        count_T=tuple(placement.count if form in (OWNED, ROUTED) else 1 for placement in placements),
        offset_T=tuple(offsets),
        num_shards=plan.mesh.model,
        num_copies=plan.mesh.data,
        rows=divisible_rows(rows, pack) if divisible else -(-rows // pack) * pack,
        width=width,
        dim=dim,
        pack=pack,
        features=tuple(read_by),
        parts=tuple(lookup.part for lookup in lookups),
        hotness=hotness,
        slots=np.concatenate([np.arange(starts[one.feature], starts[one.feature + 1]) for one in lookups]),
        table_K=np.repeat([number_of[one.part.table] for one in lookups], hotness),
    )


def tables_on_shard(stack: Stack, shard: int) -> list[int]:
    """Numbers of the stack's tables that shard `shard` holds rows of, in the order of their rows."""
    if stack.form not in (OWNED, ROUTED):
        return list(range(len(stack.tables)))
    return [t for t in range(len(stack.tables)) if 0 <= shard - stack.first_T[t] < stack.count_T[t]]
