"""Batches from a split: their order follows from (seed, epoch), their position is the step, their shape is fixed."""

import queue
import threading
import time
from collections.abc import Iterator
from types import TracebackType

import jax
import numpy as np

from dlrm_jax.batch import EMPTY_SLOT, Batch
from dlrm_jax.data.dataset import Split


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Batches that hold every row once."""
    return -(-num_rows // batch_size)


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch, from (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def take(split: Split, rows: np.ndarray | slice, batch_size: int) -> Batch:
    """The batch of the given rows, filled up to `batch_size` with padding of weight 0."""
    label = split.label_R[rows]
    padding = batch_size - len(label)

    def pad(column: np.ndarray, value: float) -> np.ndarray:
        widths = [(0, padding)] + [(0, 0)] * (column.ndim - 1)
        return np.pad(column, widths, constant_values=value) if padding else np.ascontiguousarray(column)

    return Batch(
        dense_BxN=pad(split.dense_RxN[rows], 0),
        ids_BxK=pad(split.ids_RxK[rows], EMPTY_SLOT),
        label_B=pad(label, 0),
        weight_B=pad(np.ones(len(label), np.float32), 0),
    )


def train_batches(split: Split, batch_size: int, seed: int, start_step: int, shuffle: bool = True) -> Iterator[Batch]:
    """Batches from number `start_step` on, for ever; each epoch holds every row once, its last batch padded.

    Batch k depends on (seed, k) alone: starting at k reads nothing before it.
    """
    num_rows = len(split)
    per_epoch = steps_per_epoch(num_rows, batch_size)
    epoch, position = divmod(start_step, per_epoch)
    while True:
        order = epoch_order(num_rows, seed, epoch) if shuffle else np.arange(num_rows)
        for k in range(position, per_epoch):
            yield take(split, order[k * batch_size : (k + 1) * batch_size], batch_size)
        epoch, position = epoch + 1, 0


def eval_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """Every row once, in order, the last batch padded."""
    for start in range(0, len(split), batch_size):
        yield take(split, slice(start, start + batch_size), batch_size)


class Prefetcher:
    """Iterates over (host batch, batch on device), prepared by a background thread; use as a context manager.

    What `source` raises is raised by `next`, then and ever after. `wait_seconds` is the time that `next` waited: the
    input's share of a step.
    """

    def __init__(self, source: Iterator[Batch], depth: int = 2) -> None:
        self.wait_seconds = 0.0
        self._source = source
        self._ready: queue.Queue[tuple[Batch, Batch] | BaseException] = queue.Queue(maxsize=depth)
        self._end: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="prefetch")

    def __enter__(self) -> "Prefetcher":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, error, traceback
        self._closed.set()
        self._thread.join()
        self._end = self._end or StopIteration()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> tuple[Batch, Batch]:
        if self._end is not None:  # The thread has ended: waiting for it would be for ever.
            raise self._end
        start = time.perf_counter()
        item = self._ready.get()
        self.wait_seconds += time.perf_counter() - start
        if isinstance(item, BaseException):
            self._end = item
            raise item
        return item

    def _work(self) -> None:
        try:
            for batch in self._source:
                if not self._put((batch, jax.device_put(batch))):
                    return
            self._put(StopIteration())
        except BaseException as error:  # Whatever it is, the consumer waits for it.
            self._put(error)

    def _put(self, item: tuple[Batch, Batch] | BaseException) -> bool:
        """Queue an item, unless the consumer has left; a bounded wait, so that the thread always ends."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
