"""Lookup and update of the tables by tables.cc: the TableOps of one CPU, equal to table_ops.local_ops up to rounding.

Of ids that are no bags XLA's gather, and its scatter for SGD, are as fast: those stay.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import ConfigError, ModelConfig, OptimizerConfig
from dlrm_jax.tables.embedding import Stack, stack_slots
from dlrm_jax.tables.kernels import build
from dlrm_jax.tables.table_ops import Arrays, TableOps, local_ops


def native_ops(model: ModelConfig, optimizer: OptimizerConfig | None = None) -> TableOps:
    """All tables on one CPU. Compiles tables.cc where no earlier run did.

    Raises ConfigError for learned pooling, on other devices than CPUs, and without a C++ compiler.
    """
    if model.learned_pooling:
        raise ConfigError("--cpu_kernels=native has no --learned_pooling; leave one of them out")
    if jax.default_backend() != "cpu":
        raise ConfigError(f"--cpu_kernels=native is for CPUs; tables are on a {jax.default_backend()} here")
    build.register()
    plain = local_ops(model, optimizer)

    def lookup(tables: Arrays, routes: Arrays) -> tuple[jax.Array, Arrays]:
        pooled: list[jax.Array] = []
        features: list[int] = []
        for stack, row_ids, scale in stack_slots(model, routes["ids"], routes["weights"]):
            shape = (row_ids.shape[0], len(stack.features), model.embedding_dim)
            call = jax.ffi.ffi_call("dlrm_lookup", jax.ShapeDtypeStruct(shape, jnp.float32))
            pooled.append(call(tables[stack.name], row_ids, _scale(scale), hotness=_hotness(stack)))
            features += stack.features
        if len(pooled) == 1:
            return pooled[0], routes
        return jnp.concatenate(pooled, axis=1)[:, np.argsort(features)], routes

    def update(
        tables: Arrays, opt_state: Arrays, routes: Arrays, d_pooled_BxFxD: jax.Array, rate: jax.Array
    ) -> tuple[Arrays, Arrays, Arrays]:
        if optimizer is None:
            raise ValueError("update needs an optimizer")
        new_tables, new_state = {}, {}
        for stack, row_ids, scale in stack_slots(model, routes["ids"], routes["weights"]):
            name, is_sgd = stack.name, optimizer.table == "sgd"
            held = (tables[name],) if is_sgd else (tables[name], opt_state[name])
            attributes = {"hotness": _hotness(stack)} | ({} if is_sgd else {"eps": np.float32(optimizer.eps)})
            call = jax.ffi.ffi_call(
                f"dlrm_update_{optimizer.table}",
                [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in held],
                input_output_aliases={i: i for i in range(len(held))},
            )
            d_stack_BxGxD = d_pooled_BxFxD[:, np.array(stack.features)]
            out = call(*held, row_ids, _scale(scale), d_stack_BxGxD, jnp.float32(rate), **attributes)
            new_tables[name], new_state[name] = out[0], opt_state[name] if is_sgd else out[1]
        return new_tables, new_state, {}

    if model.num_slots > len(model.features):
        return TableOps(plain.route, lookup, update)
    return plain if optimizer is None or optimizer.table == "sgd" else plain._replace(update=update)


def _scale(scale_BxK: jax.Array | None) -> jax.Array:
    return jnp.zeros((0, 0), jnp.float32) if scale_BxK is None else scale_BxK


def _hotness(stack: Stack) -> np.ndarray:
    return np.array(stack.hotness, np.int64)
