"""Training steps: one after the other, several in one dispatch, or with the next batch's ids exchanged meanwhile."""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import require
from dlrm_jax.data.read.pipeline import Prefetcher
from dlrm_jax.host.memory import held_by
from dlrm_jax.training import step_parts
from dlrm_jax.training.feed import Feed, Traveller, Window
from dlrm_jax.training.histograms import Histograms, make_observed
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.placement import prediction
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.training.state import TrainState
from dlrm_jax.training.step import make_pipelined_step, make_train_step
from dlrm_jax.training.window_step import RECORDED, make_pipelined_window_step, make_window_step

_LOG = logging.getLogger("dlrm_jax")
OBSERVED = "observed"
_COMPILED = {
    "plain": "training step",
    "several": "training step, several at once",
    "pipelined": "training step, with the next batch's exchange",
    "route": "exchange of the first batch's ids",
    OBSERVED: "histograms",
}
_DISPATCH_SECONDS = 1e-3
"""A dispatch should take the device so long: the host needs a tenth of a millisecond for one (an H200 measured)."""

Windows = Prefetcher[Traveller, Window]


class Record(NamedTuple):
    """The metrics of a window's steps, on the device: row i of `values_TxM` is that of step `first_step` + i."""

    first_step: int
    values_TxM: jax.Array
    traveller: Traveller


class Stepper:
    """Takes windows and steps through them, several ahead of the device.

    Pipelined steps give the same bits, several at once the same numbers. `wait_seconds` is how long the device waited
    for input, `host_seconds` how long, at most, it waited for a dispatch. `histograms` are of what it steps through.
    """

    def __init__(
        self, config: RunConfig, placed: Placed, feed: Feed, windows: Windows, histograms: Histograms | None = None
    ) -> None:
        self._windows, self._feed, self._histograms = windows, feed, histograms
        pipelined = config.sharding.pipeline
        require(
            config.steps_per_dispatch < 2 or not pipelined,
            "--steps_per_dispatch and --pipeline_exchange are two ways to run ahead; choose one",
        )
        self.at_once = min(1 if pipelined else steps_at_once(config, placed), feed.cut.steps)
        settings = (placed.model, config.loss, config.optimizer, config.num_micro_batches, placed.ops, config.seed)
        step, shardings = make_train_step(*settings), feed.shardings
        self._pipeline = _Pipeline(placed, make_pipelined_step(*settings), feed) if pipelined else None
        self._plain = placed.jit_window_step(make_window_step(step, feed), shardings)
        self._several = placed.jit_window_step(make_window_step(step, feed, self.at_once), shardings)
        observed = make_observed(config, placed, feed) if histograms else None
        self._observed = observed and placed.jit_observed(observed, shardings)
        empty = functools.partial(jnp.full, (feed.cut.steps, len(RECORDED)), np.nan, jnp.float32)
        self._empty_record = jax.jit(empty, out_shardings=placed.everywhere)
        self._one_by_one = placed.one_by_one
        traced = step_parts.TRACED_OPTIONS.get(jax.default_backend())
        self._compiler_options = traced if config.profile_steps else None
        self._executables: dict[str, Any] = {}
        self._following: tuple[Traveller, Window] | None = None
        self._window: Window | None = None
        self._record: Record | None = None
        self._left = 0
        self._dispatched_at: float | None = None
        self.compile_seconds = self.wait_seconds = self.host_seconds = 0.0

    def __call__(self, state: TrainState, step: int, at_most: int) -> tuple[int, TrainState]:
        """(how many steps were taken, the new state); at least one, and `step` are done. `state` is given away."""
        if not self._left:
            self._enter_next_window(step)
        assert self._record is not None
        # Of what the last dispatch makes; the record may be a new one, in which nothing is noted yet.
        done: Any = state.step
        if self._one_by_one:
            jax.block_until_ready(done)
        idle = self._dispatched_at is not None and not self._one_by_one and done.is_ready()
        if self._histograms is not None and self._histograms.due(step):
            self._observe(self._histograms, state, step)
        count = self.at_once if 1 < self.at_once <= min(at_most, self._left) else 1
        if self._pipeline is not None:
            if self._left == 1:
                self._following = self._taken()
            next_window = self._window if self._following is None else self._following[1]
            arguments: tuple[Any, ...] = (
                self._window,
                self._pipeline.routes_of(self._window, step, self._compiled),
                next_window,
            )
            step_function = ("pipelined", self._pipeline.step)
        else:
            arguments = (self._window,)
            step_function = ("plain", self._plain) if count == 1 else ("several", self._several)
        state, values, *next_routes = self._compiled(*step_function, state, self._record.values_TxM, *arguments)
        if self._pipeline is not None:
            (self._pipeline.routes,) = next_routes
        self._record = self._record._replace(values_TxM=values)
        self._left -= count
        now = time.perf_counter()
        if idle:
            self.host_seconds += now - (self._dispatched_at or now)
        self._dispatched_at = now
        return count, state

    def go_on_with(self, windows: Windows) -> None:
        """Take other windows of the same feed from here on; nothing is compiled anew."""
        self._windows, self._following, self._window, self._record, self._left = windows, None, None, None, 0
        if self._pipeline is not None:
            self._pipeline.routes = None

    @property
    def record(self) -> Record:
        """Of the window that is gone through, from the first step on."""
        assert self._record is not None
        return self._record

    @property
    def at_window_end(self) -> bool:
        """Whether the next step begins another window."""
        return self._left == 0

    def caught_up(self) -> None:
        """All that was dispatched was just waited for: only from here on the device waits for the host."""
        self._dispatched_at = time.perf_counter()

    def pause(self) -> None:
        """What follows, as an evaluation, is no waiting for a dispatch."""
        self._dispatched_at = None

    def _observe(self, histograms: Histograms, state: TrainState, step: int) -> None:
        found = self._compiled(OBSERVED, self._observed, state, self._window)
        histograms.push(step, jax.block_until_ready(found) if self._one_by_one else found)
        self._dispatched_at = None

    def _enter_next_window(self, step: int) -> None:
        traveller, self._window = self._following or self._taken()
        self._following = None
        self._left = self._feed.cut.steps
        self._record = Record(step, self._empty_record(), traveller)

    def _taken(self) -> tuple[Traveller, Window]:
        if not self._windows.is_ready:
            if self._record is not None:
                jax.block_until_ready(self._record.values_TxM)  # From here on the device waits too.
            start = time.perf_counter()
            taken = next(self._windows)
            self.wait_seconds += time.perf_counter() - start
            self._dispatched_at = None
            return taken
        return next(self._windows)

    def _compiled(self, name: str, step: Any, *arguments: Any) -> Any:
        if name not in self._executables:
            start = time.perf_counter()
            _LOG.info("compiling the %s", _COMPILED[name])
            self._executables[name] = step.lower(*arguments).compile(compiler_options=self._compiler_options)
            self.compile_seconds += time.perf_counter() - start
            self._dispatched_at = None
        return self._executables[name](*arguments)

    @property
    def executable(self) -> Any:
        """The step compiled last."""
        return [one for name, one in self._executables.items() if name != OBSERVED][-1]

    def memory_bytes(self) -> int | None:
        """What the largest of the compiled steps holds on a device, by XLA's account; None before the first step."""
        return max(map(held_by, self._executables.values()), default=None)


def steps_at_once(config: RunConfig, placed: Placed) -> int:
    """Steps of a dispatch: what `--steps_per_dispatch` says, or as many as are predicted to take a millisecond."""
    if config.steps_per_dispatch:
        return config.steps_per_dispatch
    if jax.default_backend() == "cpu":  # Its dispatches are as short as its threads' waits for each other.
        return 1
    return max(1, round(_DISPATCH_SECONDS / prediction(config, placed).step_seconds))


class _Pipeline:
    """The two-stage loop: the batch whose routes are known, and the one after it."""

    def __init__(self, placed: Placed, step: Any, feed: Feed) -> None:
        self.step = placed.jit_pipelined_step(make_pipelined_window_step(step, feed), feed.shardings)
        self._route = placed.jit_route(feed.batch, feed.shardings)
        self.routes: Any = None

    def routes_of(self, window: Any, step: int, compiled: Callable[..., Any]) -> Any:
        """The routes of a step's batch, which the step before it found out; `compiled` runs and keeps time."""
        return compiled("route", self._route, window, np.int32(step)) if self.routes is None else self.routes
