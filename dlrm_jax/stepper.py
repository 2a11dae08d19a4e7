"""One training step after the other: plain, or with the next batch's ids exchanged during this batch's compute."""

from typing import Any

from dlrm_jax.batch import Batch
from dlrm_jax.data.pipeline import Prefetcher
from dlrm_jax.run_config import RunConfig
from dlrm_jax.sharding.placed import Placed
from dlrm_jax.state import TrainState
from dlrm_jax.step import make_pipelined_step, make_train_step


class Stepper:
    """Takes batches from `batches` and steps; the two ways give the same bits."""

    def __init__(self, config: RunConfig, placed: Placed, batches: Prefetcher) -> None:
        self._batches = batches
        self._pipelined = config.sharding.pipeline
        settings = (placed.model, config.loss, config.optimizer, config.num_micro_batches, placed.ops)
        if self._pipelined:
            self._step: Any = placed.jit_pipelined_step(make_pipelined_step(*settings))
            self._route = placed.jit_route()
        else:
            self._step = placed.jit_step(make_train_step(*settings))
        self._ahead: tuple[Batch, Batch, Any] | None = None

    def __call__(self, state: TrainState) -> tuple[Batch, TrainState, dict[str, Any]]:
        """(the batch as it was on the host, the new state, its metrics); `state`'s arrays are given away."""
        if not self._pipelined:
            host_batch, batch = next(self._batches)
            return host_batch, *self._step(state, batch)
        if self._ahead is None:
            host_batch, batch = next(self._batches)
            self._ahead = host_batch, batch, self._route(batch)
        host_batch, batch, routes = self._ahead
        next_host_batch, next_batch = next(self._batches)
        state, step_metrics, next_routes = self._step(state, batch, routes, next_batch)
        self._ahead = next_host_batch, next_batch, next_routes
        return host_batch, state, step_metrics
