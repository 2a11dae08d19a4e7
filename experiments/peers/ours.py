"""Our own step, as a run compiles it."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np

from dlrm_jax.config import LossConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.host.formulations import AUTO
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.step import logits, make_train_step


class Ours:
    """Our own step, as a run compiles it by default."""

    def __init__(self, placed: Placed, loss: LossConfig, seed: int) -> None:
        self.model, self.state = placed.model, placed.init_state(seed)
        ops = dataclasses.replace(placed, kernels=AUTO).ops
        self._step = placed.jit_step(make_train_step(placed.model, loss, placed.optimizer, 1, ops))
        self._forward = jax.jit(functools.partial(logits, placed.model, ops=ops))

    def forward(self, batch: Batch) -> jax.Array:
        """logits_B."""
        return jax.block_until_ready(self._forward(self.state, batch))

    def train_step(self, batch: Batch) -> float:
        """One update of everything; returns the loss."""
        self.state, metrics = jax.block_until_ready(self._step(self.state, batch))
        return float(metrics["loss"])

    def tables(self) -> Iterator[np.ndarray]:
        """The tables' weights, in the model's order."""
        return (np.asarray(rows) for _, rows in named_tables(self.model, self.state.tables))

    def dense_weights(self) -> dict[str, list[np.ndarray]]:
        """(in, out) kernels and biases, in order, by MLP."""
        return {
            part: [
                np.asarray(self.state.dense_params[part][f"layer_{i}"][name])
                for i in range(len(self.state.dense_params[part]))
                for name in ("kernel", "bias")
            ]
            for part in ("bottom_mlp", "top_mlp")
        }
