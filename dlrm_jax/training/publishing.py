"""Versions that a training publishes (`--publish`): when, and of which rows.

The first of a process is whole, as nobody marked what changed before it; so is every so manyth, one after one that
could not be written, and each where a step moves every row (`--table_update=all`). Between them a version has the rows
that batches named since the last one. Writing never ends a training: what fails is told, and the next one is whole.
"""

import concurrent.futures
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from dlrm_jax.config import ConfigError, require
from dlrm_jax.config.learning import ALL_ROWS
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.host import processes
from dlrm_jax.training.feed import Feed
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.training.state import TrainState
from dlrm_jax.training.stepper import Record
from dlrm_jax.training.touched import Touched

_LOG = logging.getLogger("dlrm_jax")


class Publisher(Protocol):
    """Writes versions; training itself knows none."""

    def whole(self, state: TrainState, facts: dict[str, Any]) -> Any:
        """Write all of a state. ConfigError or OSError where that cannot be."""

    def delta(self, state: TrainState, rows: dict[str, np.ndarray], facts: dict[str, Any]) -> Callable[[], Any]:
        """Copy these rows of a state, rising, by table; what is given back writes them, and may run beside steps."""


OpenPublisher = Callable[[RunConfig, Placed, Dataset], contextlib.AbstractContextManager[Publisher]]


class Publishing:
    """The schedule of one training; `step` is where it begins. As a context manager it waits for what is written."""

    def __init__(self, config: RunConfig, placed: Placed, feed: Feed, publisher: Publisher, step: int) -> None:
        self._options, self._feed, self._publisher = config.publishing, feed, publisher
        self._touched = None if config.optimizer.table_update == ALL_ROWS else Touched(placed.model)
        if self._touched is None:
            _LOG.info("--publish: --table_update=all moves every row in each step, so every version is whole")
        self._seen_until = self._published_at = step
        self._last, self._deltas_since = time.time(), -1
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

    def due(self, step: int) -> bool:
        """Whether a version is to be published behind `step`."""
        if self._options.steps:
            return step - self._published_at >= self._options.steps
        return step > self._published_at and time.time() - self._last >= self._options.seconds

    def finish(self, record: Record, state: TrainState, step: int) -> None:
        """A version of what the training ends with, if there is none yet."""
        if step > self._published_at:
            self.see(record, step)
            self.publish(state, step)

    def see(self, record: Record, step: int) -> None:
        """Mark what the batches of a window asked for, up to `step`, since this was called last."""
        if self._touched is not None and step > self._seen_until:
            first = max(self._seen_until, record.first_step)
            batches = (index - record.first_step for index in (first, step))
            self._touched.see(self._feed.host_ids(record.traveller, *batches))
        self._seen_until = step

    def publish(self, state: TrainState, step: int) -> None:
        """A version of `state`, which must be finite, behind `step`; of a delta only the copy is waited for."""
        self._wait()
        jax.block_until_ready(state)
        now = time.time()
        facts = {"step": step, "updated": {"first": self._last, "last": now}}
        whole = self._touched is None or not 0 <= self._deltas_since < self._options.whole_every - 1
        try:
            if whole:
                self._publisher.whole(state, facts)
            else:
                assert self._touched is not None
                write = self._publisher.delta(state, self._touched.rows(), facts)
                self._writing = self._thread.submit(write)
            self._deltas_since = 0 if whole else self._deltas_since + 1
        except (ConfigError, OSError) as error:
            self._failed(error)
        if self._touched is not None:
            self._touched.clear()
        self._last, self._published_at = now, step

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
) -> Any:
    """The Publishing of a run that has one, else None. ConfigError where it cannot be."""
    if not config.publishing.model_dir:
        yield None
        return
    where = f"--publish={config.publishing.model_dir}"
    require(open_publisher is not None, f"{where} is for dlrm_jax.train; leave it out here")
    require(processes.count() == 1, f"{where} is for one process; leave it out where there are several")
    assert open_publisher is not None
    with (
        open_publisher(config, placed, dataset) as publisher,
        Publishing(config, placed, feed, publisher, step) as schedule,
    ):
        yield schedule
