"""Visiting rows that are not in memory: blocks in a shuffled order, rows permuted among the blocks of a window."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dlrm_jax.data.dataset import Split


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
    num_blocks = -(-num_rows // block_rows)
    order = np.random.default_rng((seed, epoch)).permutation(num_blocks) if shuffle else np.arange(num_blocks)
    groups = [order[i : i + blocks_per_window] for i in range(0, num_blocks, blocks_per_window)]
    ends = np.cumsum([int(np.minimum(num_rows - group * block_rows, block_rows).sum()) for group in groups])
    first = int(np.searchsorted(ends, start, side="right"))
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        following = [reader.submit(read, group) for group in groups[first : first + 1]]
        for i in range(first, len(groups)):
            window = following.pop().result()
            following = [reader.submit(read, group) for group in groups[i + 1 : i + 2]]
            rng = np.random.default_rng((seed, epoch, i))
            rows = rng.permutation(len(window)) if shuffle else np.arange(len(window))
            yield window, rows[max(start - (int(ends[i]) - len(window)), 0) :]


@dataclasses.dataclass(frozen=True)
class GeneratedSplit:
    """Rows `first` to `first + num_rows` of a log that is computed block by block, so of any length."""

    first: int
    num_rows: int
    block_rows: int
    make_block: Callable[[int], Split]
    """The log's rows from `index * block_rows` on, `block_rows` of them."""

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
