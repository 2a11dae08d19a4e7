"""The algorithm: pure train and eval steps.

Ids go in, pooled embeddings come out, the dense model is a function of them, and the gradient of the pooled
embeddings is all that the sparse optimizer ever sees.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dlrm_jax.config import LossConfig, ModelConfig, OptimizerConfig
from dlrm_jax.data.batch import Batch, without_unweighted
from dlrm_jax.model import metrics
from dlrm_jax.model.dense_optimizer import make_dense_optimizer, norm_factor, regularised
from dlrm_jax.model.dlrm import DLRM
from dlrm_jax.model.loss import clipped, example_losses, probability
from dlrm_jax.model.schedule import make_schedule
from dlrm_jax.tables.exchange import Pooled, TableOps, local_ops
from dlrm_jax.training.state import TrainState

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def forward(
    model: ModelConfig,
    ops: TableOps,
    tables: Any,
    dense_params: Any,
    dense_BxN: jax.Array,
    ids_BxK: jax.Array,
    id_weights_BxK: jax.Array | None = None,
) -> jax.Array:
    """logits_B, in training's evaluations as where a model is served; `ops` says where the tables are, and how kept."""
    with jax.named_scope("lookup"):
        pooled_BxFxD, _ = ops.lookup(tables, ops.route(ids_BxK, id_weights_BxK))
    return DLRM(model).apply({"params": dense_params}, dense_BxN, pooled_BxFxD)


def logits(model: ModelConfig, state: TrainState, batch: Batch, ops: TableOps | None = None) -> jax.Array:
    """logits_B of a batch; `ops` says where the tables are, by default on one device."""
    inputs = (batch.dense_BxN, batch.ids_BxK, batch.id_weights_BxK)
    return forward(model, ops or local_ops(model), state.tables, state.dense_params, *inputs)


def make_score(
    model: ModelConfig, threshold: float, ops: TableOps
) -> Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """`(tables, dense_params, dense_BxN, ids_BxK) -> (probability_B, logit_B)`: what is served.

    Probabilities are clipped to [threshold, 1 - threshold].
    """

    def score(tables: Any, dense_params: Any, dense_BxN: jax.Array, ids_BxK: jax.Array) -> tuple[jax.Array, jax.Array]:
        logit_B = forward(model, ops, tables, dense_params, dense_BxN, ids_BxK)
        return probability(logit_B, threshold), logit_B

    return score


def make_train_step(
    model: ModelConfig,
    loss: LossConfig,
    optimizer: OptimizerConfig,
    num_micro_batches: int = 1,
    ops: TableOps | None = None,
) -> TrainStep:
    """`(state, batch) -> (state, metrics)`; jit it with `donate_argnums=0`, so that tables are updated in place.

    `ops` says where the tables are; by default on one device. With `num_micro_batches` G > 1 the dense model works off
    the batch in G parts, whose gradients are added: one update, equal to that of the whole batch up to rounding, with a
    G-th of the dense model's activations.
    Metrics: `loss`, the mean over weighted examples; `learning_rate`; `finite`, whether loss and gradients are; and the
    counters of `ops`.
    """
    ops = ops or local_ops(model, optimizer)
    finish = make_routed_step(model, loss, optimizer, num_micro_batches, ops)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = without_unweighted(batch)
        with jax.named_scope("route"):
            routes = ops.route(batch.ids_BxK, batch.id_weights_BxK)
        return finish(state, batch, routes)

    return train_step


def make_pipelined_step(
    model: ModelConfig, loss: LossConfig, optimizer: OptimizerConfig, num_micro_batches: int, ops: TableOps
) -> Callable[[TrainState, Batch, Any, Batch], tuple[TrainState, dict[str, jax.Array], Any]]:
    """`(state, batch, its routes, next batch) -> (state, metrics, the next batch's routes)`.

    Routes do not depend on the tables, so that the next batch's ids travel while this one is computed; the numbers are
    those of `make_train_step`.
    """
    finish = make_routed_step(model, loss, optimizer, num_micro_batches, ops)

    def train_step(
        state: TrainState, batch: Batch, routes: Any, next_batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array], Any]:
        next_batch = without_unweighted(next_batch)
        next_routes = ops.route(next_batch.ids_BxK, next_batch.id_weights_BxK)
        return *finish(state, without_unweighted(batch), routes), next_routes

    return train_step


def make_scanned_step(step: TrainStep) -> Callable[..., tuple[TrainState, list[dict[str, jax.Array]]]]:
    """`(state, batches) -> (state, [metrics of each])`: as many steps as there are batches, one after the other.

    One dispatch instead of many: for where launching a step takes as long as the step. Equal up to rounding.
    """

    def train_steps(state: TrainState, batches: list[Batch]) -> tuple[TrainState, list[dict[str, jax.Array]]]:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
        state, stacked_metrics = jax.lax.scan(step, state, stacked)
        # Apart already here: taking them apart later would be a dispatch for each number.
        return state, [jax.tree.map(lambda x, i=i: x[i], stacked_metrics) for i in range(len(batches))]

    return train_steps


def make_routed_step(
    model: ModelConfig, loss: LossConfig, optimizer: OptimizerConfig, num_micro_batches: int, ops: TableOps
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The train step from where it is known which rows a batch needs."""
    schedule = make_schedule(optimizer.schedule)
    dense_optimizer = make_dense_optimizer(optimizer)

    def train_step(state: TrainState, batch: Batch, routes: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        with jax.named_scope("lookup"):
            pooled_BxFxD, routes = ops.lookup(state.tables, routes)
        loss_value, d_params, d_pooled_BxFxD, finite = dense_gradients(
            model, loss, state.dense_params, batch, pooled_BxFxD, num_micro_batches, ops
        )
        rate = schedule(state.step)
        if state.rate_factor is not None:
            rate *= state.rate_factor
        d_params = regularised(optimizer, d_params, state.dense_params)
        factor = []
        if optimizer.clip_norm:
            squares = ops.squares(state.tables, routes, d_pooled_BxFxD)
            squares += sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(d_params))
            factor = [norm_factor(optimizer.clip_norm, squares)]
            d_params = jax.tree.map(lambda gradient: factor[0] * gradient, d_params)
        with jax.named_scope("dense_update"):
            updates, dense_opt_state = dense_optimizer.update(d_params, state.dense_opt_state, state.dense_params)
            updates = jax.tree.map(lambda update: -rate * update, updates)
            dense_params = optax.apply_updates(state.dense_params, updates)
        with jax.named_scope("sparse_update"):
            tables, table_opt_state, counters = ops.update(
                state.tables, state.table_opt_state, routes, d_pooled_BxFxD, rate, state.step + 1, *factor
            )
        new_state = state.replace(
            step=state.step + 1,
            dense_params=dense_params,
            dense_opt_state=dense_opt_state,
            tables=tables,
            table_opt_state=table_opt_state,
        )
        return new_state, {"loss": loss_value, "learning_rate": rate, "finite": finite, **counters}

    return train_step


def dense_gradients(
    model: ModelConfig,
    loss: LossConfig,
    dense_params: Any,
    batch: Batch,
    pooled_BxFxD: Pooled,
    num_micro_batches: int,
    ops: TableOps,
) -> tuple[jax.Array, Any, Pooled, jax.Array]:
    """(mean loss, gradient of the dense parameters, d_pooled_BxFxD, whether all are finite).

    Each device adds the gradients of its own examples, part after part; only their sum is sent.
    """
    total_weight = jnp.maximum(batch.weight_B.sum(), 1e-30)

    def part_loss(
        params: Any, pooled: jax.Array, total_weight: jax.Array, dense: jax.Array, label: jax.Array, weight: jax.Array
    ) -> jax.Array:
        logits = DLRM(model).apply({"params": params}, dense, pooled)
        return (example_losses(loss, logits, label) * weight).sum() / total_weight

    def part_gradients(shared: Any, part: tuple[Any, ...]) -> tuple[tuple[jax.Array, Any], jax.Array]:
        (params, total_weight), (pooled, *others) = shared, part
        value, (d_params, d_pooled) = jax.value_and_grad(part_loss, argnums=(0, 1))(
            params, pooled, total_weight, *others
        )
        return (value, d_params), d_pooled

    def gradients(shared: Any, columns: tuple[Any, ...]) -> tuple[tuple[jax.Array, Any], jax.Array]:
        if num_micro_batches == 1:
            return part_gradients(shared, columns)
        split = (len(columns[-1]) // num_micro_batches, num_micro_batches)
        parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(*split, *x.shape[1:]), 1, 0), columns)

        def add(sums: tuple[jax.Array, Any], part: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, Any], jax.Array]:
            more, d_pooled = part_gradients(shared, part)
            return jax.tree.map(jnp.add, sums, more), d_pooled

        sums, d_pooled = jax.lax.scan(add, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, shared[0])), parts)
        whole = lambda d, pooled: jnp.moveaxis(d, 0, 1).reshape(pooled.shape)  # noqa: E731
        return sums, jax.tree.map(whole, d_pooled, columns[0])

    columns = (pooled_BxFxD, batch.dense_BxN, batch.label_B, batch.weight_B)
    (value, d_params), d_pooled_BxFxD = ops.on_each(gradients, (dense_params, total_weight), columns)
    finite = jnp.isfinite(value)
    for leaf in jax.tree.leaves((d_params, d_pooled_BxFxD)):
        finite &= jnp.isfinite(leaf).all()
    return value, d_params, d_pooled_BxFxD, finite


def make_eval_step(
    model: ModelConfig, loss: LossConfig, ops: TableOps | None = None
) -> Callable[[TrainState, Batch], metrics.BatchSums]:
    """`(state, batch) -> metrics.batch_sums(...)`: sums and logits that metrics.Metrics accumulates."""

    def eval_step(state: TrainState, batch: Batch) -> metrics.BatchSums:
        logits_B = logits(model, state, batch, ops)
        return metrics.batch_sums(
            loss_B=example_losses(loss, logits_B, batch.label_B),
            logits_B=clipped(logits_B, loss.threshold),
            prob_B=probability(logits_B, loss.threshold),
            label_B=batch.label_B,
            weight_B=batch.weight_B,
        )

    return eval_step
