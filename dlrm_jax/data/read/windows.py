"""Visiting rows that are not in memory: blocks in a shuffled order, rows permuted among the blocks of a window.

Windows are read by several threads, as many ahead as there are threads, and come out in their order.
"""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dlrm_jax.data.read.dataset import Columns, Maker, Split
from dlrm_jax.data.read.native import permutation
from dlrm_jax.host.cores import cores

_MADE_ROWS = 512
"""Rows that the host makes at a time: what it notes on the way stays in a core's cache."""
MOST_READERS = 8
"""Threads that read a split: each holds a window, and reading is faster than any step with fewer."""


class Visit(NamedTuple):
    """Blocks that are read together, and the order in which their rows, one block after the other, are visited."""

    blocks_G: np.ndarray
    order_R: np.ndarray


@dataclasses.dataclass(frozen=True)
class BlockOrder:
    """Rows in blocks of `block_rows` (the last may have fewer), shuffled among `blocks_per_window` blocks.

    Block b holds the rows from b * block_rows. With 5 blocks, 2 a window, an epoch may visit blocks 3 1 | 4 0 | 2, and
    the rows of 3 and 1 in any order, then those of 4 and 0, then those of 2.
    """

    num_rows: int
    block_rows: int
    blocks_per_window: int
    library: Any = None
    """native.py's, where it is to draw the order; it is the same."""

    @property
    def num_blocks(self) -> int:
        """Blocks, the last one included."""
        return -(-self.num_rows // self.block_rows)

    def visits(self, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[Callable[[], Visit]]:
        """What makes each window of an epoch from row `start` on; the order follows from (seed, epoch) alone."""
        num_blocks, size = self.num_blocks, self.blocks_per_window
        blocks = np.arange(num_blocks)
        if shuffle:
            blocks = np.random.default_rng((seed, epoch)).permutation(num_blocks)
        first_row = 0
        for group in range(-(-num_blocks // size)):
            blocks_G = blocks[group * size : (group + 1) * size]
            skipped, first_row = max(start - first_row, 0), first_row + self.rows_of(blocks_G)
            if first_row > start:
                yield (
                    lambda group=group, blocks_G=blocks_G, skipped=skipped: Visit(  # type: ignore[misc]
                        blocks_G, self._order(self.rows_of(blocks_G), (seed, epoch, group), shuffle)[skipped:]
                    )
                )

    def rows_of(self, blocks_G: np.ndarray) -> int:
        """How many rows some blocks have together."""
        missing = self.num_blocks * self.block_rows - self.num_rows  # From the last block; all others are full.
        return len(blocks_G) * self.block_rows - missing * int((blocks_G == self.num_blocks - 1).sum())

    def positions(self, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[np.ndarray]:
        """The epoch's rows from number `start` on, by their position in the split, window by window."""
        within = np.arange(self.block_rows)
        for visit in self.visits(seed, epoch, shuffle, start):
            blocks_G, order_R = visit()
            rows_R = (blocks_G[:, None] * self.block_rows + within).reshape(-1)
            yield rows_R[rows_R < self.num_rows][order_R]

    def _order(self, num_rows: int, seed: tuple[int, ...], shuffle: bool) -> np.ndarray:
        if not shuffle:
            return np.arange(num_rows)
        if self.library is not None:
            return permutation(self.library, seed, num_rows)
        return np.random.default_rng(seed).permutation(num_rows)


def read_windows(
    order: BlockOrder, read: Callable[[np.ndarray], Split], seed: int, epoch: int, shuffle: bool, start: int
) -> Iterator[tuple[Split, np.ndarray]]:
    """The windows of an epoch from row `start` on (dataset.Rows); `read` gives some blocks, one after the other."""

    def made(visit: Callable[[], Visit]) -> tuple[Split, np.ndarray]:
        blocks_G, order_R = visit()
        return read(blocks_G), order_R

    readers = min(cores(), MOST_READERS)
    with concurrent.futures.ThreadPoolExecutor(readers, thread_name_prefix="read") as pool:
        ahead: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
        try:
            for visit in order.visits(seed, epoch, shuffle, start):
                ahead.append(pool.submit(made, visit))
                if len(ahead) > readers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class GeneratedSplit:
    """Rows `first` to `first + num_rows` of a log that is computed block by block, so of any length."""

    first: int
    num_rows: int
    block_rows: int
    make_block: Callable[[int], Split]
    """The log's rows from `index * block_rows` on, `block_rows` of them."""
    maker: Maker | None = None
    """See dataset.Rows: of the split's rows, with the same bits as in their blocks."""
    only_label: int | None = None
    """Nobody counts what is generated."""

    def __len__(self) -> int:
        return self.num_rows

    @property
    def order(self) -> BlockOrder:
        """How an epoch visits the blocks."""
        return BlockOrder(self.num_rows, self.block_rows, 1)

    def windows(self, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[tuple[Split, np.ndarray]]:
        """See dataset.Rows."""
        return read_windows(self.order, self.read, seed, epoch, shuffle, start)

    sources = windows

    def positions(self, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[np.ndarray]:
        """See dataset.Rows."""
        return self.order.positions(seed, epoch, shuffle, start)

    def whole(self) -> Split:
        """See dataset.Rows."""
        return self.read(np.arange(self.order.num_blocks))

    def read(self, blocks_G: np.ndarray) -> Split:
        """Some blocks of the split, one after the other."""
        ranges = [(self.first + int(b) * self.block_rows, int(b)) for b in blocks_G]
        parts = [self._rows(begin, min(begin + self.block_rows, self.first + self.num_rows)) for begin, _ in ranges]
        return concatenate([piece for part in parts for piece in part])

    def _rows(self, begin: int, end: int) -> list[Split]:
        pieces = []
        for index in range(begin // self.block_rows, -(-end // self.block_rows)):
            block, offset = self.make_block(index), index * self.block_rows
            pieces.append(slice_rows(block, max(begin - offset, 0), min(end - offset, self.block_rows)))
        return pieces


def made_by_host(maker: Maker, position_R: np.ndarray) -> Columns:
    """Rows in memory."""
    starts = range(0, max(len(position_R), 1), _MADE_ROWS)
    parts = [maker(np, position_R[start : start + _MADE_ROWS]) for start in starts]
    dense, ids, label = map(np.concatenate, zip(*parts, strict=True))
    return dense, ids, label


def slice_rows(split: Split, start: int, stop: int) -> Split:
    """Rows `start` to `stop`."""
    return _each_column([split], lambda parts: parts[0][start:stop])


def concatenate(splits: list[Split]) -> Split:
    """Rows of several splits, one after the other."""
    return splits[0] if len(splits) == 1 else _each_column(splits, np.concatenate)


def _each_column(splits: list[Split], make: Callable[[list[np.ndarray]], np.ndarray]) -> Split:
    columns: dict[str, Any] = {}
    for field in dataclasses.fields(Split):
        parts = [getattr(split, field.name) for split in splits]
        columns[field.name] = None if parts[0] is None else make(parts)
    return Split(**columns)
