"""The algorithm: pure train and eval steps.

Ids go in, pooled embeddings come out, the dense model is a function of them, and the gradient of the pooled
embeddings is all that the sparse optimizer ever sees.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dlrm_jax import embedding, metrics
from dlrm_jax.batch import Batch
from dlrm_jax.config import LossConfig, ModelConfig, OptimizerConfig
from dlrm_jax.dense_optimizer import make_dense_optimizer
from dlrm_jax.loss import example_losses, probability
from dlrm_jax.model import DLRM
from dlrm_jax.schedule import make_schedule
from dlrm_jax.sparse_optimizer import SparseGrad, make_sparse_optimizer
from dlrm_jax.state import TrainState

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def logits(model: ModelConfig, state: TrainState, batch: Batch) -> jax.Array:
    """logits_B of a batch."""
    pooled_BxFxD = embedding.lookup(model, state.tables, batch.ids_BxK, batch.id_weights_BxK)
    return DLRM(model).apply({"params": state.dense_params}, batch.dense_BxN, pooled_BxFxD)


def make_train_step(
    model: ModelConfig, loss: LossConfig, optimizer: OptimizerConfig, num_micro_batches: int = 1
) -> TrainStep:
    """`(state, batch) -> (state, metrics)`; jit it with `donate_argnums=0`, so that tables are updated in place.

    With `num_micro_batches` G > 1 the batch is worked off in G parts of B / G examples, whose gradients are added:
    one update, equal to that of the whole batch up to rounding, with a G-th of the activations.
    Metrics: `loss`, the mean over weighted examples; `learning_rate`; `finite`, whether loss and gradients are.
    """
    schedule = make_schedule(optimizer.schedule)
    dense_optimizer = make_dense_optimizer(optimizer)
    sparse_optimizer = make_sparse_optimizer(optimizer)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        loss_value, d_params, d_rows, finite = gradients(model, loss, state, batch, num_micro_batches)
        rate = schedule(state.step)
        updates, dense_opt_state = dense_optimizer.update(d_params, state.dense_opt_state, state.dense_params)
        updates = jax.tree.map(lambda update: -rate * update, updates)
        tables, table_opt_state = {}, {}
        for name, grad in d_rows.items():
            tables[name], table_opt_state[name] = sparse_optimizer.update(
                grad, state.table_opt_state[name], state.tables[name], rate
            )
        new_state = TrainState(
            step=state.step + 1,
            dense_params=optax.apply_updates(state.dense_params, updates),
            dense_opt_state=dense_opt_state,
            tables=tables,
            table_opt_state=table_opt_state,
        )
        return new_state, {"loss": loss_value, "learning_rate": rate, "finite": finite}

    return train_step


def gradients(
    model: ModelConfig, loss: LossConfig, state: TrainState, batch: Batch, num_micro_batches: int = 1
) -> tuple[jax.Array, Any, dict[str, SparseGrad], jax.Array]:
    """(mean loss, gradient of the dense parameters, row gradients of the tables, whether all are finite)."""
    total_weight = jnp.maximum(batch.weight_B.sum(), 1e-30)
    if num_micro_batches == 1:
        return _micro_gradients(model, loss, state, batch, total_weight)
    parts = jax.tree.map(lambda x: x.reshape(num_micro_batches, -1, *x.shape[1:]), batch)

    def add(carry: tuple[jax.Array, Any], part: Batch) -> tuple[tuple[jax.Array, Any], tuple[Any, jax.Array]]:
        value, d_params, d_rows, finite = _micro_gradients(model, loss, state, part, total_weight)
        return jax.tree.map(jnp.add, carry, (value, d_params)), (d_rows, finite)

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.dense_params))
    (value, d_params), (d_rows, finite) = jax.lax.scan(add, zeros, parts)
    return value, d_params, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), d_rows), finite.all()


def _micro_gradients(
    model: ModelConfig, loss: LossConfig, state: TrainState, batch: Batch, total_weight: jax.Array
) -> tuple[jax.Array, Any, dict[str, SparseGrad], jax.Array]:
    """As `gradients`, for a part of a batch whose weights add up to `total_weight`."""

    def mean_loss(dense_params: Any, pooled_BxFxD: jax.Array) -> jax.Array:
        logits_B = DLRM(model).apply({"params": dense_params}, batch.dense_BxN, pooled_BxFxD)
        return (example_losses(loss, logits_B, batch.label_B) * batch.weight_B).sum() / total_weight

    pooled_BxFxD = embedding.lookup(model, state.tables, batch.ids_BxK, batch.id_weights_BxK)
    value, (d_params, d_pooled) = jax.value_and_grad(mean_loss, argnums=(0, 1))(state.dense_params, pooled_BxFxD)
    d_rows = embedding.row_gradients(model, state.tables, batch.ids_BxK, batch.id_weights_BxK, d_pooled)
    finite = jnp.isfinite(value)
    for leaf in jax.tree.leaves((d_params, d_pooled)):
        finite &= jnp.isfinite(leaf).all()
    return value, d_params, d_rows, finite


def make_eval_step(model: ModelConfig, loss: LossConfig) -> Callable[[TrainState, Batch], Any]:
    """`(state, batch) -> metrics.batch_sums(...)`: sums and logits that metrics.Metrics accumulates."""

    def eval_step(state: TrainState, batch: Batch) -> Any:
        logits_B = logits(model, state, batch)
        return metrics.batch_sums(
            loss_B=example_losses(loss, logits_B, batch.label_B),
            logits_B=logits_B,
            prob_B=probability(logits_B, loss.threshold),
            label_B=batch.label_B,
            weight_B=batch.weight_B,
        )

    return eval_step
