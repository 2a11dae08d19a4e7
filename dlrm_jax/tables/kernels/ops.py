"""Lookup and update of the tables by tables.cc: the TableOps of one CPU, equal to exchange.local_ops up to rounding.

Of ids that are no bags XLA's gather, and its scatter for SGD, are as fast: those stay. So do rules that tables.cc does
not know, which a line in the log says.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import ConfigError, ModelConfig, OptimizerConfig
from dlrm_jax.config.learning import ALL_ROWS
from dlrm_jax.tables.exchange import Arrays, TableOps, local_ops, stack_rule
from dlrm_jax.tables.forms.base import Stack
from dlrm_jax.tables.kernels import build
from dlrm_jax.tables.layout import local_stacks
from dlrm_jax.tables.rules import Adagrad, RowwiseAdagrad, Rule, Sgd

_LOG = logging.getLogger("dlrm_jax")
_CALLS: dict[type[Rule], str] = {
    Sgd: "dlrm_update_sgd",
    Adagrad: "dlrm_update_adagrad",
    RowwiseAdagrad: "dlrm_update_rowwise_adagrad",
}


def native_ops(
    model: ModelConfig, optimizer: OptimizerConfig | None = None, stacks: tuple[Stack, ...] | None = None
) -> TableOps:
    """All tables on one CPU, by default in the stacks of one device. Compiles tables.cc where no earlier run did.

    Raises ConfigError for learned pooling, on other devices than CPUs, and without a C++ compiler.
    """
    if model.learned_pooling:
        raise ConfigError("--cpu_kernels=native has no --learned_pooling; leave one of them out")
    if jax.default_backend() != "cpu":
        raise ConfigError(f"--cpu_kernels=native is for CPUs; tables are on a {jax.default_backend()} here")
    build.register()
    stacks = stacks or local_stacks(model)
    plain = local_ops(model, optimizer)
    unknown = sorted({rule.describe() for rule in _rules(optimizer, stacks) if type(rule) not in _CALLS})
    if optimizer is not None and (optimizer.clip_norm or optimizer.table_update == ALL_ROWS):
        unknown.append("--clip_norm or --table_update=all")
    if unknown:
        _LOG.info("--cpu_kernels=native: tables.cc has no %s, so XLA updates the tables", ", ".join(unknown))
    if len(model.dims) > 1 or any(table.dtype != "float32" for table in model.tables):
        _LOG.info(
            "--cpu_kernels=native: tables.cc has float32 of one dim only, so XLA looks up and updates these tables"
        )
        return plain
    has_bags = model.num_slots > len(model.features)
    is_sgd = all(isinstance(rule, Sgd) for rule in _rules(optimizer, stacks))
    return TableOps(
        plain.route,
        functools.partial(_lookup, stacks) if has_bags else plain.lookup,
        plain.update if unknown or (is_sgd and not has_bags) else functools.partial(_update, optimizer, stacks),
        plain.squares,
    )


def _rules(optimizer: OptimizerConfig | None, stacks: tuple[Stack, ...]) -> list[Rule]:
    return [] if optimizer is None else [stack_rule(optimizer, stack) for stack in stacks]


def _lookup(stacks: tuple[Stack, ...], tables: Arrays, routes: Arrays) -> tuple[jax.Array, Arrays]:
    pooled: list[jax.Array] = []
    features: list[int] = []
    for stack in stacks:
        rows = routes[stack.name]["rows"]
        shape = (rows.shape[0], len(stack.features), stack.dim)
        call = jax.ffi.ffi_call("dlrm_lookup", jax.ShapeDtypeStruct(shape, jnp.float32))
        pooled.append(call(tables[stack.name], rows, _scale(routes[stack.name]), hotness=_hotness(stack)))
        features += stack.features
    return (pooled[0] if len(pooled) == 1 else jnp.concatenate(pooled, axis=1)[:, np.argsort(features)]), routes


def _update(
    optimizer: OptimizerConfig | None,
    stacks: tuple[Stack, ...],
    tables: Arrays,
    states: Arrays,
    routes: Arrays,
    d_pooled_BxFxD: jax.Array,
    rate: jax.Array,
    count: jax.Array,
) -> tuple[Arrays, Arrays, Arrays]:
    del count  # None of these rules looks at it.
    if optimizer is None:
        raise ValueError("update needs an optimizer")
    new_tables, new_states = {}, {}
    for stack in stacks:
        rule = stack_rule(optimizer, stack)
        arrays = (tables[stack.name], *states[stack.name].values())
        attributes: dict[str, Any] = {"hotness": _hotness(stack)}
        if isinstance(rule, Adagrad | RowwiseAdagrad):
            attributes["eps"] = np.float32(rule.eps)
        call = jax.ffi.ffi_call(
            _CALLS[type(rule)],
            [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays],
            input_output_aliases={i: i for i in range(len(arrays))},
        )
        d_stack_BxGxD = d_pooled_BxFxD[:, np.array(stack.features)]
        own_rate = jnp.float32(rate) * (stack.tables[0].rate * optimizer.table_rate)
        rows, scale = routes[stack.name]["rows"], _scale(routes[stack.name])
        new_tables[stack.name], *slots = call(*arrays, rows, scale, d_stack_BxGxD, own_rate, **attributes)
        new_states[stack.name] = dict(zip(states[stack.name], slots, strict=True))
    return new_tables, new_states, {}


def _scale(routes: Arrays) -> jax.Array:
    return routes.get("scale", jnp.zeros((0, 0), jnp.float32))


def _hotness(stack: Stack) -> np.ndarray:
    return np.array(stack.hotness, np.int64)
