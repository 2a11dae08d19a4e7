"""How a plan's tables are stored: which stack, which rows, which columns, on which shard. Only shapes; no arrays.

Only stacks (forms/base.py) know row offsets; everybody else speaks of table names. One device is a mesh of one shard.
Shards hold equally many rows, a number with divisors; what is over is padding that nobody reads.
"""

import functools

import numpy as np

from dlrm_jax.config import ModelConfig, TableConfig
from dlrm_jax.host.mesh import MeshShape
from dlrm_jax.tables.dtypes import table_dtype
from dlrm_jax.tables.forms import FORMS, Form, form_of
from dlrm_jax.tables.forms.base import ALL, Stack
from dlrm_jax.tables.plan import DATA_PARALLEL, Placement, Plan, make_plan
from dlrm_jax.tables.rows import pack_for

MAX_STACK_ROWS = 2**31 - 1
"""Row numbers are int32; more rows start another stack."""


def place_stacks(
    model: ModelConfig, plan: Plan, packed: bool = False, max_rows: int = MAX_STACK_ROWS, divisible: bool = True
) -> tuple[Stack, ...]:
    """The stacks of a plan, by form and in config order; a new one where `max_rows`, all shards', would be exceeded.

    Without `divisible` (see `divisible_rows`) no row is padding but those that make shards equal.
    """
    stacks = []
    forms = {table.name: form_of(plan.tables[table.name].sharding) for table in model.tables}
    for arrays in dict.fromkeys(form.arrays for form in FORMS.all().values()):
        tables = [table for table in model.tables if forms[table.name].arrays == arrays]
        # Tables on every shard first: those of a group of shards then begin at one row on all of them.
        tables.sort(key=lambda table: forms[table.name].span != ALL)
        groups = []
        for kind in dict.fromkeys(table.kind for table in tables):
            of_kind = [table for table in tables if table.kind == kind]
            groups += _groups(of_kind, plan, forms[of_kind[0].name], max_rows)
        for i, group in enumerate(groups):
            stacks.append(_place(model, plan, f"{arrays}_{i}", forms[group[0].name], group, packed, divisible))
    return tuple(stacks)


@functools.lru_cache(maxsize=16)
def local_stacks(model: ModelConfig, divisible: bool = True) -> tuple[Stack, ...]:
    """The stacks of one device."""
    return place_stacks(model, make_plan(model, MeshShape(1, 1), DATA_PARALLEL), divisible=divisible)


def _groups(tables: list[TableConfig], plan: Plan, form: Form, max_rows: int) -> list[list[TableConfig]]:
    """Tables in stacks of at most `max_rows` rows, so that a row's number, of all shards, is an int32."""
    groups: list[list[TableConfig]] = []
    used = np.zeros(plan.mesh.model, np.int64)
    for table in tables:
        _append(used, table, plan.tables[table.name], form)
        total = divisible_rows(int(used.max())) * (plan.mesh.model if form.splits_rows else 1)
        if not groups or total > max_rows:
            groups.append([])
            used[:] = 0
            _append(used, table, plan.tables[table.name], form)
        groups[-1].append(table)
    return groups


def _append(used: np.ndarray, table: TableConfig, placement: Placement, form: Form) -> int:
    """Where a table begins on its shards below what is `used` of them, which becomes what is used then."""
    first, count = (placement.first, placement.count) if form.splits_rows else (0, len(used))
    offset = int(used[first : first + count].max())
    used[first : first + count] = offset + -(-table.num_embeddings // (count if form.splits_rows else 1))
    return offset


def divisible_rows(rows: int, pack: int = 1) -> int:
    """At least `rows`, in whole lines and at most a thousandth more, with a large power of two as a factor.

    Orbax stores an array in equal pieces, so that one of a prime number of rows would become a piece a row.
    """
    multiple = pack << max(rows // (1024 * pack), 1).bit_length() - 1
    return -(-rows // multiple) * multiple


def _place(
    model: ModelConfig, plan: Plan, name: str, form: Form, tables: list[TableConfig], packed: bool, divisible: bool
) -> Stack:
    placements = [plan.tables[table.name] for table in tables]
    used = np.zeros(plan.mesh.model, np.int64)
    offsets = [_append(used, table, placement, form) for table, placement in zip(tables, placements, strict=True)]
    table_dtype(tables[0].dtype)  # ConfigError for one that there is not.
    dim = tables[0].embedding_dim
    width = -(-dim // plan.mesh.model) if form.splits_columns else dim
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
        first_T=tuple(placement.first if form.splits_rows else 0 for placement in placements),
        count_T=tuple(placement.count if form.splits_rows else 1 for placement in placements),
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
