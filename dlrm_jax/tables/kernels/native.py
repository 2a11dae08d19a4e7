"""Lookup and update of the tables of one CPU by tables.cc, equal to exchange.local_ops up to rounding.

Of ids that are no bags XLA's gather, and its scatter for SGD, are as fast: those stay, but where tables.cc updates, as
the two together are faster. So do rules that tables.cc does not know, which a line in the log says.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import ModelConfig, OptimizerConfig
from dlrm_jax.config.learning import ALL_ROWS
from dlrm_jax.host.formulations import NATIVE, XLA
from dlrm_jax.tables.exchange import Arrays, TableOps, stack_rule
from dlrm_jax.tables.forms.base import Stack
from dlrm_jax.tables.layout import local_stacks
from dlrm_jax.tables.rules import Adagrad, RowwiseAdagrad, Rule, Sgd
from dlrm_jax.tables.updates import NOT_FINITE

_LOG = logging.getLogger("dlrm_jax")
_COUNT = jax.ShapeDtypeStruct((1,), jnp.int32)
_CALLS: dict[type[Rule], str] = {
    Sgd: "dlrm_update_sgd",
    Adagrad: "dlrm_update_adagrad",
    RowwiseAdagrad: "dlrm_update_rowwise_adagrad",
}


def does(model: ModelConfig, optimizer: OptimizerConfig, tell: bool = True) -> tuple[str, str]:
    """(NATIVE or XLA for lookups, for updates): what tables.cc has of a model, and no more than is worth it.

    What is left to XLA as tables.cc does not have it is told to the log.
    """
    log = _LOG.info if tell else _LOG.debug
    stacks = local_stacks(model)
    rules = [stack_rule(optimizer, stack) for stack in stacks]
    unknown = sorted({rule.describe() for rule in rules if type(rule) not in _CALLS})
    if optimizer.clip_norm or optimizer.table_update == ALL_ROWS:
        unknown.append("--clip_norm or --table_update=all")
    if unknown:
        log("--kernels=native: tables.cc has no %s, so XLA updates the tables", ", ".join(unknown))
    if len(model.dims) > 1 or any(table.dtype != "float32" for table in model.tables):
        log("--kernels=native: tables.cc has float32 of one dim only, so XLA looks up and updates these tables")
        return XLA, XLA
    has_bags = model.num_slots > len(model.features)
    adds = not has_bags and all(isinstance(rule, Sgd) for rule in rules)
    update = XLA if unknown or adds else NATIVE
    return NATIVE if has_bags else update, update


def with_native(
    plain: TableOps, lookup: bool, update: bool, optimizer: OptimizerConfig, stacks: tuple[Stack, ...]
) -> TableOps:
    """`plain`, with lookups or updates by tables.cc, which `build.register` has to have made known to XLA."""
    if lookup:
        plain = plain._replace(lookup=functools.partial(_lookup, stacks))
    if update:
        plain = plain._replace(update=functools.partial(_update, optimizer, stacks))
    return plain


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
    optimizer: OptimizerConfig,
    stacks: tuple[Stack, ...],
    tables: Arrays,
    states: Arrays,
    routes: Arrays,
    d_pooled_BxFxD: jax.Array,
    rate: jax.Array,
    count: jax.Array,
) -> tuple[Arrays, Arrays, Arrays]:
    del count  # None of these rules looks at it.
    new_tables, new_states, bad = {}, {}, []
    for stack in stacks:
        rule = stack_rule(optimizer, stack)
        arrays = (tables[stack.name], *states[stack.name].values())
        attributes: dict[str, Any] = {"hotness": _hotness(stack)}
        if isinstance(rule, Adagrad | RowwiseAdagrad):
            attributes["eps"] = np.float32(rule.eps)
        call = jax.ffi.ffi_call(
            _CALLS[type(rule)],
            [*(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays), _COUNT],
            input_output_aliases={i: i for i in range(len(arrays))},
        )
        d_stack_BxGxD = d_pooled_BxFxD[:, np.array(stack.features)]
        own_rate = jnp.float32(rate) * (stack.tables[0].rate * optimizer.table_rate)
        rows, scale = routes[stack.name]["rows"], _scale(routes[stack.name])
        new_tables[stack.name], *slots, bad_1 = call(*arrays, rows, scale, d_stack_BxGxD, own_rate, **attributes)
        new_states[stack.name] = dict(zip(states[stack.name], slots, strict=True))
        bad.append(bad_1[0])
    return new_tables, new_states, {NOT_FINITE: sum(bad)}


def _scale(routes: Arrays) -> jax.Array:
    return routes.get("scale", jnp.zeros((0, 0), jnp.float32))


def _hotness(stack: Stack) -> np.ndarray:
    return np.array(stack.hotness, np.int64)
