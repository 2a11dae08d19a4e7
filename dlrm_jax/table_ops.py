"""What a step asks of the tables, and the answer on one device. sharding/exchange.py gives the same over a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dlrm_jax import embedding
from dlrm_jax.config import ModelConfig, OptimizerConfig
from dlrm_jax.formulations import by_platform
from dlrm_jax.sparse_optimizer import make_sparse_optimizer

Arrays = dict[str, Any]


def _on_one_device(function: Callable[[Any, Any], tuple[Any, Any]], shared: Any, columns: Any) -> tuple[Any, Any]:
    return function(shared, columns)


class TableOps(NamedTuple):
    """Three pure functions of global arrays, and how the devices that they lie on share a batch.

    route: (ids_BxK, id_weights_BxK or None) -> routes. Reads no table.
    lookup: (tables, routes) -> (pooled_BxFxD, routes), the routes with what the way back needs.
    update: (tables, opt_state, routes, d_pooled_BxFxD, learning_rate) -> (tables, opt_state, counters).
    on_each: (function, shared, columns) -> function(shared, columns) = (sums, columns) of each device's own examples,
      the sums added over the devices, once.
    """

    route: Callable[[jax.Array, jax.Array | None], Arrays]
    lookup: Callable[[Arrays, Arrays], tuple[jax.Array, Arrays]]
    update: Callable[[Arrays, Arrays, Arrays, jax.Array, jax.Array], tuple[Arrays, Arrays, Arrays]]
    on_each: Callable[[Callable[[Any, Any], tuple[Any, Any]], Any, Any], tuple[Any, Any]] = _on_one_device


def local_ops(model: ModelConfig, optimizer: OptimizerConfig | None = None) -> TableOps:
    """All tables on one device: the meaning that every placement must equal. `optimizer` is what `update` needs."""

    def route(ids_BxK: jax.Array, id_weights_BxK: jax.Array | None) -> Arrays:
        return {"ids": ids_BxK, "weights": id_weights_BxK}

    def lookup(tables: Arrays, routes: Arrays) -> tuple[jax.Array, Arrays]:
        return embedding.lookup(model, tables, routes["ids"], routes["weights"]), routes

    def update(
        tables: Arrays, opt_state: Arrays, routes: Arrays, d_pooled_BxFxD: jax.Array, rate: jax.Array
    ) -> tuple[Arrays, Arrays, Arrays]:
        if optimizer is None:
            raise ValueError("update needs an optimizer")
        sparse = make_sparse_optimizer(optimizer)

        def by_rows(tables: Arrays, opt_state: Arrays, *args: Any) -> tuple[Arrays, Arrays]:
            grads = embedding.row_gradients(model, tables, *args)
            return _update_each(sparse.update, grads, tables, opt_state, rate)

        def by_bags(tables: Arrays, opt_state: Arrays, *args: Any) -> tuple[Arrays, Arrays]:
            grads = embedding.bag_gradients(model, *args)
            return _update_each(sparse.update_bags, grads, tables, opt_state, rate)

        args = (tables, opt_state, routes["ids"], routes["weights"], d_pooled_BxFxD)
        if model.num_slots == len(model.features) or model.learned_pooling:
            return *by_rows(*args), {}  # With one id a bag, rows and bags are the same thing.
        return *by_platform(by_bags, by_rows, *args), {}

    return TableOps(route, lookup, update)


def _update_each(
    update: Callable[..., Any], grads: Arrays, tables: Arrays, opt_state: Arrays, rate: jax.Array
) -> tuple[Arrays, Arrays]:
    new_tables, new_state = {}, {}
    for name, grad in grads.items():
        new_tables[name], new_state[name] = update(grad, opt_state[name], tables[name], rate)
    return new_tables, new_state
