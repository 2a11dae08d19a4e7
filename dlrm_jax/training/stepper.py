"""Training steps: one after the other, several in one dispatch, or with the next batch's ids exchanged meanwhile."""

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from dlrm_jax.config import require
from dlrm_jax.data.batch import Batch
from dlrm_jax.host.memory import held_by
from dlrm_jax.training.monitor import Taken
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.training.state import TrainState
from dlrm_jax.training.step import make_pipelined_step, make_scanned_step, make_train_step

_LOG = logging.getLogger("dlrm_jax")
_COMPILED = {
    "plain": "training step",
    "scanned": "training step, several at once",
    "pipelined": "training step, with the next batch's exchange",
    "route": "exchange of the first batch's ids",
}


class Stepper:
    """Takes batches from `batches`, pairs of one on the host and the same on the devices, and steps.

    Pipelined steps give the same bits, several at once the same numbers.
    """

    def __init__(self, config: RunConfig, placed: Placed, batches: Iterator[tuple[Batch, Batch]]) -> None:
        self._batches = batches
        self._at_once = config.steps_per_dispatch
        together = self._at_once > 1 and config.sharding.pipeline
        require(not together, "--steps_per_dispatch and --pipeline_exchange are two ways to run ahead; choose one")
        settings = (placed.model, config.loss, config.optimizer, config.num_micro_batches, placed.ops, config.seed)
        self._pipeline = _Pipeline(placed, make_pipelined_step(*settings)) if config.sharding.pipeline else None
        step = make_train_step(*settings)
        self._step = placed.jit_step(step)
        self._steps = placed.jit_step(make_scanned_step(step))
        self._executables: dict[str, Any] = {}
        self.compile_seconds = 0.0

    def __call__(self, state: TrainState, at_most: int) -> tuple[Taken, TrainState]:
        """(what was done, the new state) of at least one step; `state`'s arrays are given away."""
        if self._pipeline is not None:
            host_batch, arguments = self._pipeline.arguments(self._batches, self._compiled)
            state, step_metrics, routes = self._compiled("pipelined", self._pipeline.step, state, *arguments)
            self._pipeline.routes = routes
            return [(host_batch, step_metrics)], state
        if 1 < self._at_once <= at_most:
            host_batches, batches = zip(*(next(self._batches) for _ in range(self._at_once)), strict=True)
            state, all_metrics = self._compiled("scanned", self._steps, state, list(batches))
            return list(zip(host_batches, all_metrics, strict=True)), state
        host_batch, batch = next(self._batches)
        state, step_metrics = self._compiled("plain", self._step, state, batch)
        return [(host_batch, step_metrics)], state

    def _compiled(self, name: str, step: Any, *arguments: Any) -> Any:
        if name not in self._executables:
            start = time.perf_counter()
            _LOG.info("compiling the %s", _COMPILED[name])
            self._executables[name] = step.lower(*arguments).compile()
            self.compile_seconds += time.perf_counter() - start
        return self._executables[name](*arguments)

    @property
    def executable(self) -> Any:
        """The step compiled last."""
        return list(self._executables.values())[-1]

    def memory_bytes(self) -> int | None:
        """What the largest of the compiled steps holds on a device, by XLA's account; None before the first step."""
        return max(map(held_by, self._executables.values()), default=None)


class _Pipeline:
    """The two-stage loop: the batch whose routes are known, and the one after it."""

    def __init__(self, placed: Placed, step: Any) -> None:
        self.step, self._route = placed.jit_pipelined_step(step), placed.jit_route()
        self._ahead: tuple[Batch, Batch] | None = None
        self.routes: Any = None

    def arguments(
        self, batches: Iterator[tuple[Batch, Batch]], compiled: Callable[..., Any]
    ) -> tuple[Batch, tuple[Any, ...]]:
        """(the batch as it was on the host, what the step takes besides the state); `compiled` runs and keeps time."""
        if self._ahead is None:
            self._ahead = next(batches)
            self.routes = compiled("route", self._route, self._ahead[1])
        host_batch, batch = self._ahead
        self._ahead = next(batches)
        return host_batch, (batch, self.routes, self._ahead[1])
