"""What a sharding type is, and the stacks that its tables lie in.

A form says how tables of a sharding type lie on the shards of the mesh's axis `model`, which shards a plan may choose
for them, what a step sends, and what that holds. Everything else asks the form and knows none by its name. A stack is
an array of tables one below the other, so that one gather and one scatter serve them all.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dlrm_jax.config import Part, TableConfig
from dlrm_jax.host.mesh import MODEL
from dlrm_jax.host.registry import Registry
from dlrm_jax.tables.collective import ExchangeOptions
from dlrm_jax.tables.dtypes import TableDtype, table_dtype
from dlrm_jax.tables.id_maps import row_numbers
from dlrm_jax.tables.pooling import POOLING_WEIGHTS, Take
from dlrm_jax.tables.rows import LANES
from dlrm_jax.tables.rules import WEIGHT, Arrays, Rule
from dlrm_jax.tables.updates import Update

ALL, GROUP, ONE = "all", "group", "one"

States = dict[str, Arrays]
Sent = list[tuple[str, int, int]]
"""(kind of the collective, devices that take part, bytes of its result on one device) each."""


@dataclasses.dataclass(frozen=True)
class Form(abc.ABC):
    """How tables of a sharding type lie, travel and are updated. On one device all forms are one without collectives.

    arrays: what its stacks are called. Types of equal `arrays` share them, so they may differ in `span` and `choices`.
    splits_rows: row r lies on shard first + r mod count, at offset + r // count. Else every shard has all rows.
    splits_columns: every shard has `width` of the columns of all rows.
    span: the shards of a table: ALL, ONE, or a GROUP of neighbours.
    in_rounds: rows travel, not pooled vectors, in buffers of a planned size (ExchangeOptions.capacity) and in rounds.
    why: what a plan spares by it, in a few words.
    updates_early: its update may begin before the bottom MLP's gradients are through.
    """

    arrays: ClassVar[str]
    splits_rows: ClassVar[bool] = False
    splits_columns: ClassVar[bool] = False
    span: ClassVar[str] = ALL
    in_rounds: ClassVar[bool] = False
    why: ClassVar[str] = ""
    updates_early: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        own = {"route", "lookup", "update", "splits_rows", "splits_columns"} & vars(cls).keys()
        if own and "arrays" not in vars(cls):
            raise TypeError(f"{cls.__name__} has its own {min(own)}; give it `arrays`, a name for stacks of its own")

    @property
    def replicated(self) -> bool:
        """Whether every device has all of a table."""
        return not (self.splits_rows or self.splits_columns)

    def choices(self, table: TableConfig, num_shards: int, group_size: int) -> list[tuple[int, int]]:
        """(first shard, how many) that may hold a table; a plan takes the one that carries least."""
        del table
        count = {ALL: num_shards, GROUP: group_size, ONE: 1}[self.span]
        return [(first, count) for first in range(0, num_shards, count)]

    @abc.abstractmethod
    def route(self, here: "Here", ids_bxk: jax.Array, scale_bxk: jax.Array | None) -> Arrays:
        """Who needs which rows, by row numbers of the stack's tables; `scale_bxk` is what slots are multiplied with."""

    @abc.abstractmethod
    def lookup(self, here: "Here", routes: Arrays) -> tuple[jax.Array, Arrays]:
        """(pooled_bxfxD, the routes with what the way back needs)."""

    @abc.abstractmethod
    def update(self, here: "Learning", routes: Arrays, d_pooled_bxfxD: jax.Array) -> tuple[Arrays, States]:
        """The stack's arrays and slots after the gradient of its pooled vectors."""

    @abc.abstractmethod
    def sent(self, stack: "Stack", batch: int, columns: int, scales: bool, options: ExchangeOptions) -> Sent:
        """A step's collectives, for `batch` examples of each device and `columns` a row, with a learned weight's."""

    def looked_up(self, stack: "Stack", batch: int) -> int:
        """Rows that the busiest device reads for a global batch, repeated ids each time: here for its own examples."""
        return -(-batch // stack.num_devices) * len(stack.slots)

    def received(self, stack: "Stack", batch: int, options: ExchangeOptions) -> int:
        """Rows, or their gradients, that a device takes in of all others at once, each of `batch` examples."""
        del stack, batch, options
        return 0

    @abc.abstractmethod
    def memory(self, work: "Work") -> tuple[int, int]:
        """Floats of a stack: (throughout the dense model's passes, at most where it is looked up or updated)."""


FORMS: Registry[type[Form]] = Registry(
    "sharding",
    "dlrm_jax.sharding_types",
    lambda kind: isinstance(kind, type) and issubclass(kind, Form),
    "class of Form",
)
"""Forms by the names of sharding types."""
register = FORMS.register


def form_of(sharding: str) -> Form:
    """The form of a sharding type; ConfigError naming what there is."""
    return FORMS.get(sharding)()


@dataclasses.dataclass(frozen=True)
class Stack:
    """Tables of one form, and of one dim, dtype, optimizer and learning rate, in one array.

    `rows` are those of one shard, `width` the columns that one device holds of `dim`, `pack` rows share a line
    (rows.py). `num_shards` and `num_copies` are the mesh's. `first_T`, `count_T`: each table's shards, 0 and 1 where
    rows are not split; `offset_T`: its first row on each of them. `features` are the lookups that read the stack
    (ModelConfig.lookups), by number; `slots` the columns of ids_BxK that these take their ids from, `table_K` the table
    that each of them reads.
    """

    name: str
    form: Form
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
    def dtype(self) -> TableDtype:
        """What the weights are stored as; slots of optimizers have their own."""
        return table_dtype(self.tables[0].dtype)

    @property
    def num_devices(self) -> int:
        """Of the mesh."""
        return self.num_shards * self.num_copies

    @property
    def offset_k(self) -> np.ndarray:
        """The first row of each slot's table on its shards."""
        return np.array(self.offset_T, np.int32)[self.table_K]

    def tables_on(self, shard: int) -> list[int]:
        """Numbers of the tables that a shard has rows of, in the order of their rows."""
        numbers = range(len(self.tables))
        return [t for t in numbers if not self.form.splits_rows or 0 <= shard - self.first_T[t] < self.count_T[t]]

    def owners(self, rows_M: jax.Array, shard: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(which of the stack's tables each local row of a shard belongs to, its number in that table).

        A row of padding has a number outside of its table.
        """
        places = [self.tables_on(s) for s in range(self.num_shards)]
        most, none = max(map(len, places)), 2**31 - 1
        starts = [[self.offset_T[t] for t in tables] + [none] * (most - len(tables)) for tables in places]
        numbers = [tables + [0] * (most - len(tables)) for tables in places]
        start_X = jnp.asarray(np.array(starts, np.int32))[shard]
        place_M = jnp.maximum(jnp.searchsorted(start_X, rows_M, side="right") - 1, 0)
        table_M = jnp.asarray(np.array(numbers, np.int32))[shard][place_M]
        first_M, count_M = (jnp.asarray(np.array(of_T, np.int32))[table_M] for of_T in (self.first_T, self.count_T))
        residue_M = shard - first_M if self.form.splits_rows else jnp.zeros_like(table_M)
        return table_M, (rows_M - start_X[place_M]) * count_M + residue_M

    def columns(self, shard: jax.Array) -> jax.Array:
        """(width,): which of its rows' columns a shard has; from `dim` on they are padding."""
        first = shard * self.width if self.form.splits_columns else 0
        return first + jnp.arange(self.width, dtype=jnp.int32)

    @property
    def layout(self) -> tuple[Any, ...]:
        """What decides where each number lies: arrays of equal layouts are the same arrays, on any mesh."""
        shards = 1 if self.form.replicated else self.num_shards
        places = self.first_T, self.count_T, self.offset_T
        return self.name, self.tables, *places, shards, self.rows, self.width, self.pack

    @property
    def row_shards(self) -> int:
        """How many parts of different rows the array has."""
        return self.num_shards if self.form.splits_rows else 1

    @property
    def column_shards(self) -> int:
        """How many parts of different columns the array has."""
        return self.num_shards if self.form.splits_columns else 1

    @property
    def shape(self) -> tuple[int, int]:
        """The global array's: shards' rows one below the other, columns side by side."""
        lines, lanes = self.local_shape
        return self.row_shards * lines, self.column_shards * lanes

    @property
    def local_shape(self) -> tuple[int, int]:
        """One device's part of it."""
        return self.rows // self.pack, self.pack * self.width

    @property
    def spec(self) -> PartitionSpec:
        """How the array is split."""
        return PartitionSpec(None, MODEL) if self.form.splits_columns else self.row_spec

    @property
    def row_spec(self) -> PartitionSpec:
        """How an array is split that holds one number a row: as `spec`, but columns share theirs."""
        return PartitionSpec(MODEL) if self.form.splits_rows else PartitionSpec()

    def row_shape(self) -> tuple[int, int]:
        """Shape of an array that holds one number a row, stored as the rows are."""
        lines, lanes = (self.rows, 1) if self.pack == 1 else (-(-self.rows // LANES), LANES)
        return self.row_shards * lines, lanes


Pool = Callable[[Stack, jax.Array, jax.Array, jax.Array | None], jax.Array]
"""(stack, its array, ids_BxGxh, scale_BxGxh or None) -> sums of bags (B, G, D): pooling.pool by a kernel."""


@dataclasses.dataclass(frozen=True)
class Here:
    """A stack on one device in a step: its own arrays, and how it exchanges.

    `take` reads rows stored otherwise; `pool`, a kernel, sums bags in place of XLA.
    """

    stack: Stack
    options: ExchangeOptions
    tables: Arrays = dataclasses.field(default_factory=dict)
    take: Take | None = None
    pool: Pool | None = None

    @property
    def learns_weights(self) -> bool:
        """Whether the rows have learned pooling weights."""
        return self.stack.name + POOLING_WEIGHTS in self.tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learning(Here):
    """The same where it is updated: its slots by array, and what becomes of its rows and learned weights."""

    states: States
    of_rows: Update
    of_weights: Update


@dataclasses.dataclass(frozen=True)
class Work:
    """What a device has to do with a stack in a step: so many id slots looked up, and rows received of all others.

    `learned`: with learned pooling weights; `in_pieces`: bags of several ids are updated as on CPUs, where no slot's
    gradient is ever written down (bags.update_bags).
    """

    stack: Stack
    rule: Rule
    slots: int
    received: int
    learned: bool
    in_pieces: bool

    @property
    def kept_a_row(self) -> int:
        """Floats that the rule keeps a row by its weights, beside what moves these."""
        return 0 if self.rule.moves_by_slot else self.stack.width * sum(slot.per == WEIGHT for slot in self.rule.slots)
