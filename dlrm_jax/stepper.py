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
        self._executable: Any = None

    def __call__(self, state: TrainState) -> tuple[Batch, TrainState, dict[str, Any]]:
        """(the batch as it was on the host, the new state, its metrics); `state`'s arrays are given away."""
        if not self._pipelined:
            host_batch, batch = next(self._batches)
            return host_batch, *self._compiled(state, batch)(state, batch)
        if self._ahead is None:
            host_batch, batch = next(self._batches)
            self._ahead = host_batch, batch, self._route(batch)
        host_batch, batch, routes = self._ahead
        next_host_batch, next_batch = next(self._batches)
        arguments = (state, batch, routes, next_batch)
        state, step_metrics, next_routes = self._compiled(*arguments)(*arguments)
        self._ahead = next_host_batch, next_batch, next_routes
        return host_batch, state, step_metrics

    def _compiled(self, *arguments: Any) -> Any:
        if self._executable is None:
            self._executable = self._step.lower(*arguments).compile()
        return self._executable

    def memory_bytes(self) -> int | None:
        """What the compiled step holds on a device, by XLA's account; None before the first step."""
        if self._executable is None:
            return None
        memory = self._executable.memory_analysis()
        not_aliased = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes + not_aliased
