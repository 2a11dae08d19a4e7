"""Metrics and predictions of a state on the splits of a dataset."""

from collections.abc import Callable
from typing import Any

import jax

from dlrm_jax.data.batch import Batch
from dlrm_jax.data.read.dataset import Dataset, Rows
from dlrm_jax.data.read.pipeline import Cut, process_shard, steps_per_epoch
from dlrm_jax.data.schema.schema import HELD_OUT
from dlrm_jax.model import metrics
from dlrm_jax.training import reporting
from dlrm_jax.training.feed import Feed, Room, make_feed
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.training.state import TrainState
from dlrm_jax.training.step import make_eval_step


class Evaluator:
    """Metrics and predictions of a state on a dataset's splits; compiles once. With `room` rows may stay on devices."""

    def __init__(self, config: RunConfig, placed: Placed, dataset: Dataset, room: Room | None = None) -> None:
        self._config, self._placed, self._dataset, self._room = config, placed, dataset, room
        self._feeds: dict[int, Feed] = {}
        # Every process gets all rows' scores, which ranking needs.
        self._step = jax.jit(make_eval_step(placed.model, config.loss, placed.ops), out_shardings=placed.everywhere)

    def __call__(self, state: TrainState, split: Rows) -> dict[str, Any]:
        """The evaluation metrics of `state` on every row of `split`."""
        return self.score(state, split).compute()

    def score(self, state: TrainState, split: Rows) -> metrics.Metrics:
        """What evaluating every row of `split` gives: the metrics, and each row's score."""
        wait = jax.block_until_ready if self._placed.one_by_one else lambda sums: sums
        return score_rows(self._feed(split), lambda batch: wait(self._step(state, batch)))

    def forget(self, split: Rows) -> None:
        """Let go of a split that is not scored again."""
        self._feeds.pop(id(split), None)

    def _feed(self, split: Rows) -> Feed:
        if id(split) not in self._feeds:
            rows = min(self._config.eval_batch_size, max(len(split), 1))
            cut = Cut(rows, multiple=self._placed.num_devices, shard=process_shard())
            steps = max(1, steps_per_epoch(len(split), rows))
            self._feeds[id(split)] = make_feed(self._placed, self._dataset, split, cut, self._room, steps)
        return self._feeds[id(split)]


def score_rows(feed: Feed, score: Callable[[Batch], metrics.BatchSums]) -> metrics.Metrics:
    """Every row of a feed, in its order, through `score`: the one way in which rows become metrics.

    Training, `evaluate` and the check of an export call it, each with its own forward pass.
    """
    collected, cut = metrics.Metrics(), jax.jit(feed.batch)
    with feed.eval_windows() as windows:
        for step in range(feed.steps_per_epoch):
            if step % feed.cut.steps == 0:
                _, window = next(windows)
            collected.append(score(cut(window, step)))
    return collected


def evaluate_splits(config: RunConfig, dataset: Dataset, evaluate: Evaluator, state: TrainState) -> dict[str, Any]:
    """`step`, metrics on val and test (None for an empty split), the optimum where known, seed and versions."""
    result: dict[str, Any] = {"step": int(state.step)}
    for name in HELD_OUT:
        result[name] = evaluate(state, dataset.splits[name]) if len(dataset.splits[name]) else None
    if dataset.optimum is not None:
        result["optimum"] = dict(dataset.optimum["test"])
    return result | {"seed": config.seed, "versions": reporting.versions()}
