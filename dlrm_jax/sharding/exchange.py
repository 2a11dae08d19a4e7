"""The tables over a mesh: route, lookup, update under jax.shard_map, each stack by its form.

route(ids)               who needs which rows; no table is read, so it may run a step ahead
lookup(tables, routes)   pooled vectors, where the examples are
update(tables, ...)      gradients of the pooled vectors to the rows' owners, and applied there, in place

The numbers are those of one device (table_ops.local_ops) but for the order of sums: a gradient differs by roundings of
the sum of its examples' parts, whatever the optimizer. What becomes of a weight depends on it. SGD and momentum move it
by the rate times the gradient. Adagrad, row-wise Adagrad and Adam divide by the gradient's size, so that one which is 0
but for rounding may move its weight by the rate, either way. README says how close that is; tests/numbers_test.py holds
gradients and weights to it, and, in float64, everything to a plain dense model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dlrm_jax import sparse_optimizer
from dlrm_jax.config import ModelConfig, OptimizerConfig
from dlrm_jax.embedding import POOLING_WEIGHTS, slot_scale
from dlrm_jax.sharding import columns, owned, replicated, routed
from dlrm_jax.sharding.collective import sum_over_shards
from dlrm_jax.sharding.mesh import BATCH_SPEC, DATA, MODEL
from dlrm_jax.sharding.storage import COLUMNS, ROUTED, PlacedStack
from dlrm_jax.table_ops import TableOps

Arrays = dict[str, Any]

OVERFLOWS = "exchange_overflows"
"""Counter of `update`: stacks whose rows did not fit one round of the exchange."""


@dataclasses.dataclass(frozen=True)
class ExchangeOptions:
    """`dtype` in which vectors travel ("" as they are); rows a device may ask of each peer at once, by stack.

    A stack that `capacity` does not name asks for as many as it has id slots, which is always enough.
    """

    dtype: str = ""
    capacity: Mapping[str, int] = dataclasses.field(default_factory=dict)


def sharded_ops(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    stacks: tuple[PlacedStack, ...],
    mesh: Mesh,
    options: ExchangeOptions | None = None,
) -> TableOps:
    """The same three functions as on one device (table_ops.local_ops), for arrays split as `stacks` say."""
    parts = _Parts(model, optimizer, stacks, options or ExchangeOptions())
    table_specs = array_specs(model, stacks)
    state_specs = opt_state_specs(optimizer, model, stacks)

    def over_mesh(function: Any, in_specs: Any, out_specs: Any) -> Any:
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def route(ids_BxK: jax.Array, id_weights_BxK: jax.Array | None) -> Arrays:
        return over_mesh(parts.route, (BATCH_SPEC, BATCH_SPEC), BATCH_SPEC)(ids_BxK, id_weights_BxK)

    def lookup(tables: Arrays, routes: Arrays) -> tuple[jax.Array, Arrays]:
        return over_mesh(parts.lookup, (table_specs, BATCH_SPEC), BATCH_SPEC)(tables, routes)

    def update(
        tables: Arrays, opt_state: Arrays, routes: Arrays, d_pooled_BxFxD: jax.Array, rate: jax.Array
    ) -> tuple[Arrays, Arrays, Arrays]:
        in_specs = (table_specs, state_specs, BATCH_SPEC, BATCH_SPEC, PartitionSpec())
        tables, opt_state = over_mesh(parts.update, in_specs, (table_specs, state_specs))(
            tables, opt_state, routes, d_pooled_BxFxD, rate
        )
        more = [routes[stack.name]["more"] for stack in stacks if stack.form == ROUTED]
        return tables, opt_state, {OVERFLOWS: sum(jnp.max(x) for x in more)} if more else {}

    def on_each(function: Callable[[Any, Any], tuple[Any, Any]], shared: Any, columns: Any) -> tuple[Any, Any]:
        def own(shared: Any, columns: Any) -> tuple[Any, Any]:
            sums, columns = function(shared, columns)
            return jax.lax.psum(sums, (DATA, MODEL)), columns

        everywhere = PartitionSpec()
        return over_mesh(own, (everywhere, BATCH_SPEC), (everywhere, BATCH_SPEC))(shared, columns)

    return TableOps(route, lookup, update, on_each)


def array_specs(model: ModelConfig, stacks: tuple[PlacedStack, ...]) -> dict[str, PartitionSpec]:
    """How each array of the tables is split."""
    specs = {}
    for stack in stacks:
        specs[stack.name] = stack.spec
        if model.learned_pooling:
            specs[stack.name + POOLING_WEIGHTS] = stack.row_spec
    return specs


def opt_state_specs(
    optimizer: OptimizerConfig, model: ModelConfig, stacks: tuple[PlacedStack, ...]
) -> dict[str, PartitionSpec]:
    """How each array of the optimizer's state is split: row-wise Adagrad's as the rows, Adagrad's as the table."""
    specs = {}
    for stack in stacks:
        specs[stack.name] = stack.row_spec if optimizer.table == "rowwise_adagrad" else stack.spec
        if model.learned_pooling:
            specs[stack.name + POOLING_WEIGHTS] = stack.row_spec
    return specs


class _Parts:
    """What one device does, inside shard_map: lower-case axes are its own."""

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        stacks: tuple[PlacedStack, ...],
        options: ExchangeOptions,
    ) -> None:
        self._model, self._stacks, self._options = model, stacks, options
        self._has_mean = any(feature.pooling == "mean" for feature in model.features)
        self._optimizers = {stack.name: _optimizers(optimizer, stack) for stack in stacks}

    def route(self, ids_bxK: jax.Array, id_weights_bxK: jax.Array | None) -> Arrays:
        scale_bxK = slot_scale(self._model, ids_bxK, id_weights_bxK)
        plain_scale = id_weights_bxK is None and not self._has_mean
        routes = {}
        for stack in self._stacks:
            ids, scale = ids_bxK[:, stack.slots], scale_bxK[:, stack.slots]
            match stack.form:
                case "stack":
                    routes[stack.name] = replicated.route(stack, ids, scale)
                case "owned":
                    routes[stack.name] = owned.route(stack, ids, scale, plain_scale)
                case "routed":
                    routes[stack.name] = routed.route(stack, ids, scale, self._capacity(stack, ids))
                case "columns":
                    routes[stack.name] = columns.route(stack, ids, scale, plain_scale)
        return routes

    def _capacity(self, stack: PlacedStack, slots: jax.Array) -> int:
        return min(self._options.capacity.get(stack.name, slots.size), slots.size)

    def lookup(self, tables: Arrays, routes: Arrays) -> tuple[jax.Array, Arrays]:
        pooled, new_routes = [], {}
        features: list[int] = []
        dtype = self._options.dtype
        for stack in self._stacks:
            mine, route = _of(stack, tables), routes[stack.name]
            match stack.form:
                case "stack":
                    bags, new_routes[stack.name] = replicated.lookup(stack, mine, route)
                case "owned":
                    bags, new_routes[stack.name] = owned.lookup(stack, mine, route, dtype)
                case "routed":
                    capacity = self._capacity(stack, route["rank"])
                    bags, new_routes[stack.name] = routed.lookup(stack, mine, route, capacity, dtype)
                case "columns":
                    bags, new_routes[stack.name] = columns.lookup(stack, mine, route, dtype)
            pooled.append(bags)
            features += stack.features
        whole = pooled[0] if len(pooled) == 1 else jnp.concatenate(pooled, axis=1)[:, np.argsort(features)]
        return whole, new_routes

    def update(
        self, tables: Arrays, opt_state: Arrays, routes: Arrays, d_pooled: jax.Array, rate: jax.Array
    ) -> tuple[Arrays, Arrays]:
        tables, opt_state = dict(tables), dict(opt_state)
        dtype = self._options.dtype
        for stack in self._stacks:
            route = routes[stack.name]
            common = (
                *(stack, self._optimizers[stack.name], _of(stack, tables), _of(stack, opt_state), route),
                *(d_pooled[:, np.array(stack.features)], rate),
            )
            match stack.form:
                case "stack":
                    new_tables, new_state = replicated.update(*common)
                case "owned":
                    new_tables, new_state = owned.update(*common, dtype)
                case "routed":
                    new_tables, new_state = routed.update(*common, self._capacity(stack, route["rank"]), dtype)
                case "columns":
                    new_tables, new_state = columns.update(*common, dtype)
            tables |= new_tables
            opt_state |= new_state
        return tables, opt_state


def _of(stack: PlacedStack, arrays: Arrays) -> Arrays:
    return {name: arrays[name] for name in (stack.name, stack.name + POOLING_WEIGHTS) if name in arrays}


def _optimizers(
    config: OptimizerConfig, stack: PlacedStack
) -> tuple[sparse_optimizer.SparseOptimizer, sparse_optimizer.SparseOptimizer]:
    """The optimizer of a stack's rows, and that of its learned weights."""
    plain = sparse_optimizer.make_sparse_optimizer(config)
    if stack.form != COLUMNS or config.table != "rowwise_adagrad":
        return plain, plain

    def mean_square(rows_MxD: jax.Array) -> jax.Array:
        squares_Mx1 = jnp.square(rows_MxD).sum(axis=1, keepdims=True)
        return sum_over_shards(squares_Mx1, stack.num_shards) / stack.dim

    return sparse_optimizer.rowwise_adagrad(config.eps, mean_square), plain
