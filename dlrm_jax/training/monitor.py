"""What a training loop watches: losses, time, signals."""

import dataclasses
import logging
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import numpy as np

from dlrm_jax.config import ConfigError
from dlrm_jax.data.batch import Batch, describe_nonfinite
from dlrm_jax.tables.exchange import OVERFLOWS
from dlrm_jax.training.feed import Traveller
from dlrm_jax.training.stepper import Record

_LOG = logging.getLogger("dlrm_jax")


class Losses:
    """Metrics of the steps, which gather on the device: read a window late, and where the run waits in any case.

    Lines of the log are written as they are read, by `write(step, values)`, one every `log_every` steps. `trace` gives
    this process's part of a batch of what travelled. `carried` is what an earlier process held where this one goes on.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        dense_names: tuple[str, ...],
        carried: Mapping[str, Any],
        log_every: int,
        write: Callable[[int, dict[str, Any]], None],
        trace: Callable[[Traveller, int], Batch],
    ) -> None:
        self._workdir, self._dense_names = workdir, dense_names
        self._log_every, self._write, self._trace = log_every, write, trace
        self._pending: Record | None = None
        self._sum, self._steps = carried.get("sum", 0.0), carried.get("steps", 0)
        self._read_until = 0
        self.last = float("nan")
        self.overflows: int | None = carried.get(OVERFLOWS)
        """Steps so far whose exchange took further rounds; None where there is no such exchange."""
        self.last_read = time.perf_counter()

    def held(self) -> dict[str, Any]:
        """What one that goes on from here must know, as JSON values; nothing may be left to read."""
        return {"sum": self._sum, "steps": self._steps, OVERFLOWS: self.overflows}

    def push(self, record: Record, step: int) -> None:
        """Note the record of a window that is gone through, `step` steps being done, and read that of the one before.

        So the host is two windows ahead of the device, at most.
        """
        previous, self._pending = self._pending, record
        record.values_TxM.copy_to_host_async()
        if previous is not None:
            self._read(previous, min(step, record.first_step))

    def flush(self, record: Record, step: int) -> None:
        """Read all that was recorded until `step`; after this the state is known to be finite."""
        previous, self._pending = self._pending, None
        if previous is not None:
            self._read(previous, min(step, previous.first_step + len(previous.values_TxM)))
        self._read(record, step)

    def _read(self, record: Record, until: int) -> None:
        # A copy: on a CPU it would else be a view of memory that the next step is given.
        values_TxM = np.array(record.values_TxM.addressable_data(0))
        for step in range(max(record.first_step, self._read_until), until):
            loss, rate, finite, overflows = map(float, values_TxM[step - record.first_step])
            if not finite:
                self._stop(step + 1, self._trace(record.traveller, step - record.first_step), loss)
            if overflows == overflows:
                self.overflows = (self.overflows or 0) + int(overflows > 0)
            self._sum, self._steps, self.last = self._sum + loss, self._steps + 1, loss
            if (step + 1) % self._log_every == 0:
                rounds = {} if self.overflows is None else {OVERFLOWS: self.overflows}
                self._write(step + 1, {"loss": self._sum / self._steps, "learning_rate": rate} | rounds)
                self._sum, self._steps = 0.0, 0
        self._read_until, self.last_read = max(until, self._read_until), time.perf_counter()

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
    host_seconds: float = 0.0

    def summary(self) -> dict[str, float | None]:
        """samples_per_second, and the shares of step time that the device waited for input and for the host's dispatch.

        None before any timed step.
        """
        if not self.seconds:
            return dict.fromkeys(SPEED)
        shares = (min(1.0, seconds / self.seconds) for seconds in (self.wait_seconds, self.host_seconds))
        return dict(zip(SPEED, (self.samples / self.seconds, *shares), strict=True))


WAITS = ("input_wait_fraction", "host_wait_fraction")
SPEED = ("samples_per_second", *WAITS)


class Waits(Protocol):
    """Seconds so far, as Stepper has them."""

    compile_seconds: float
    wait_seconds: float
    host_seconds: float


class Clock:
    """Adds the time between `resume` and `lap` to a Speed; the first lap counts nothing, and no compilation does."""

    def __init__(self, waits: Waits, batch_size: int) -> None:
        self._waits, self._batch_size = waits, batch_size
        self.just_started = True
        self._running = False
        self._start, self._start_step = 0.0, 0
        self._compiled = self._waited = self._hosted = 0.0

    def lap(self, speed: Speed, step: int) -> None:
        """Book the steps since the last lap; the caller has just waited for them."""
        if self._running:
            speed.samples, speed.seconds = self._so_far(speed, step)
            speed.wait_seconds += self._waits.wait_seconds - self._waited
            speed.host_seconds += self._waits.host_seconds - self._hosted
        self._running, self._start_step, self.just_started = False, step, False

    def resume(self) -> None:
        """Start counting again, if a lap stopped it."""
        if not self._running and not self.just_started:
            self._running, self._start = True, time.perf_counter()
            waits = self._waits
            self._compiled, self._waited, self._hosted = waits.compile_seconds, waits.wait_seconds, waits.host_seconds

    def rate(self, speed: Speed, step: int) -> float | None:
        """Samples a second, of what is booked and of the steps since; None before any timed step."""
        samples, seconds = self._so_far(speed, step) if self._running else (speed.samples, speed.seconds)
        return samples / seconds if samples and seconds > 0 else None

    def waits(self, speed: Speed) -> dict[str, float | None]:
        """The shares of the time that the device waited for input and for the host; None before any timed step."""
        if not self._running:
            return {name: speed.summary()[name] for name in WAITS}
        _, seconds = self._so_far(speed, self._start_step)
        waited = (
            speed.wait_seconds + self._waits.wait_seconds - self._waited,
            speed.host_seconds + self._waits.host_seconds - self._hosted,
        )
        return {name: min(1.0, wait / seconds) for name, wait in zip(WAITS, waited, strict=True)}

    def _so_far(self, speed: Speed, step: int) -> tuple[int, float]:
        """(samples, seconds), with the lap that is running."""
        compiling = self._waits.compile_seconds - self._compiled
        seconds = speed.seconds + time.perf_counter() - self._start - compiling
        return speed.samples + (step - self._start_step) * self._batch_size, seconds


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}; run the same command to go on")
        self.signum = signum


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list that receives the first SIGTERM or SIGINT; the second one acts as usual, so that a user can insist.

    Only a process' main thread hears signals; in another one the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
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
