"""Rows on disk that go to batches: read, checked and put where they belong, while the cache has them.

Rows that are read first and permuted then cross the memory three times more, which is what reading them takes.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dlrm_jax.data.batch import Batch
from dlrm_jax.data.read.dataset import Split
from dlrm_jax.data.read.native import address

_AT_ONCE = 2
"""Records that a thread reads at once: blocks.cc hashes two in the time of one."""


class Stretch(NamedTuple):
    """Rows `start` to `stop` of a record, the first of which is row `at` of all."""

    record: int
    start: int
    stop: int
    at: int


class Target(NamedTuple):
    """Rows `rows_R` of all belong, in this order, into a window's rows from `at` on."""

    window: Batch
    rows_R: np.ndarray
    at: int


@dataclasses.dataclass(frozen=True, eq=False)
class Unread:
    """The rows of `stretches`, with the columns of `like`, which has no row; `library` is native.py's.

    `records` reads some records.
    """

    like: Split
    stretches: list[Stretch]
    records: Callable[[list[int]], dict[int, Split]]
    library: Any

    def jobs(self, targets: list[Target]) -> Iterator[Callable[[], None]]:
        """Calls, by any thread, that together put all rows where they belong; rows of no target go nowhere."""
        rows = self.stretches[-1].at + self.stretches[-1].stop - self.stretches[-1].start
        places_R = np.full(rows, -1, np.int64)
        for number, (window, rows_R, at) in enumerate(targets):
            places_R[rows_R] = np.arange(at, at + len(rows_R)) + (number << 32)
            if self.like.weight_R is None:
                np.asarray(window.weight_B)[at : at + len(rows_R)] = 1
        by_record: dict[int, list[Stretch]] = {}
        for stretch in self.stretches:
            by_record.setdefault(stretch.record, []).append(stretch)
        wanted = list(by_record.items())
        windows_TxC = np.array([_addresses(_columns(window, self.like)) for window, _, _ in targets], np.uint64)
        for i in range(0, len(wanted), _AT_ONCE):
            yield lambda some=wanted[i : i + _AT_ONCE]: self._put(dict(some), places_R, windows_TxC)  # type: ignore[misc]

    def _put(self, stretches: dict[int, list[Stretch]], places_R: np.ndarray, windows_TxC: np.ndarray) -> None:
        for record, split in self.records(list(stretches)).items():
            columns = [split.dense_RxN, split.ids_RxK, split.label_R]
            columns = [column for column in (*columns, split.weight_R) if column is not None and column[:1].nbytes]
            widths_C = np.array([column[:1].nbytes for column in columns], np.int64)
            for stretch in stretches[record]:
                starts_C = np.array(_addresses([column[stretch.start :] for column in columns]), np.uint64)
                places = places_R[stretch.at :]
                self.library.dlrm_scatter(
                    *(address(starts_C), address(widths_C), len(columns)),
                    *(address(places), stretch.stop - stretch.start, address(windows_TxC)),
                )


def _columns(window: Batch, like: Split) -> list[np.ndarray]:
    """A window's columns that are read."""
    columns = [np.asarray(window.dense_BxN), np.asarray(window.ids_BxK), np.asarray(window.label_B)]
    if like.weight_R is not None:
        columns.append(np.asarray(window.weight_B))
    return [column for column in columns if column[:1].nbytes]


def _addresses(columns: list[np.ndarray]) -> list[int]:
    return [address(column) for column in columns]
