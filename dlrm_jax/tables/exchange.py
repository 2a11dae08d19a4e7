"""The tables of a step: route, lookup, update, each stack by its form, on one device or over a mesh.

route(ids)               who needs which rows; no table is read, so it may run a step ahead
lookup(tables, routes)   pooled vectors, where the examples are
update(tables, ...)      gradients of the pooled vectors to the rows' owners, and applied there, in place

On a mesh the three run under jax.shard_map; on one device they are the same code without collectives. So the numbers
are those of one device but for the order of sums: a gradient differs by roundings of the sum of its examples' parts,
whatever the optimizer. What becomes of a weight depends on it. SGD and momentum move it by the rate times the gradient.
Others (Adagrad, Adam and their kin) divide by the gradient's size, so that one which is 0 but for rounding may move its
weight by the rate, either way. docs/DEVICES.md says how close that is; tests/training/numbers_test.py holds gradients
and weights to it, and, in float64, everything to a plain dense model.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dlrm_jax.config import ModelConfig, OptimizerConfig
from dlrm_jax.config.learning import ALL_ROWS
from dlrm_jax.host.mesh import BATCH_SPEC, DATA, MODEL
from dlrm_jax.tables.collective import ExchangeOptions, sum_over_shards
from dlrm_jax.tables.forms.bags import slot_scale
from dlrm_jax.tables.forms.base import Here, Learning, Pool, Stack
from dlrm_jax.tables.forms.whole import update_whole, whole_gradient
from dlrm_jax.tables.layout import local_stacks
from dlrm_jax.tables.named_rules import make_rule
from dlrm_jax.tables.noise import noise_of
from dlrm_jax.tables.pooling import POOLING_WEIGHTS, Take
from dlrm_jax.tables.rules import ROW, Rule, Slot
from dlrm_jax.tables.updates import NOT_FINITE, SUM, Segments, Stored, Update, squares

Arrays = dict[str, Any]

OVERFLOWS = "exchange_overflows"
"""Counter of `update`: stacks whose rows did not fit one round of the exchange."""


Pooled = jax.Array | tuple[jax.Array, ...]
"""Pooled vectors of all lookups, (B, F, D); where tables have several dims, one array for each of ModelConfig.dims."""

TakeOf = Callable[[int], Take]
"""What reads the rows of a dim as float32 from however they are stored."""


def _on_one_device(function: Callable[[Any, Any], tuple[Any, Any]], shared: Any, columns: Any) -> tuple[Any, Any]:
    return function(shared, columns)


class TableOps(NamedTuple):
    """Three pure functions of global arrays, and how the devices that they lie on share a batch.

    route: (ids_BxK, id_weights_BxK or None) -> routes. Reads no table.
    lookup: (tables, routes) -> (pooled, routes), the routes with what the way back needs.
    update: (tables, states, routes, d_pooled, learning_rate, count[, factor]) -> (tables, states, counters). `count`
      is the number of the update, from 1 on; gradients are multiplied with `factor` first. NOT_FINITE is among the
      counters where kernels have looked at the gradients of all rows; those of empty bags move no row, and count not.
    squares: (tables, routes, d_pooled) -> the squares of all rows' gradients, repeats of a row merged, added up.
    on_each: (function, shared, columns) -> function(shared, columns) = (sums, columns) of each device's own examples,
      the sums added over the devices, once.
    """

    route: Callable[[jax.Array, jax.Array | None], Arrays]
    lookup: Callable[[Arrays, Arrays], tuple[Pooled, Arrays]]
    update: Callable[..., tuple[Arrays, Arrays, Arrays]]
    squares: Callable[[Arrays, Arrays, Pooled], jax.Array]
    on_each: Callable[[Callable[[Any, Any], tuple[Any, Any]], Any, Any], tuple[Any, Any]] = _on_one_device


def pooled_shapes(model: ModelConfig, batch_size: int) -> Any:
    """Shapes of what `lookup` gives for a batch."""
    counts = dict.fromkeys(model.dims, 0)
    for lookup in model.lookups:
        counts[model.table(lookup.part.table).embedding_dim] += 1
    pooled = tuple(jax.ShapeDtypeStruct((batch_size, count, dim), "float32") for dim, count in counts.items())
    return pooled[0] if len(pooled) == 1 else pooled


def local_ops(model: ModelConfig, optimizer: OptimizerConfig | None = None, take: TakeOf | None = None) -> TableOps:
    """All tables on one device. `optimizer` is what `update` needs, `take` reads rows of other types than float32."""
    return _Parts(model, optimizer, local_stacks(model), ExchangeOptions(), take).ops()


class Fused(NamedTuple):
    """Kernels in place of XLA's, for arrays whose rows are whole and do not share lines; None: XLA's."""

    pool: Pool | None = None
    segments: Segments | None = None


NOT_FUSED = Fused()


def placed_ops(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    stacks: tuple[Stack, ...],
    mesh: Mesh,
    options: ExchangeOptions,
    fused: Fused = NOT_FUSED,
) -> TableOps:
    """The same for arrays split over a mesh as `stacks` say."""
    parts = _Parts(model, optimizer, stacks, options, fused=fused)
    if mesh.size == 1:
        return parts.ops()
    table_specs, state_specs = array_specs(model, stacks), slot_specs(optimizer, model, stacks)

    def over_mesh(function: Any, in_specs: Any, out_specs: Any) -> Any:
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def route(ids_BxK: jax.Array, id_weights_BxK: jax.Array | None) -> Arrays:
        return over_mesh(parts.route, (BATCH_SPEC, BATCH_SPEC), BATCH_SPEC)(ids_BxK, id_weights_BxK)

    def lookup(tables: Arrays, routes: Arrays) -> tuple[Pooled, Arrays]:
        return over_mesh(parts.lookup, (table_specs, BATCH_SPEC), BATCH_SPEC)(tables, routes)

    def update(tables: Arrays, states: Arrays, routes: Arrays, *rest: Any) -> tuple[Arrays, Arrays, Arrays]:
        def own(*args: Any) -> tuple[Arrays, Arrays, Arrays]:
            tables, states, counters = parts.update(*args)
            return tables, states, jax.lax.psum(counters, (DATA, MODEL))

        in_specs = (table_specs, state_specs, BATCH_SPEC, BATCH_SPEC, *[PartitionSpec()] * (len(rest) - 1))
        update = over_mesh(own, in_specs, (table_specs, state_specs, PartitionSpec()))
        tables, states, counters = update(tables, states, routes, *rest)
        if more := [routes[stack.name]["more"] for stack in stacks if stack.form.in_rounds]:
            counters[OVERFLOWS] = sum(jnp.max(x) for x in more)
        return tables, states, counters

    def squares(tables: Arrays, routes: Arrays, d_pooled: Pooled) -> jax.Array:
        in_specs = (table_specs, BATCH_SPEC, BATCH_SPEC)
        return over_mesh(parts.squares, in_specs, PartitionSpec())(tables, routes, d_pooled)

    def on_each(function: Callable[[Any, Any], tuple[Any, Any]], shared: Any, columns: Any) -> tuple[Any, Any]:
        def own(shared: Any, columns: Any) -> tuple[Any, Any]:
            sums, columns = function(shared, columns)
            return jax.lax.psum(sums, (DATA, MODEL)), columns

        everywhere = PartitionSpec()
        return over_mesh(own, (everywhere, BATCH_SPEC), (everywhere, BATCH_SPEC))(shared, columns)

    return TableOps(route, lookup, update, squares, on_each)


def array_specs(model: ModelConfig, stacks: tuple[Stack, ...]) -> dict[str, PartitionSpec]:
    """How each array of the tables is split."""
    specs = {}
    for stack in stacks:
        specs[stack.name] = stack.spec
        if model.learned_pooling:
            specs[stack.name + POOLING_WEIGHTS] = stack.row_spec
    return specs


def stack_rule(optimizer: OptimizerConfig, stack: Stack) -> Rule:
    """The rule of a stack's tables: their own, or the run's."""
    return make_rule(optimizer, stack.tables[0].optimizer)


def slot_specs(
    optimizer: OptimizerConfig, model: ModelConfig, stacks: tuple[Stack, ...]
) -> dict[str, dict[str, PartitionSpec]]:
    """How each slot of each array is split: with a number per weight as the table, with one per row as the rows."""
    return {
        name: {key: stack.row_spec if per_row else stack.spec for key, (_, per_row) in slots.items()}
        for stack in stacks
        for name, slots in _slots(optimizer, model, stack).items()
    }


def init_slots(optimizer: OptimizerConfig, model: ModelConfig, stack: Stack) -> dict[str, dict[str, jax.Array]]:
    """A stack's slots at the start, by array."""
    shapes = (stack.shape, stack.row_shape())
    return {
        name: {key: jnp.full(shapes[per_row], slot.first, slot.dtype) for key, (slot, per_row) in slots.items()}
        for name, slots in _slots(optimizer, model, stack).items()
    }


def _slots(optimizer: OptimizerConfig, model: ModelConfig, stack: Stack) -> dict[str, dict[str, tuple[Slot, bool]]]:
    """(slot, whether it has one number a row), by name, of each array of a stack."""
    names = (stack.name, stack.name + POOLING_WEIGHTS)[: 1 + model.learned_pooling]
    slots = stack_rule(optimizer, stack).slots
    return {name: {slot.name: (slot, name != stack.name or slot.per == ROW) for slot in slots} for name in names}


class _Parts:
    """What one device does, inside shard_map on a mesh: lower-case axes are its own."""

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig | None,
        stacks: tuple[Stack, ...],
        options: ExchangeOptions,
        take: TakeOf | None = None,
        fused: Fused = NOT_FUSED,
    ) -> None:
        self._model, self._optimizer, self._stacks = model, optimizer, stacks
        self._options, self._take, self._fused = options, take, fused

    def ops(self) -> TableOps:
        return TableOps(self.route, self.lookup, self.update, self.squares)

    def route(self, ids_bxK: jax.Array, id_weights_bxK: jax.Array | None) -> Arrays:
        scale_bxK = slot_scale(self._model, ids_bxK, id_weights_bxK)
        routes = {}
        for stack in self._stacks:
            scale = None if scale_bxK is None else scale_bxK[:, stack.slots]
            routes[stack.name] = stack.form.route(Here(stack, self._options), stack.row_numbers(ids_bxK), scale)
        return routes

    def lookup(self, tables: Arrays, routes: Arrays) -> tuple[Pooled, Arrays]:
        new_routes = {}
        bags: dict[int, list[jax.Array]] = {dim: [] for dim in self._model.dims}
        for stack in self._stacks:
            take = self._take and self._take(stack.dim)
            here = Here(stack, self._options, arrays_of(stack, tables), take, self._fused_for(stack).pool)
            found, new_routes[stack.name] = stack.form.lookup(here, routes[stack.name])
            bags[stack.dim].append(found)
        pooled = []
        for dim, of_dim in bags.items():
            lookups = [i for stack in self._stacks if stack.dim == dim for i in stack.features]
            whole = jnp.concatenate(of_dim, axis=1)[:, np.argsort(lookups)] if len(of_dim) > 1 else of_dim[0]
            pooled.append(whole)
        return (pooled[0] if len(pooled) == 1 else tuple(pooled)), new_routes

    def update(
        self,
        tables: Arrays,
        states: Arrays,
        routes: Arrays,
        d_pooled: Pooled,
        rate: jax.Array,
        count: jax.Array,
        factor: jax.Array | float = 1.0,
    ) -> tuple[Arrays, Arrays, Arrays]:
        tables, states = dict(tables), dict(states)
        bad: list[jax.Array] = []
        for stack, of_stack in of_stacks(self._model, self._stacks, d_pooled):
            of_rows, of_weights = self._updates(stack, rate, count, factor)
            slots = arrays_of(stack, states)
            if of_rows.segments is not None:
                slots = slots | {stack.name: slots[stack.name] | {NOT_FINITE: jnp.zeros(())}}
            here = Learning(
                stack,
                self._options,
                arrays_of(stack, tables),
                states=slots,
                of_rows=of_rows,
                of_weights=of_weights,
            )
            change = update_whole if self._moves_all else stack.form.update
            new_tables, new_states = change(here, routes[stack.name], of_stack)
            if NOT_FINITE in new_states[stack.name]:
                bad.append(new_states[stack.name].pop(NOT_FINITE))
            tables |= new_tables
            states |= new_states
        # One that XLA updates has not been looked at, and then the step looks at all gradients.
        return tables, states, {NOT_FINITE: sum(bad)} if len(bad) == len(self._stacks) else {}

    def squares(self, tables: Arrays, routes: Arrays, d_pooled: Pooled) -> jax.Array:
        """Sum of the squares of all rows' gradients; what each shard has of its own is added up."""
        own = everywhere = jnp.zeros(())
        for stack, of_stack in of_stacks(self._model, self._stacks, d_pooled):
            l2 = self._optimizer.table_l2 if self._optimizer else 0.0
            arrays = arrays_of(stack, tables)
            here = Learning(
                stack,
                self._options,
                arrays,
                states={name: {SUM: jnp.zeros(())} for name in arrays},
                of_rows=squares(stack.dtype, l2),
                of_weights=squares(),
            )
            if self._moves_all:
                found = here.of_rows.by_all_rows(
                    whole_gradient(here, routes[stack.name], of_stack),
                    Stored(arrays[stack.name], here.states[stack.name]),
                )
                sums = {stack.name: found.slots}
            else:
                _, sums = stack.form.update(here, routes[stack.name], of_stack)
            for name, sum_of in sums.items():
                # Columns that are split have their rows' learned weights on every shard.
                if stack.form.splits_rows or (stack.form.splits_columns and name == stack.name):
                    own += sum_of[SUM]
                else:
                    everywhere += sum_of[SUM]
        return everywhere + sum_over_shards(own, self._stacks[0].num_shards)

    @property
    def _moves_all(self) -> bool:
        return self._optimizer is not None and self._optimizer.table_update == ALL_ROWS

    def _fused_for(self, stack: Stack) -> Fused:
        whole = stack.pack == 1 and not stack.form.splits_columns
        return self._fused if whole else NOT_FUSED

    def _updates(
        self, stack: Stack, rate: jax.Array, count: jax.Array, factor: jax.Array | float
    ) -> tuple[Update, Update]:
        """(of the rows, of learned pooling weights)."""
        if self._optimizer is None:
            raise ValueError("update needs an optimizer")
        rule, own = stack_rule(self._optimizer, stack), stack.tables[0].rate * self._optimizer.table_rate
        weights = Update(rule, rate if own == 1 else rate * own, count, factor=factor)
        rows = dataclasses.replace(weights, dtype=stack.dtype, segments=self._fused_for(stack).segments)
        if not stack.dtype.exact:
            rows = dataclasses.replace(rows, noise=noise_of(stack, count))
        if stack.form.splits_columns:

            def row_mean(rows_MxD: jax.Array) -> jax.Array:
                return sum_over_shards(rows_MxD.sum(axis=1, keepdims=True), stack.num_shards) / stack.dim

            rows = dataclasses.replace(rows, row_mean=row_mean, dim=stack.dim)
        return rows, weights


def of_stacks(model: ModelConfig, stacks: tuple[Stack, ...], d_pooled: Pooled) -> Iterator[tuple[Stack, jax.Array]]:
    """Each stack with the gradient of its pooled vectors."""
    dims = [model.table(lookup.part.table).embedding_dim for lookup in model.lookups]
    gradients = dict(zip(model.dims, d_pooled if isinstance(d_pooled, tuple) else (d_pooled,), strict=True))
    for stack in stacks:
        of_dim = [i for i, dim in enumerate(dims) if dim == stack.dim]
        yield stack, gradients[stack.dim][:, np.searchsorted(of_dim, stack.features)]


def arrays_of(stack: Stack, arrays: Arrays) -> Arrays:
    """Those of a stack, by name."""
    return {name: arrays[name] for name in (stack.name, stack.name + POOLING_WEIGHTS) if name in arrays}
