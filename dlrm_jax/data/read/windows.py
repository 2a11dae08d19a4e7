"""Visiting rows that are not in memory: blocks in a shuffled order, rows permuted among the blocks of a window."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dlrm_jax.data.read.dataset import Split


def blocked_windows(
    num_rows: int,
    block_rows: int,
    blocks_per_window: int,
    read: Callable[[np.ndarray], Split],
    seed: int,
    epoch: int,
    shuffle: bool,
    start: int,
) -> Iterator[tuple[Split, np.ndarray]]:
    """The windows of an epoch from row `start` on (dataset.Rows); the next is read while one is used.

    Block b holds the rows from b * block_rows; `read` gives some blocks, one after the other, in memory.
    """
    if not num_rows:
        return
    num_blocks = -(-num_rows // block_rows)
    order = np.random.default_rng((seed, epoch)).permutation(num_blocks) if shuffle else None
    last_place = num_blocks - 1 if order is None else int(np.flatnonzero(order == num_blocks - 1)[0])
    missing = num_blocks * block_rows - num_rows  # From the last block; all others are full.

    def first_row(group: int) -> int:
        place = min(group * blocks_per_window, num_blocks)
        return place * block_rows - (missing if last_place < place else 0)

    def blocks(group: int) -> np.ndarray:
        places = slice(group * blocks_per_window, min((group + 1) * blocks_per_window, num_blocks))
        return np.arange(places.start, places.stop) if order is None else order[places]

    num_groups = -(-num_blocks // blocks_per_window)
    first = start // (blocks_per_window * block_rows)
    while first < num_groups and first_row(first + 1) <= start:
        first += 1
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        following = [reader.submit(read, blocks(group)) for group in range(first, min(first + 1, num_groups))]
        for i in range(first, num_groups):
            window = following.pop().result()
            following = [reader.submit(read, blocks(group)) for group in range(i + 1, min(i + 2, num_groups))]
            rng = np.random.default_rng((seed, epoch, i))
            rows = rng.permutation(len(window)) if shuffle else np.arange(len(window))
            yield window, rows[max(start - first_row(i), 0) :]


@dataclasses.dataclass(frozen=True)
class GeneratedSplit:
    """Rows `first` to `first + num_rows` of a log that is computed block by block, so of any length."""

    first: int
    num_rows: int
    block_rows: int
    make_block: Callable[[int], Split]
    """The log's rows from `index * block_rows` on, `block_rows` of them."""
    only_label: int | None = None
    """Nobody counts what is generated."""

    def __len__(self) -> int:
        return self.num_rows

    def windows(self, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[tuple[Split, np.ndarray]]:
        """See dataset.Rows."""
        return blocked_windows(self.num_rows, self.block_rows, 1, self.read, seed, epoch, shuffle, start)

    def read(self, group: np.ndarray) -> Split:
        """Some blocks of the split, one after the other."""
        ranges = [(self.first + int(b) * self.block_rows, int(b)) for b in group]
        parts = [self._rows(begin, min(begin + self.block_rows, self.first + self.num_rows)) for begin, _ in ranges]
        return concatenate([piece for part in parts for piece in part])

    def _rows(self, begin: int, end: int) -> list[Split]:
        pieces = []
        for index in range(begin // self.block_rows, -(-end // self.block_rows)):
            block, offset = self.make_block(index), index * self.block_rows
            pieces.append(slice_rows(block, max(begin - offset, 0), min(end - offset, self.block_rows)))
        return pieces


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
