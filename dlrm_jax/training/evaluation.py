"""Metrics and predictions of a state on the splits of a dataset."""

from collections.abc import Callable
from typing import Any

import jax

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
        return self.score(state, split).compute()

    def score(self, state: TrainState, split: Rows) -> metrics.Metrics:
        """What evaluating every row of `split` gives: the metrics, and each row's score."""
        batch_size = padded(min(self._config.eval_batch_size, max(len(split), 1)), self._placed.num_devices)

        def score(batch: Batch) -> metrics.BatchSums:
            return self._step(state, batch)

        return score_rows(split, batch_size, score, self._expander, self._placed.put)


def score_rows(
    split: Rows,
    batch_size: int,
    score: Callable[[Batch], metrics.BatchSums],
    expander: BatchExpander | None = None,
    put: Callable[[Batch], Batch] = jax.device_put,
) -> metrics.Metrics:
    """Every row of `split`, in its order, through `score`: the one way in which rows become metrics.

    Training, `evaluate` and the check of an export call it, each with its own forward pass.
    """
    collected = metrics.Metrics()
    source = eval_batches(split, batch_size, process_shard())
    with Prefetcher(source, expander=expander, put=put) as batches:
        for _, batch in batches:
            collected.append(score(batch))
    return collected


def evaluate_splits(config: RunConfig, dataset: Dataset, evaluate: Evaluator, state: TrainState) -> dict[str, Any]:
    """`step`, metrics on val and test (None for an empty split), the optimum where known, seed and versions."""
    result: dict[str, Any] = {"step": int(state.step)}
    for name in HELD_OUT:
        result[name] = evaluate(state, dataset.splits[name]) if len(dataset.splits[name]) else None
    if dataset.optimum is not None:
        result["optimum"] = dict(dataset.optimum["test"])
    return result | {"seed": config.seed, "versions": reporting.versions()}
