"""Requests of a few rows become batches: whoever waits while one batch is computed shares the next.

A batch waits at most `max_delay` seconds for company, and only for what is not yet full. Requests are never mixed
across weights: each was checked against those that score it, or what deltas have made into them. Whoever would wait too
long is refused at once, so that those who are served keep their latency, whatever is asked.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from dlrm_jax.serving.artifact.errors import Busy, TooLate
from dlrm_jax.serving.artifact.loaded import Scores, Servable
from dlrm_jax.serving.http.telemetry import Telemetry, log

T = TypeVar("T")
_SWEEP_SECONDS = 0.02
_PULSE_SECONDS = 0.005


@dataclasses.dataclass
class _Waiting:
    servable: Servable
    dense: np.ndarray
    ids: np.ndarray
    done: asyncio.Future[Scores]
    since: float
    deadline: float


class Batcher:
    """The queue before a model, and the one thread that runs it."""

    def __init__(
        self, telemetry: Telemetry, max_batch: int, max_delay: float, max_queued_rows: int, max_wait: float = math.inf
    ) -> None:
        self._telemetry, self._max_batch, self._max_delay = telemetry, max_batch, max_delay
        self._max_queued, self._max_wait = max_queued_rows, max_wait
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._running: list[_Waiting] = []
        self._queued_rows = 0
        self._arrived = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="score")
        self._running_since = 0.0
        self._seconds_of: dict[int, float] = {}
        """Moving average by batch size, as the exponent of the next power of two."""
        self._tasks: list[asyncio.Task[None]] = []
        self._lag = 0.0
        """Seconds by which the event loop came late to its last pulse: what it reads now may have waited as long."""
        self._pulse: asyncio.TimerHandle | None = None
        self._announced = 0
        """Requests admitted by their heads in this turn of the event loop; their rows come before its next turn."""
        self._rows_of_request = 1.0
        """Moving average."""

    def start(self) -> None:
        """Begin to work, in the running event loop."""
        self._beat(time.monotonic())
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._sweep())]

    async def stop(self) -> None:
        """End; what still waits is told so."""
        if self._pulse is not None:
            self._pulse.cancel()
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for waiting in self._queue:
            if not waiting.done.done():
                waiting.done.set_exception(Busy("the server is stopping", 1.0))
        self._thread.shutdown()

    @property
    def queued_rows(self) -> int:
        """Rows that wait."""
        return self._queued_rows

    def admit(self, rows: int = 1, waited: float = 0.0) -> None:
        """Busy if so many rows more are too many, or would wait too long; `waited` seconds are over since it was read.

        A request larger than the whole queue may come when it is empty.
        """
        self._check(rows, self.expected_wait(), waited)

    def announce(self) -> None:
        """`admit` for a request of which only the head was read: Busy, or it is taken to be like those before.

        Heads that come together are all read before any of them reaches the queue, so each counts those before it.
        """
        self._check(1, self.expected_wait(round(self._announced * self._rows_of_request)), 0.0)
        if not self._announced:
            asyncio.get_running_loop().call_soon(self._forget_announced)
        self._announced += 1

    def _forget_announced(self) -> None:
        self._announced = 0

    def _check(self, rows: int, wait: float, waited: float) -> None:
        waited += self._lag
        if self._queued_rows and self._queued_rows + rows > self._max_queued:
            raise Busy(f"{self._queued_rows} rows wait already; at most {self._max_queued}", max(wait, 0.05))
        if waited + wait > self._max_wait:
            waits = f"{(waited + wait) * 1e3:.0f} ms, more than {self._max_wait * 1e3:g}"
            raise Busy(f"the server is busy: this request would wait {waits}", max(wait, 0.05))

    def expected_wait(self, more_rows: int = 0) -> float:
        """Seconds that what is there already takes: the running batch's rest, and all that waits with `more_rows`."""
        left = 0.0
        if self._running:
            rows = sum(len(waiting.dense) for waiting in self._running)
            left = max(0.0, self._expected_seconds(rows) - (time.monotonic() - self._running_since))
        full, rest = divmod(self._queued_rows + more_rows, self._max_batch)
        return left + full * self._expected_seconds(self._max_batch) + self._expected_seconds(rest)

    def _beat(self, due: float) -> None:
        now = time.monotonic()
        self._lag = max(0.0, now - due)  # The loop's timers may be a little early.
        due = now + _PULSE_SECONDS
        self._pulse = asyncio.get_running_loop().call_later(_PULSE_SECONDS, self._beat, due)

    def _expected_seconds(self, rows: int) -> float:
        """Of a batch; 0 before one of its size was seen."""
        return self._seconds_of.get((rows - 1).bit_length(), 0.0) if rows else 0.0

    async def between(self, work: Callable[[], T]) -> T:
        """What `work` gives, done between two batches; what is asked meanwhile waits."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def score(self, servable: Servable, dense: np.ndarray, ids: np.ndarray, deadline: float) -> Scores:
        """Scores of checked rows; Busy at once if the queue is full, TooLate at `deadline` (time.monotonic())."""
        self.admit(len(dense))
        self._rows_of_request += 0.05 * (len(dense) - self._rows_of_request)
        waiting = _Waiting(servable, dense, ids, asyncio.get_running_loop().create_future(), time.monotonic(), deadline)
        self._queue.append(waiting)
        self._queued_rows += len(dense)
        self._arrived.set()
        return await waiting.done

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wait_for_company()
            batch = self._take()
            if not batch:
                continue
            start = time.monotonic()
            self._running, self._running_since = batch, start
            scores: Sequence[Scores | Exception]
            try:
                scores = await loop.run_in_executor(self._thread, _run, batch)
            except Exception as error:
                # Nothing is known that raises here; a server must answer all the same, and go on.
                log("batch_failed", level=40, error=repr(error))
                scores = [error] * len(batch)
            seconds, rows = time.monotonic() - start, sum(len(waiting.dense) for waiting in batch)
            self._running = []
            size = (rows - 1).bit_length()
            self._seconds_of[size] = 0.9 * self._seconds_of.get(size, seconds) + 0.1 * seconds
            self._telemetry.batch(rows, scores[0].version if isinstance(scores[0], Scores) else 0)
            for waiting, score in zip(batch, scores, strict=True):
                self._telemetry.stage("queue", start - waiting.since)
                self._telemetry.stage("compute", seconds)
                if waiting.done.done():
                    continue  # Its time ran out, or its client is gone.
                if isinstance(score, Exception):
                    waiting.done.set_exception(score)
                else:
                    waiting.done.set_result(score)

    async def _wait_for_company(self) -> None:
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()
        until = self._queue[0].since + self._max_delay
        while self._queued_rows < self._max_batch and (left := until - time.monotonic()) > 0:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._arrived.wait()

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        rows = 0
        while self._queue:
            first = self._queue[0]
            fits = not batch or (
                rows + len(first.dense) <= self._max_batch and first.servable.weights is batch[0].servable.weights
            )
            if not fits:
                break
            self._queue.popleft()
            self._queued_rows -= len(first.dense)
            if not first.done.done():
                batch.append(first)
                rows += len(first.dense)
        self._telemetry.queued_rows.set(self._queued_rows)
        return batch

    async def _sweep(self) -> None:
        """Tell those whose time ran out, wherever they are."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            now = time.monotonic()
            for waiting in (*self._queue, *self._running):
                if waiting.deadline <= now and not waiting.done.done():
                    waiting.done.set_exception(TooLate(f"not scored within {now - waiting.since:.3f} s"))


def _run(batch: list[_Waiting]) -> list[Scores]:
    """One execution for all, cut apart again; in the thread."""
    if len(batch) == 1:
        return [batch[0].servable.score(batch[0].dense, batch[0].ids)]
    dense = np.concatenate([waiting.dense for waiting in batch])
    ids = np.concatenate([waiting.ids for waiting in batch])
    scores = batch[0].servable.score(dense, ids)
    out, start = [], 0
    for waiting in batch:
        stop = start + len(waiting.dense)
        out.append(Scores(scores.probability[start:stop], scores.logit[start:stop], scores.version))
        start = stop
    return out
