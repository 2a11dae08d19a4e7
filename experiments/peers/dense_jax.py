"""DLRM as a Flax user writes it today: tables are parameters, gradients are dense, optax updates every row."""

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dlrm_jax.config import ModelConfig, OptimizerConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.training.state import TrainState


class Model(nn.Module):
    """(dense_BxN, ids_BxK) -> logits_B."""

    config: ModelConfig

    @nn.compact
    def __call__(self, dense_BxN: jax.Array, ids_BxK: jax.Array) -> jax.Array:
        """Embed and sum, bottom MLP, interaction, top MLP."""
        config, start = self.config, 0
        bottom_BxD = mlp(dense_BxN, config.bottom_mlp, "bottom_mlp", final_relu=True)
        vectors = [bottom_BxD]
        for feature in config.features:
            table = config.table(feature.table)
            rows = nn.Embed(table.num_embeddings, table.embedding_dim, name=table.name)(
                ids_BxK[:, start : start + feature.hotness]
            )
            vectors.append(rows.sum(axis=1))
            start += feature.hotness
        if config.interaction.name == "dot":
            vectors_BxVxD = jnp.stack(vectors, axis=1)
            rows_P, columns_P = np.tril_indices(len(vectors), -1)
            products_BxVxV = vectors_BxVxD @ vectors_BxVxD.transpose(0, 2, 1)
            vectors = [bottom_BxD, products_BxVxV[:, rows_P, columns_P]]
        return mlp(jnp.concatenate(vectors, axis=1), config.top_mlp, "top_mlp", final_relu=False)[:, 0]


def mlp(x: jax.Array, widths: tuple[int, ...], name: str, final_relu: bool) -> jax.Array:
    """Dense layers called `name_0`, ..."""
    for i, width in enumerate(widths):
        x = nn.Dense(width, name=f"{name}_{i}")(x)
        x = nn.relu(x) if final_relu or i < len(widths) - 1 else x
    return x


def scale_by_adagrad(eps: float, rowwise: tuple[str, ...]) -> optax.GradientTransformation:
    """PyTorch's Adagrad; for the parameters in `rowwise` with one sum a row, of the row's mean square."""

    def square(path: Any, grad: jax.Array) -> jax.Array:
        squared = jnp.square(grad)
        return squared.mean(axis=1, keepdims=True) if path[0].key in rowwise else squared

    def init(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, p: jnp.zeros_like(square(path, p)), params)

    def update(grads: Any, sums: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        sums = jax.tree_util.tree_map_with_path(lambda path, g, s: s + square(path, g), grads, sums)
        return jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + eps), grads, sums), sums

    return optax.GradientTransformation(init, update)


class DenseJax:
    """The model with its optimizer, from the weights of one of our states."""

    def __init__(self, model: ModelConfig, optimizer: OptimizerConfig, loss: str, state: TrainState) -> None:
        self.config, names = model, tuple(table.name for table in model.tables)
        self.params: dict[str, Any] = {
            name: {"embedding": jnp.array(rows)} for name, rows in named_tables(model, state.tables)
        }
        for part in ("bottom_mlp", "top_mlp"):
            for i in range(len(state.dense_params[part])):
                self.params[f"{part}_{i}"] = jax.tree.map(jnp.array, state.dense_params[part][f"layer_{i}"])
        rate = optimizer.schedule.learning_rate
        scaled = scale_by_adagrad(optimizer.eps, names if optimizer.table == "rowwise_adagrad" else ())
        transformation = optax.sgd(rate) if optimizer.table == "sgd" else optax.chain(scaled, optax.scale(-rate))
        self.opt_state = jax.jit(transformation.init)(self.params)

        def loss_of(params: Any, batch: Batch) -> jax.Array:
            logits_B = Model(model).apply({"params": params}, batch.dense_BxN, batch.ids_BxK)
            if loss == "mse":
                return optax.squared_error(jax.nn.sigmoid(logits_B), batch.label_B).mean()
            return optax.sigmoid_binary_cross_entropy(logits_B, batch.label_B).mean()

        def step(params: Any, opt_state: Any, batch: Batch) -> tuple[Any, Any, jax.Array]:
            value, grads = jax.value_and_grad(loss_of)(params, batch)
            updates, opt_state = transformation.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, value

        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._forward = jax.jit(lambda p, b: Model(model).apply({"params": p}, b.dense_BxN, b.ids_BxK))

    def batch(self, batch: Batch) -> Batch:
        """Ours as it is."""
        return batch

    def forward(self, batch: Batch) -> jax.Array:
        """logits_B."""
        return jax.block_until_ready(self._forward(self.params, batch))

    def host(self, array: jax.Array) -> np.ndarray:
        """What `forward` returned, as NumPy has it."""
        return np.asarray(array)

    def train_step(self, batch: Batch) -> float:
        """One update of everything; returns the loss."""
        self.params, self.opt_state, loss = jax.block_until_ready(self._step(self.params, self.opt_state, batch))
        return float(loss)

    def tables(self) -> Iterator[np.ndarray]:
        """The tables' weights, in the model's order."""
        return (np.asarray(self.params[table.name]["embedding"]) for table in self.config.tables)

    def dense_weights(self) -> dict[str, list[np.ndarray]]:
        """(in, out) kernels and biases, in order, by MLP."""
        return {
            part: [
                np.asarray(self.params[f"{part}_{i}"][name]) for i in range(len(widths)) for name in ("kernel", "bias")
            ]
            for part, widths in (("bottom_mlp", self.config.bottom_mlp), ("top_mlp", self.config.top_mlp))
        }
