"""TrainState: everything a run must keep to go on, and nothing else."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dlrm_jax.config import ModelConfig, OptimizerConfig
from dlrm_jax.model.dense_optimizer import make_dense_optimizer
from dlrm_jax.model.dlrm import DLRM
from dlrm_jax.tables.exchange import init_slots, pooled_shapes
from dlrm_jax.tables.forms.base import Stack
from dlrm_jax.tables.init import init_tables
from dlrm_jax.tables.layout import local_stacks


class TrainState(struct.PyTreeNode):
    """`step` counts finished updates; the schedule and the data position follow from it.

    `rate_factor`, where the rate is cut on plateaus, is what the schedule's rate is multiplied with.
    `batch_stats` are the running averages of batch norms, as Flax has them; empty for a model without any.
    """

    step: jax.Array
    dense_params: Any
    dense_opt_state: Any
    tables: dict[str, jax.Array]
    table_opt_state: dict[str, dict[str, jax.Array]]
    rate_factor: jax.Array | None = None
    batch_stats: dict[str, Any] = struct.field(default_factory=dict)


def new_state(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    dense_params: Any,
    tables: dict[str, jax.Array],
    stacks: tuple[Stack, ...] | None = None,
) -> TrainState:
    """The state at step 0 around given weights, whose tables are stored as `stacks`, by default one device's."""
    slots: dict[str, dict[str, jax.Array]] = {}
    for stack in local_stacks(model) if stacks is None else stacks:
        slots |= init_slots(optimizer, model, stack)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        dense_params=dense_params,
        dense_opt_state=make_dense_optimizer(optimizer).init(dense_params),
        tables=tables,
        table_opt_state=slots,
        rate_factor=jnp.ones(()) if optimizer.schedule.plateau else None,
        batch_stats=_first_batch_stats(model) if model.has_batch_norm else {},
    )


def init_dense(model: ModelConfig, seed: int) -> Any:
    """Fresh dense parameters; every weight is a function of `seed` and its own name alone."""
    return _init_variables(model, seed)["params"]


compiled_init_dense = jax.jit(init_dense, static_argnums=(0, 1))
"""`init_dense`, compiled once for each model and seed."""


@functools.partial(jax.jit, static_argnums=0)
def _first_batch_stats(model: ModelConfig) -> dict[str, Any]:
    return dict(_init_variables(model, 0).get("batch_stats", {}))


def _init_variables(model: ModelConfig, seed: int) -> Any:
    dense = jnp.zeros((1, model.num_dense))
    pooled = jax.tree.map(lambda shape: jnp.zeros(shape.shape), pooled_shapes(model, 1))
    return DLRM(model).init(jax.random.key(seed), dense, pooled)


def init_state(model: ModelConfig, optimizer: OptimizerConfig, seed: int) -> TrainState:
    """A fresh state on one device."""
    return new_state(model, optimizer, compiled_init_dense(model, seed), init_tables(model, seed))
