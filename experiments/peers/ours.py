"""Our own step, as a run compiles it."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np

from dlrm_jax.config import LossConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.host.formulations import AUTO, NATIVE
from dlrm_jax.host.native_code import has_compiler
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.step import logits, make_train_step


class Ours:
    """Our own step as a run compiles it, by each of `kernels`, which work on one state."""

    def __init__(self, placed: Placed, loss: LossConfig, seed: int) -> None:
        self.model, self.state = placed.model, placed.init_state(seed)
        self.kernels = (AUTO, NATIVE) if has_compiler() and jax.default_backend() == "cpu" else (AUTO,)
        self._steps, self._forwards = {}, {}
        for kernels in self.kernels:
            ops = dataclasses.replace(placed, kernels=kernels).ops
            step = make_train_step(placed.model, loss, placed.optimizer, 1, ops)
            self._steps[kernels] = placed.jit_step(step)
            self._forwards[kernels] = jax.jit(functools.partial(logits, placed.model, ops=ops))

    def forward(self, batch: Batch, kernels: str = AUTO) -> jax.Array:
        """logits_B."""
        return jax.block_until_ready(self._forwards[kernels](self.state, batch))

    def train_step(self, batch: Batch, kernels: str = AUTO) -> float:
        """One update of everything; returns the loss."""
        self.state, metrics = jax.block_until_ready(self._steps[kernels](self.state, batch))
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
