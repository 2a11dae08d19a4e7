"""Metrics and predictions of a state on the splits of a dataset."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dlrm_jax.data.batch import Batch
from dlrm_jax.data.read.dataset import BatchExpander, Dataset, Rows
from dlrm_jax.data.read.pipeline import Prefetcher, eval_batches, padded, process_shard
from dlrm_jax.data.schema.schema import HELD_OUT
from dlrm_jax.model import metrics
from dlrm_jax.training import reporting
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.training.state import TrainState
from dlrm_jax.training.step import make_eval_step


class Evaluator:
    """Metrics and predictions of a state on a split; compiles once."""

    def __init__(self, config: RunConfig, placed: Placed, expander: BatchExpander | None = None) -> None:
        self._config, self._placed, self._expander = config, placed, expander
        # Every process gets all rows' scores, which ranking needs.
        self._step = jax.jit(make_eval_step(placed.model, config.loss, placed.ops), out_shardings=placed.everywhere)

    def __call__(self, state: TrainState, split: Rows) -> dict[str, Any]:
        """The evaluation metrics of `state` on every row of `split`."""
        collected = metrics.Metrics()
        for _, sums in self._run(state, split):
            collected.append(sums)
        return collected.compute()

    def predict(self, state: TrainState, split: Rows) -> np.ndarray:
        """The probability of each row of `split`, in its order."""
        parts = [np.asarray(sums.prob_B) for _, sums in self._run(state, split)]
        return np.concatenate([np.zeros(0, np.float32), *parts])[: len(split)]  # The rest pads the last batch.

    def _run(self, state: TrainState, split: Rows) -> Iterator[tuple[Batch, metrics.BatchSums]]:
        devices = self._placed.num_devices
        batch_size = padded(min(self._config.eval_batch_size, max(len(split), 1)), devices)
        source = eval_batches(split, batch_size, process_shard())
        with Prefetcher(source, expander=self._expander, put=self._placed.put) as batches:
            for host_batch, batch in batches:
                yield host_batch, self._step(state, batch)


def evaluate_splits(config: RunConfig, dataset: Dataset, evaluate: Evaluator, state: TrainState) -> dict[str, Any]:
    """`step`, metrics on val and test (None for an empty split), the optimum where known, seed and versions."""
    result: dict[str, Any] = {"step": int(state.step)}
    for name in HELD_OUT:
        result[name] = evaluate(state, dataset.splits[name]) if len(dataset.splits[name]) else None
    if dataset.optimum is not None:
        result["optimum"] = dict(dataset.optimum["test"])
    return result | {"seed": config.seed, "versions": reporting.versions()}
