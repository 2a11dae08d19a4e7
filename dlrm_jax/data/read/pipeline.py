"""Batches from a split: their order follows from (seed, epoch), their position is the step, their shape is fixed."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import jax
import numpy as np

from dlrm_jax.data.batch import Batch
from dlrm_jax.data.read.dataset import BatchExpander, Rows, Split
from dlrm_jax.data.schema.schema import EMPTY_SLOT


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Batches that hold every row once."""
    return -(-num_rows // batch_size)


def take(parts: list[tuple[Split, np.ndarray]], batch_size: int) -> Batch:
    """The batch of some rows of some splits, filled up to `batch_size` with padding of weight 0."""

    def column(of: Callable[[Split], np.ndarray], padding: float) -> np.ndarray:
        pieces = [of(split).take(rows, axis=0) for split, rows in parts]
        missing = batch_size - sum(map(len, pieces))
        if missing:
            pieces.append(np.full((missing, *pieces[0].shape[1:]), padding, pieces[0].dtype))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    return Batch(
        dense_BxN=column(lambda split: split.dense_RxN, 0),
        ids_BxK=column(lambda split: split.ids_RxK, EMPTY_SLOT),
        label_B=column(lambda split: split.label_R, 0),
        weight_B=column(_weights, 0),
    )


def _weights(split: Split) -> np.ndarray:
    return np.ones(len(split), np.float32) if split.weight_R is None else split.weight_R


def batches_of(
    windows: Iterator[tuple[Split, np.ndarray]], batch_size: int, shard: tuple[int, int] = (0, 1), multiple: int = 1
) -> Iterator[Batch]:
    """The rows of `windows` in batches, the last one padded; each is padded to a multiple of `multiple`, the devices.

    `shard` (i, n) gives process i of n its part of each batch of `batch_size`: all together see one global order.
    """
    padded_size = padded(batch_size, multiple)
    parts: list[tuple[Split, np.ndarray]] = []
    held = 0
    for split, order in windows:
        start = 0
        while start < len(order):
            rows = order[start : start + batch_size - held]
            parts.append((split, rows))
            start, held = start + len(rows), held + len(rows)
            if held == batch_size:
                yield take(_part(parts, padded_size, shard), padded_size // shard[1])
                parts, held = [], 0
    if held:
        yield take(_part(parts, padded_size, shard), padded_size // shard[1])


def process_shard() -> tuple[int, int]:
    """This process's `shard`."""
    return jax.process_index(), jax.process_count()


def padded(batch_size: int, multiple: int) -> int:
    """The least multiple of `multiple` that holds `batch_size` rows."""
    return -(-batch_size // multiple) * multiple


def _part(
    parts: list[tuple[Split, np.ndarray]], batch_size: int, shard: tuple[int, int]
) -> list[tuple[Split, np.ndarray]]:
    index, count = shard
    if count == 1:
        return parts
    low, high = batch_size // count * index, batch_size // count * (index + 1)
    out, first = [], 0
    for split, rows in parts:
        out.append((split, rows[max(low - first, 0) : max(high - first, 0)]))
        first += len(rows)
    return out


def train_batches(
    split: Rows,
    batch_size: int,
    seed: int,
    start_step: int,
    shuffle: bool = True,
    shard: tuple[int, int] = (0, 1),
    multiple: int = 1,
) -> Iterator[Batch]:
    """Batches from number `start_step` on, for ever; each epoch holds every row once, its last batch padded.

    Batch k depends on (seed, k) alone: starting at k reads nothing before it. `shard`, `multiple`: see `batches_of`.
    """
    epoch, position = divmod(start_step, steps_per_epoch(len(split), batch_size))
    while True:
        yield from batches_of(split.windows(seed, epoch, shuffle, position * batch_size), batch_size, shard, multiple)
        epoch, position = epoch + 1, 0


def eval_batches(split: Rows, batch_size: int, shard: tuple[int, int] = (0, 1), multiple: int = 1) -> Iterator[Batch]:
    """Every row once, in order, the last batch padded. `shard`, `multiple`: see `batches_of`."""
    return batches_of(split.windows(0, 0, shuffle=False), batch_size, shard, multiple)


def rows_and_labels(split: Rows) -> tuple[np.ndarray, np.ndarray]:
    """(number in the raw log, label) of every row, in order."""
    parts = [(window.row_R[order], window.label_R[order]) for window, order in split.windows(0, 0, shuffle=False)]
    row_R = np.concatenate([np.zeros(0, np.int64), *(row for row, _ in parts)])
    return row_R, np.concatenate([np.zeros(0, np.float32), *(label for _, label in parts)])


class Prefetcher:
    """Iterates over (host batch, batch on device), prepared by a background thread; use as a context manager.

    `put` says how a batch gets there. What `source` raises is raised by `next`, then and ever after. `wait_seconds` is
    the time that `next` waited: the input's share of a step.
    """

    def __init__(
        self,
        source: Iterator[Batch],
        depth: int = 2,
        expander: BatchExpander | None = None,
        put: Callable[[Batch], Batch] = jax.device_put,
    ) -> None:
        self.wait_seconds = 0.0
        self._put_on_device = put
        self._source = source
        self._on_host = expander.on_host if expander and not expander.on_device else None
        self._on_device = expander.device_function() if expander and expander.on_device else None
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
                batch = self._on_host(batch) if self._on_host else batch
                on_device = self._put_on_device(batch)
                if not self._put((batch, self._on_device(on_device) if self._on_device else on_device)):
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
