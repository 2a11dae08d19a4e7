"""Windows of batches from a split: their order follows from (seed, epoch), their position is the step.

A window is several batches of one shape, one after the other, so that it travels in one transfer and batches are cut
from it where the step runs. What is read (windows.py) and what travels are cut differently: 4 batches of 3 rows from
windows of 5 rows, 2 batches a window, the 10 rows of an epoch visited as a b c d e | f g h i j:

    (a b c) (d e f)   |   (g h i) (j and two rows of padding)
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np

from dlrm_jax.data import packed_rows
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.packed_rows import PADDING, PackedRows
from dlrm_jax.data.read.dataset import Maker, Rows, Split
from dlrm_jax.data.read.unread import Target, Unread
from dlrm_jax.host.cores import cores
from dlrm_jax.host.recycled import Recycler

MOST_STEPS = 64
"""Batches of a window, at most: a loss that is no number is seen two windows later, at the latest."""
WINDOW_BYTES = 32 << 20
"""A window has fewer batches where they are large: some four windows are on their way, and two are in use."""
MOST_ROWS = 2**32 - 1
"""Of a split of which the order alone travels, in words of 32 bits, and the number behind the last row is padding."""
_PIECE_ROWS = 16_384
"""Rows that a thread puts into a window in one go."""

_AHEAD = 2
"""Sources that are on their way behind those of a window that is waited for."""

Host = TypeVar("Host")
Device = TypeVar("Device")


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Batches that hold every row once."""
    return -(-num_rows // batch_size)


def padded(batch_size: int, multiple: int) -> int:
    """The least multiple of `multiple` that holds `batch_size` rows."""
    return -(-batch_size // multiple) * multiple


def process_shard() -> tuple[int, int]:
    """This process's `shard`."""
    return jax.process_index(), jax.process_count()


@dataclasses.dataclass(frozen=True)
class Cut:
    """How rows become windows: `steps` batches of `batch_size` rows, each padded to a multiple of `multiple`.

    `shard` (i, n) gives process i of n its part of each batch: all together see one global order.
    """

    batch_size: int
    steps: int = 1
    multiple: int = 1
    shard: tuple[int, int] = (0, 1)

    @property
    def bounds(self) -> tuple[int, int]:
        """The rows of each batch that are this process's, padding included."""
        index, count = self.shard
        rows = padded(self.batch_size, self.multiple) // count
        return rows * index, rows * (index + 1)

    @property
    def rows(self) -> int:
        """Rows of each batch that are this process's, padding included."""
        return self.bounds[1] - self.bounds[0]


class Piece(NamedTuple):
    """Some rows of a source, and the row of the window, all batches one after the other, where the first one goes."""

    source: Any
    rows_R: np.ndarray
    at: int


def window_steps(row_bytes: int, batch_size: int, most: int = MOST_STEPS) -> int:
    """Batches of a window."""
    return max(1, min(most, MOST_STEPS, WINDOW_BYTES // (row_bytes * batch_size)))


def train_epochs(
    split: Rows, batch_size: int, seed: int, start_step: int, shuffle: bool, visit: str = "sources"
) -> Iterator[Iterator[Any]]:
    """The epochs from step `start_step` on, for ever, each as `visit`, a method of Rows, gives it.

    Batch k depends on (seed, k) alone: starting at k reads nothing before it.
    """
    epoch, position = divmod(start_step, steps_per_epoch(len(split), batch_size))
    for number in itertools.count(epoch):
        yield getattr(split, visit)(seed, number, shuffle, position * batch_size)
        position = 0


def laid_out(epochs: Iterator[Iterator[tuple[Any, np.ndarray]]], cut: Cut) -> Iterator[tuple[Any, list[Piece]]]:
    """(a source, the pieces) of each window; what no piece covers is padding, as behind an epoch's last row."""
    size = cut.batch_size * cut.steps
    pieces: list[Piece] = []
    filled = 0
    for windows in epochs:
        source = None
        for source, order_R in windows:
            while len(order_R):
                rows_R, order_R = order_R[: size - filled], order_R[size - filled :]
                pieces += _pieces(cut, source, rows_R, filled)
                filled += len(rows_R)
                if filled == size:
                    yield source, pieces
                    pieces, filled = [], 0
        filled = padded(filled, cut.batch_size)
        if filled == size:
            yield source, pieces
            pieces, filled = [], 0
    if filled:
        yield source, pieces


def _pieces(cut: Cut, source: Any, rows_R: np.ndarray, at: int) -> Iterator[Piece]:
    """This process's part of some rows that are `at` and behind it in the window of all processes, without padding."""
    low, high = cut.bounds
    if (low, high) == (0, cut.batch_size):
        yield Piece(source, rows_R, at)
        return
    start = 0
    while start < len(rows_R):
        step, place = divmod(at + start, cut.batch_size)
        stop = min(len(rows_R), start + cut.batch_size - place)
        first, last = max(place, low), min(place + stop - start, high)
        if first < last:
            of_batch = rows_R[start + first - place : start + last - place]
            yield Piece(source, of_batch, step * (high - low) + first - low)
        start = stop


def batch_windows(epochs: Iterator[Iterator[tuple[Any, np.ndarray]]], cut: Cut) -> Generator[PackedRows, None, None]:
    """Windows of packed rows, (steps, rows), filled by several threads."""
    with concurrent.futures.ThreadPoolExecutor(cores(), thread_name_prefix="read") as pool:
        filling = _Filling(pool, cut)
        try:
            for like, pieces in laid_out(epochs, cut):
                filling.add(like, pieces)
                yield from filling.filled(still_adding=True)
            yield from filling.filled(still_adding=False)
        finally:
            pool.shutdown(cancel_futures=True)


class _Filling:
    """Windows in their order, while their rows are put into them.

    What is in memory is put at once. A source that is not is read when the next one begins, as all its rows have their
    place then; its windows are waited for when the two behind it are on their way too, so that all threads have work.
    """

    def __init__(self, pool: concurrent.futures.Executor, cut: Cut) -> None:
        self._pool, self._cut, self._memory = pool, cut, Recycler()
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._open: list[tuple[_Waiting, Piece]] = []
        self._read = 0
        """Sources that are on their way, or were."""

    def add(self, like: Any, pieces: list[Piece]) -> None:
        """A window of these pieces; `like` is a source of them."""
        padding = sum(len(piece.rows_R) for piece in pieces) < self._cut.rows * self._cut.steps
        window = _empty(like.like if isinstance(like, Unread) else like, self._cut, padding, self._memory)
        waiting = _Waiting(window, [])
        self._waiting.append(waiting)
        for piece in pieces:
            if self._open and self._open[0][1].source is not piece.source:
                self._begin_reading()
            if isinstance(piece.source, Unread):
                self._open.append((waiting, piece))
                waiting.last_source = self._read
            else:
                waiting.jobs += [self._pool.submit(_put, window, part) for part in _short(piece)]

    def filled(self, still_adding: bool) -> Iterator[PackedRows]:
        """The windows that are filled by now; all that are left where none is added any more."""
        if not still_adding and self._open:
            self._begin_reading()
        while self._waiting and (not still_adding or self._waiting[0].last_source < self._read - _AHEAD):
            window, jobs = self._waiting[0].window, self._waiting.popleft().jobs
            for job in jobs:
                job.result()
            yield window.replace(words=window.words.reshape(self._cut.steps, self._cut.rows, -1))

    def _begin_reading(self) -> None:
        targets = [Target(waiting.window.words, piece.rows_R, piece.at) for waiting, piece in self._open]
        jobs = [self._pool.submit(job) for job in self._open[0][1].source.jobs(targets)]
        for waiting in {id(waiting): waiting for waiting, _ in self._open}.values():
            waiting.jobs += jobs
        self._open, self._read = [], self._read + 1


@dataclasses.dataclass
class _Waiting:
    """A window, and what has to be done before it is filled."""

    window: PackedRows
    jobs: list[concurrent.futures.Future[None]]
    last_source: int = -1 - _AHEAD
    """Number of the last of its sources that are to be read; where there is none, one that is long past."""


def order_windows(epochs: Iterator[Iterator[np.ndarray]], cut: Cut, num_rows: int) -> Iterator[np.ndarray]:
    """Windows of rows that are where the step runs: their positions (steps, rows), padding being `num_rows`."""
    for _, pieces in laid_out((((None, order_R) for order_R in orders) for orders in epochs), cut):
        window = np.full(cut.steps * cut.rows, num_rows, np.uint32)
        for piece in pieces:
            window[piece.at : piece.at + len(piece.rows_R)] = piece.rows_R
        yield window.reshape(cut.steps, cut.rows)


def made_batch(xp: Any, maker: Maker, position_B: Any, num_rows: int = MOST_ROWS) -> Batch:
    """Rows that `xp` makes, positions from `num_rows` on being padding."""
    dense_BxN, ids_BxK, label_B = maker(xp, position_B)
    batch = Batch(dense_BxN=dense_BxN, ids_BxK=ids_BxK, label_B=label_B, weight_B=xp.ones_like(label_B))
    is_row_B = position_B.astype(xp.uint32) < np.uint32(num_rows)

    def padded_with(filler: float, column: Any) -> Any:
        return xp.where(is_row_B.reshape(-1, *[1] * (column.ndim - 1)), column, column.dtype.type(filler))

    return jax.tree.map(padded_with, PADDING, batch)


def _empty(like: Split, cut: Cut, padding: bool, memory: Recycler) -> PackedRows:
    rows = packed_rows.empty(like.dense_RxN.shape[1], like.ids_RxK.shape[1], cut.steps * cut.rows, memory.empty)
    if padding:
        rows.words[:] = rows.padding
    return rows


def _short(piece: Piece) -> Iterator[Piece]:
    for start in range(0, len(piece.rows_R), _PIECE_ROWS):
        yield Piece(piece.source, piece.rows_R[start : start + _PIECE_ROWS], piece.at + start)


def _put(window: PackedRows, piece: Piece) -> None:
    source, to = piece.source, window[piece.at : piece.at + len(piece.rows_R)].batch
    columns = ((to.dense_BxN, source.dense_RxN), (to.ids_BxK, source.ids_RxK), (to.label_B, source.label_R))
    for column, values in columns:
        column[...] = values.take(piece.rows_R, axis=0)
    to.weight_B[...] = 1 if source.weight_R is None else source.weight_R.take(piece.rows_R)


def rows_and_labels(split: Rows) -> tuple[np.ndarray, np.ndarray]:
    """(number in the raw log, label) of every row, in order."""
    parts = [(window.row_R[order], window.label_R[order]) for window, order in split.windows(0, 0, shuffle=False)]
    row_R = np.concatenate([np.zeros(0, np.int64), *(row for row, _ in parts)])
    return row_R, np.concatenate([np.zeros(0, np.float32), *(label for _, label in parts)])


class Prefetcher(Generic[Host, Device]):
    """Iterates over (host side, what `put` makes of it), prepared by a background thread; use as a context manager.

    What `source` raises is raised by `next`, then and ever after. `wait_seconds` is the time that `next` waited.
    """

    def __init__(self, source: Iterator[Host], put: Callable[[Host], Device], depth: int = 2) -> None:
        self.wait_seconds = 0.0
        self._source, self._put_on_device = source, put
        self._ready: queue.Queue[tuple[Host, Device] | BaseException] = queue.Queue(maxsize=depth)
        self._end: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="prefetch")

    def __enter__(self) -> "Prefetcher[Host, Device]":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, error, traceback
        self._closed.set()
        self._thread.join()
        self._end = self._end or StopIteration()

    def __iter__(self) -> "Prefetcher[Host, Device]":
        return self

    def __next__(self) -> tuple[Host, Device]:
        if self._end is not None:  # The thread has ended: waiting for it would be for ever.
            raise self._end
        start = time.perf_counter()
        item = self._ready.get()
        self.wait_seconds += time.perf_counter() - start
        if isinstance(item, BaseException):
            self._end = item
            raise item
        return item

    @property
    def is_ready(self) -> bool:
        """Whether `next` would not wait."""
        return not self._ready.empty()

    def _work(self) -> None:
        try:
            for item in self._source:
                if not self._put((item, self._put_on_device(item))):
                    break
            else:
                self._put(StopIteration())
        except BaseException as error:  # Whatever it is, the consumer waits for it.
            self._put(error)
        finally:
            if (close := getattr(self._source, "close", None)) is not None:
                close()  # Its threads end here, not when it is collected.

    def _put(self, item: tuple[Host, Device] | BaseException) -> bool:
        """Queue an item, unless the consumer has left; a bounded wait, so that the thread always ends."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
