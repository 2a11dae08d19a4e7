"""What a training loop watches: losses, time, signals."""

import dataclasses
import logging
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
import numpy as np

from dlrm_jax.config import ConfigError
from dlrm_jax.data.batch import Batch, describe_nonfinite
from dlrm_jax.data.read.pipeline import Prefetcher

_LOG = logging.getLogger("dlrm_jax")
EXCHANGE_OVERFLOWS = "exchange_overflows"


Taken = list[tuple[Batch, dict[str, jax.Array]]]
"""Of each step of a dispatch, the batch as it was on the host, and the metrics."""


class LossWindow:
    """Losses of the last steps. Each is read one dispatch late, so that the device never waits for the host.

    `carried` is what the window of an earlier process held where this one goes on (`held`).
    """

    def __init__(self, workdir: pathlib.Path, dense_names: tuple[str, ...], carried: Mapping[str, Any]) -> None:
        self._workdir, self._dense_names = workdir, dense_names
        self._pending: tuple[int, Taken] = (0, [])
        self._sum, self._steps = carried.get("sum", 0.0), carried.get("steps", 0)
        self.last = float("nan")
        self.overflows: int | None = carried.get(EXCHANGE_OVERFLOWS)
        """Steps so far whose exchange took further rounds; None where there is no such exchange."""

    def held(self) -> dict[str, Any]:
        """What a window that goes on from here must know, as JSON values; nothing may be left to flush."""
        return {"sum": self._sum, "steps": self._steps, EXCHANGE_OVERFLOWS: self.overflows}

    def push(self, step: int, taken: Taken) -> None:
        """Note a dispatch whose first step was `step`, and read the one before it."""
        previous, self._pending = self._pending, (step, taken)
        self._read(*previous)

    def flush(self) -> None:
        """Read the last dispatch too; after this the state is known to be finite."""
        self.push(0, [])

    def mean(self) -> float:
        """The mean loss since the last call."""
        mean = self._sum / self._steps if self._steps else float("nan")
        self._sum, self._steps = 0.0, 0
        return mean

    def _read(self, first_step: int, taken: Taken) -> None:
        for step, (batch, step_metrics) in enumerate(taken, first_step):
            loss = float(step_metrics["loss"])
            if not bool(step_metrics["finite"]):
                self._stop(step, batch, loss)
            if EXCHANGE_OVERFLOWS in step_metrics:
                self.overflows = (self.overflows or 0) + int(step_metrics[EXCHANGE_OVERFLOWS] > 0)
            self._sum, self._steps = self._sum + loss, self._steps + 1
            self.last = loss

    def _stop(self, step: int, batch: Batch, loss: float) -> None:
        path = self._workdir / f"bad_batch_step_{step}.npz"
        columns = {name: value for name, value in vars(batch).items() if value is not None}
        np.savez(path, **columns)
        reason = describe_nonfinite(batch, self._dense_names)
        raise ConfigError(
            f"loss {loss} or its gradient is not finite at step {step}: {reason}. "
            f"The batch is in {path}; the last checkpoint before it is kept"
        )


@dataclasses.dataclass
class Speed:
    """Time spent in training steps, without compilation, evaluation and checkpoints."""

    samples: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0

    def summary(self) -> dict[str, float | None]:
        """samples_per_second and the share of step time spent waiting for input; None before any timed step."""
        if not self.seconds:
            return {"samples_per_second": None, "input_wait_fraction": None}
        return {
            "samples_per_second": self.samples / self.seconds,
            "input_wait_fraction": min(1.0, self.wait_seconds / self.seconds),
        }


class Clock:
    """Adds the time between `resume` and `lap` to a Speed; the first lap counts nothing, and no compilation does.

    `compile_seconds` tells how long the run has compiled steps so far.
    """

    def __init__(self, batches: Prefetcher, batch_size: int, compile_seconds: Callable[[], float]) -> None:
        self._batches, self._batch_size, self._compile_seconds = batches, batch_size, compile_seconds
        self.just_started = True
        self._running = False
        self._start, self._start_step, self._start_wait, self._start_compile = 0.0, 0, 0.0, 0.0

    def lap(self, speed: Speed, step: int) -> None:
        """Book the steps since the last lap; the caller has just waited for them."""
        if self._running:
            speed.samples, speed.seconds = self._so_far(speed, step)
            speed.wait_seconds += self._batches.wait_seconds - self._start_wait
        self._running, self._start_step, self.just_started = False, step, False

    def resume(self) -> None:
        """Start counting again, if a lap stopped it."""
        if not self._running and not self.just_started:
            self._running = True
            self._start, self._start_wait = time.perf_counter(), self._batches.wait_seconds
            self._start_compile = self._compile_seconds()

    def rate(self, speed: Speed, step: int) -> float | None:
        """Samples a second, of what is booked and of the steps since; None before any timed step."""
        samples, seconds = self._so_far(speed, step) if self._running else (speed.samples, speed.seconds)
        return samples / seconds if samples and seconds > 0 else None

    def _so_far(self, speed: Speed, step: int) -> tuple[int, float]:
        """(samples, seconds), with the lap that is running."""
        compiling = self._compile_seconds() - self._start_compile
        seconds = speed.seconds + time.perf_counter() - self._start - compiling
        return speed.samples + (step - self._start_step) * self._batch_size, seconds


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}; run the same command to go on")
        self.signum = signum


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list that receives the first SIGTERM or SIGINT; the second one acts as usual, so that a user can insist."""
    received: list[int] = []
    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def handle(signum: int, frame: FrameType | None) -> None:
        del frame
        received.append(signum)
        restore()
        _LOG.warning("%s: saving a checkpoint after this step", signal.Signals(signum).name)

    for signum in previous:
        signal.signal(signum, handle)
    try:
        yield received
    finally:
        restore()
