"""Versions that a training publishes (`--publish`): when, and of which rows.

A version is whole every so manyth time, after one that could not be written, and each time where a step moves every row
(`--table_update=all`). Between them it has the rows that batches named since the last one. Nobody marked what changed
before this process began: its first version is compared with the newest one there, row by row, and is whole where a
delta cannot say what is other. Writing never ends a training: what fails is told, and the next one is whole.

Of several processes the first one writes; all mark, and all come here at the same steps.
"""

import concurrent.futures
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from dlrm_jax.config import ConfigError, require
from dlrm_jax.config.learning import ALL_ROWS
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.host import processes
from dlrm_jax.training.feed import Feed
from dlrm_jax.training.live import reading
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.training.state import TrainState
from dlrm_jax.training.stepper import Record
from dlrm_jax.training.touched import Touched

_LOG = logging.getLogger("dlrm_jax")


class Publisher(Protocol):
    """Writes versions; training itself knows none. ConfigError or OSError where one cannot be written."""

    def follow(self) -> int:
        """Go on behind the newest version there: how many deltas are in its chain, -1 where none can be followed."""

    def has(self, state: TrainState) -> bool:
        """Whether the newest version is this state, to the bit."""

    def whole(self, state: TrainState, facts: dict[str, Any]) -> Any:
        """Write all of a state."""

    def compared(self, state: TrainState, facts: dict[str, Any]) -> bool:
        """Write what is other in a state than in the newest version, whoever changed it; False where no delta can."""

    def delta(self, state: TrainState, rows: dict[str, np.ndarray], facts: dict[str, Any]) -> Callable[[], Any]:
        """Copy these rows of a state, rising, by table; what is given back writes them, and may run beside steps."""


OpenPublisher = Callable[[RunConfig, Placed, Dataset], contextlib.AbstractContextManager[Publisher]]


class Publishing:
    """The schedule of one training; `step` is where it begins. As a context manager it waits for what is written.

    `publisher` is None in processes but the first.
    """

    def __init__(self, config: RunConfig, placed: Placed, feed: Feed, publisher: Publisher | None, step: int) -> None:
        self._options, self._feed, self._publisher = config.publishing, feed, publisher
        self._touched = None if config.optimizer.table_update == ALL_ROWS else Touched(placed.model)
        if self._touched is None:
            _LOG.info("--publish: --table_update=all moves every row in each step, so every version is whole")
        self._seen_until = self._published_at = step
        self._last, self._deltas_since, self._began = time.time(), -1, False
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._writing: concurrent.futures.Future[Any] | None = None

    def __enter__(self) -> "Publishing":
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self._thread.shutdown()

    def undisturbed(self, step: int) -> int | None:
        """Steps from `step` to the next version; None where seconds say when it is due."""
        return self._published_at + self._options.steps - step if self._options.steps else None

    def due(self, step: int, asked: bool) -> bool:
        """Whether a version is to be published behind `step`.

        Of several processes each has its own clock: seconds count where all have `asked` each other at this step.
        """
        if self._options.steps:
            return step - self._published_at >= self._options.steps
        late = step > self._published_at and time.time() - self._last >= self._options.seconds
        return asked and bool(processes.largest(int(late)))

    def finish(self, state: TrainState, step: int) -> None:
        """A version of what the training ends with, if there is none yet."""
        if step > self._published_at:
            self.publish(state, step)
        elif not self._began:
            with reading(state) as reads:
                there = reads and self._first().follow() >= 0 and self._first().has(state)
            if not processes.largest(int(there)):
                self.publish(state, step)

    def see(self, record: Record, step: int) -> None:
        """Mark what the batches of a window asked for, up to `step`, since this was called last."""
        if self._touched is not None and step > self._seen_until:
            first = max(self._seen_until, record.first_step)
            batches = (index - record.first_step for index in (first, step))
            self._touched.see(self._feed.host_ids(record.traveller, *batches))
        self._seen_until = step

    def mark(self, rows: Mapping[str, np.ndarray]) -> None:
        """Mark rows, by table, that were changed by no step."""
        if self._touched is not None:
            for table, row_M in rows.items():
                self._touched.mark(table, row_M)

    def publish(self, state: TrainState, step: int) -> None:
        """A version of `state`, which must be finite, behind `step`; of a delta only the copy is waited for."""
        self._wait()
        jax.block_until_ready(state)
        if self._touched is not None:
            self._touched.join()
        now = time.time()
        with reading(state) as reads:
            if reads:
                self._write(state, {"step": step, "updated": {"first": self._last, "last": now}})
        if self._touched is not None:
            self._touched.clear()
        self._last, self._published_at, self._began = now, step, True

    def _write(self, state: TrainState, facts: dict[str, Any]) -> None:
        publisher = self._first()
        if self._touched is not None and not self._began:
            self._deltas_since = publisher.follow()
        try:
            whole = self._touched is None or not 0 <= self._deltas_since < self._options.whole_every - 1
            if not whole and not self._began:
                whole = not publisher.compared(state, facts)
            elif not whole:
                assert self._touched is not None
                self._writing = self._thread.submit(publisher.delta(state, self._touched.rows(), facts))
            if whole:
                publisher.whole(state, facts)
            self._deltas_since = 0 if whole else self._deltas_since + 1
        except (ConfigError, OSError) as error:
            self._failed(error)

    def _first(self) -> Publisher:
        assert self._publisher is not None, "only the first process writes"
        return self._publisher

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except (ConfigError, OSError) as error:
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._deltas_since = -1
        _LOG.warning("a version could not be published: %s; the next one is whole", " ".join(str(error).split()))


@contextlib.contextmanager
def publishing(
    config: RunConfig, placed: Placed, feed: Feed, dataset: Dataset, open_publisher: OpenPublisher | None, step: int
) -> Iterator[Publishing | None]:
    """The Publishing of a run that has one, else None. ConfigError where it cannot be."""
    if not config.publishing.model_dir:
        yield None
        return
    where = f"--publish={config.publishing.model_dir}"
    require(open_publisher is not None, f"{where} is for dlrm_jax.train and dlrm_jax.online; leave it out here")
    assert open_publisher is not None
    opened = open_publisher(config, placed, dataset)
    with (
        processes.first_holds(opened, f"{where}: the first process cannot publish there") as publisher,
        Publishing(config, placed, feed, publisher, step) as schedule,
    ):
        yield schedule
