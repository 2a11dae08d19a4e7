"""The algorithm: pure train and eval steps.

Ids go in, pooled embeddings come out, the dense model is a function of them, and the gradient of the pooled
embeddings is all that the sparse optimizer ever sees.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dlrm_jax.config import LossConfig, ModelConfig, OptimizerConfig
from dlrm_jax.data.batch import Batch, without_unweighted
from dlrm_jax.model import metrics
from dlrm_jax.model.dense_optimizer import make_dense_optimizer, norm_factor, regularised
from dlrm_jax.model.dlrm import DLRM
from dlrm_jax.model.loss import example_losses, probability
from dlrm_jax.model.mlp import Training
from dlrm_jax.model.schedule import make_schedule
from dlrm_jax.tables.exchange import Pooled, TableOps, local_ops
from dlrm_jax.tables.updates import NOT_FINITE
from dlrm_jax.training.state import TrainState

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def forward(
    model: ModelConfig,
    ops: TableOps,
    tables: Any,
    variables: dict[str, Any],
    dense_BxN: jax.Array,
    ids_BxK: jax.Array,
    id_weights_BxK: jax.Array | None = None,
) -> jax.Array:
    """logits_B, in training's evaluations as where a model is served; `ops` says where the tables are, and how kept.

    `variables` are Flax's: `params`, and `batch_stats` where there are batch norms.
    """
    with jax.named_scope("lookup"):
        pooled_BxFxD, _ = ops.lookup(tables, ops.route(ids_BxK, id_weights_BxK))
    return DLRM(model).apply(variables, dense_BxN, pooled_BxFxD)


def logits(model: ModelConfig, state: TrainState, batch: Batch, ops: TableOps | None = None) -> jax.Array:
    """logits_B of a batch; `ops` says where the tables are, by default on one device."""
    inputs = (batch.dense_BxN, batch.ids_BxK, batch.id_weights_BxK)
    variables = {"params": state.dense_params, "batch_stats": state.batch_stats}
    return forward(model, ops or local_ops(model), state.tables, variables, *inputs)


def make_score(
    model: ModelConfig, threshold: float, ops: TableOps
) -> Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """`(tables, dense_params, dense_BxN, ids_BxK) -> (probability_B, logit_B)`: what is served.

    Probabilities are clipped to [threshold, 1 - threshold].
    """

    def score(tables: Any, dense_params: Any, dense_BxN: jax.Array, ids_BxK: jax.Array) -> tuple[jax.Array, jax.Array]:
        logit_B = forward(model, ops, tables, {"params": dense_params}, dense_BxN, ids_BxK)
        return probability(logit_B, threshold), logit_B

    return score


def make_train_step(
    model: ModelConfig,
    loss: LossConfig,
    optimizer: OptimizerConfig,
    num_micro_batches: int = 1,
    ops: TableOps | None = None,
    seed: int = 0,
) -> TrainStep:
    """`(state, batch) -> (state, metrics)`; jit it with `donate_argnums=0`, so that tables are updated in place.

    `ops` says where the tables are; by default on one device. With `num_micro_batches` G > 1 the dense model works off
    the batch in G parts, whose gradients are added: one update, equal to that of the whole batch up to rounding, with a
    G-th of the dense model's activations. Batch norms are the exception: each part, every G-th row of the batch, is
    normalised by itself, and the running averages are updated part after part.
    Dropout follows from (`seed`, step, layer, the example's place in the batch, column).
    Metrics: `loss`, the mean over weighted examples; `learning_rate`; `finite`, whether the loss is and all gradients
    that move a weight are; and the counters of `ops`.
    """
    ops = ops or local_ops(model, optimizer)
    finish = make_routed_step(model, loss, optimizer, num_micro_batches, ops, seed)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = without_unweighted(batch)
        with jax.named_scope("route"):
            routes = ops.route(batch.ids_BxK, batch.id_weights_BxK)
        return finish(state, batch, routes)

    return train_step


def make_pipelined_step(
    model: ModelConfig,
    loss: LossConfig,
    optimizer: OptimizerConfig,
    num_micro_batches: int,
    ops: TableOps,
    seed: int = 0,
) -> Callable[[TrainState, Batch, Any, Batch], tuple[TrainState, dict[str, jax.Array], Any]]:
    """`(state, batch, its routes, next batch) -> (state, metrics, the next batch's routes)`.

    Routes do not depend on the tables, so that the next batch's ids travel while this one is computed; the numbers are
    those of `make_train_step`.
    """
    finish = make_routed_step(model, loss, optimizer, num_micro_batches, ops, seed)

    def train_step(
        state: TrainState, batch: Batch, routes: Any, next_batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array], Any]:
        next_batch = without_unweighted(next_batch)
        next_routes = ops.route(next_batch.ids_BxK, next_batch.id_weights_BxK)
        return *finish(state, without_unweighted(batch), routes), next_routes

    return train_step


def make_routed_step(
    model: ModelConfig,
    loss: LossConfig,
    optimizer: OptimizerConfig,
    num_micro_batches: int,
    ops: TableOps,
    seed: int = 0,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The train step from where it is known which rows a batch needs."""
    schedule = make_schedule(optimizer.schedule)
    dense_optimizer = make_dense_optimizer(optimizer)

    def train_step(state: TrainState, batch: Batch, routes: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        found, routes = batch_gradients(model, loss, num_micro_batches, ops, seed, state, batch, routes)
        loss_value, d_params, d_pooled_BxFxD, batch_stats = found
        finite = _all_finite((loss_value, d_params))
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
            # A kernel that saw them on its way spares going through all of them once more.
            finite &= counters.pop(NOT_FINITE) == 0 if NOT_FINITE in counters else _all_finite(d_pooled_BxFxD)
        new_state = state.replace(
            step=state.step + 1,
            dense_params=dense_params,
            dense_opt_state=dense_opt_state,
            tables=tables,
            table_opt_state=table_opt_state,
            batch_stats=batch_stats,
        )
        return new_state, {"loss": loss_value, "learning_rate": rate, "finite": finite, **counters}

    return train_step


def batch_gradients(
    model: ModelConfig,
    loss: LossConfig,
    num_micro_batches: int,
    ops: TableOps,
    seed: int,
    state: TrainState,
    batch: Batch,
    routes: Any,
) -> tuple["Gradients", Any]:
    """(what a step knows of a batch before it moves a weight, the routes with what the way back needs)."""
    with jax.named_scope("lookup"):
        pooled_BxFxD, routes = ops.lookup(state.tables, routes)
    key = jax.random.fold_in(jax.random.key(seed), state.step) if model.has_dropout else None
    parts = (state.dense_params, batch, pooled_BxFxD, num_micro_batches, ops, HiddenState(state.batch_stats, key))
    return dense_gradients(model, loss, *parts), routes


class Gradients(NamedTuple):
    """The mean loss of a batch and its gradients, and batch norms' new running averages."""

    loss: jax.Array
    d_params: Any
    d_pooled_BxFxD: Pooled
    batch_stats: Any


class HiddenState(NamedTuple):
    """What hidden layers need besides parameters: running averages of batch norms, and the step's key for dropout."""

    batch_stats: Any
    key: Any = None


_PLAIN = HiddenState({})


def dense_gradients(
    model: ModelConfig,
    loss: LossConfig,
    dense_params: Any,
    batch: Batch,
    pooled_BxFxD: Pooled,
    num_micro_batches: int,
    ops: TableOps,
    hidden: HiddenState = _PLAIN,
) -> Gradients:
    """Each device adds the gradients of its own examples, part after part; only their sum is sent.

    With batch norms all devices work off a part together, as its means and variances are those of all its examples.
    """
    total_weight = jnp.maximum(batch.weight_B.sum(), 1e-30)
    row_B = jnp.arange(len(batch.weight_B)) if model.has_dropout or model.has_batch_norm else None

    def part_gradients(shared: Any, part: tuple[Any, ...]) -> tuple[tuple[jax.Array, Any, Any], Any]:
        (params, total_weight, hidden), (pooled, *others) = shared, part

        def mean_loss(params: Any, pooled: Any) -> tuple[jax.Array, Any]:
            dense, row, label, weight = others
            logits, batch_stats = training_logits(model, params, hidden, dense, pooled, row, weight)
            return (example_losses(loss, logits, label) * weight).sum() / total_weight, batch_stats

        compute = jax.value_and_grad(mean_loss, argnums=(0, 1), has_aux=True)
        (value, batch_stats), (d_params, d_pooled) = compute(params, pooled)
        return (value, d_params, batch_stats), d_pooled

    def gradients(shared: Any, columns: tuple[Any, ...]) -> tuple[tuple[jax.Array, Any, Any], Any]:
        if num_micro_batches == 1:
            return part_gradients(shared, columns)
        params, total_weight, hidden = shared
        split = (len(columns[-1]) // num_micro_batches, num_micro_batches)
        parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(*split, *x.shape[1:]), 1, 0), columns)

        def add(so_far: tuple[jax.Array, Any, Any], part: tuple[Any, ...]) -> tuple[tuple[jax.Array, Any, Any], Any]:
            *sums, batch_stats = so_far
            now = (params, total_weight, hidden._replace(batch_stats=batch_stats))
            (*more, batch_stats), d_pooled = part_gradients(now, part)
            return (*jax.tree.map(jnp.add, sums, more), batch_stats), d_pooled

        first = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), hidden.batch_stats)
        sums, d_pooled = jax.lax.scan(add, first, parts)
        whole = lambda d, pooled: jnp.moveaxis(d, 0, 1).reshape(pooled.shape)  # noqa: E731
        return sums, jax.tree.map(whole, d_pooled, columns[0])

    shared = (dense_params, total_weight, hidden)
    columns = (pooled_BxFxD, batch.dense_BxN, row_B, batch.label_B, batch.weight_B)
    on_each = _together if model.has_batch_norm else ops.on_each
    (value, d_params, batch_stats), d_pooled_BxFxD = on_each(gradients, shared, columns)
    return Gradients(value, d_params, d_pooled_BxFxD, batch_stats)


def _all_finite(numbers: Any) -> jax.Array:
    return functools.reduce(jnp.logical_and, (jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(numbers)))


def _together(function: Callable[[Any, Any], tuple[Any, Any]], shared: Any, columns: Any) -> tuple[Any, Any]:
    """In place of TableOps.on_each: of all devices' examples at once, which XLA splits over them."""
    return function(shared, columns)


def training_logits(
    model: ModelConfig,
    params: Any,
    hidden: HiddenState,
    dense_BxN: jax.Array,
    pooled_BxFxD: Pooled,
    row_B: jax.Array | None,
    weight_B: jax.Array,
) -> tuple[jax.Array, Any]:
    """(logits_B, new batch_stats) in training; `row_B` numbers the examples in their batch, None if nobody asks."""
    training, rngs = None, None if hidden.key is None else {"dropout": hidden.key}
    counts_B = weight_B > 0
    if row_B is not None:
        # The mean of no example would be no number: of a part that is all padding nothing is kept.
        training = Training(row_B, counts_B | ~counts_B.any())
    variables = {"params": params, "batch_stats": hidden.batch_stats}
    logits_B, new = DLRM(model).apply(variables, dense_BxN, pooled_BxFxD, training, rngs=rngs, mutable=["batch_stats"])
    keep = lambda new, old: jnp.where(counts_B.any(), new, old)  # noqa: E731
    return logits_B, jax.tree.map(keep, new.get("batch_stats", {}), hidden.batch_stats)


def make_eval_step(
    model: ModelConfig, loss: LossConfig, ops: TableOps | None = None
) -> Callable[[TrainState, Batch], metrics.BatchSums]:
    """`(state, batch) -> metrics.scored_sums(...)`: sums and logits that metrics.Metrics accumulates."""

    def eval_step(state: TrainState, batch: Batch) -> metrics.BatchSums:
        logits_B = logits(model, state, batch, ops)
        prob_B = probability(logits_B, loss.threshold)
        return metrics.scored_sums(loss, logits_B, prob_B, batch.label_B, batch.weight_B)

    return eval_step
