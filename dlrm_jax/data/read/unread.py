"""Rows on disk that go to batches: read, checked and put where they belong, while the cache has them.

Rows that are read first and permuted then cross the memory three times more, which is what reading them takes.
"""

import ctypes
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dlrm_jax.data.read import native
from dlrm_jax.data.read.dataset import Split
from dlrm_jax.data.read.native import address
from dlrm_jax.data.read.shards import Shards

_AT_ONCE = 8
"""Records that a thread puts in their places in one go."""


_COLUMNS = {"dense": "dense_RxN", "ids": "ids_RxK", "label": "label_R", "weight": "weight_R"}
"""What a packed row has, in its order: by its name in a block that of a Split."""


class Stretch(NamedTuple):
    """Rows `start` to `stop` of a record, which has `of` rows; the first of these is row `at` of all."""

    record: int
    start: int
    stop: int
    at: int
    of: int


class Target(NamedTuple):
    """Rows `rows_R` of all belong, in this order, into a window's rows from `at` on; `words_RxW` are packed rows.

    Targets of some jobs have rows of one width.
    """

    words_RxW: np.ndarray
    rows_R: np.ndarray
    at: int


@dataclasses.dataclass(frozen=True, eq=False)
class Unread:
    """The rows of `stretches` of `shards`, with the columns of `like`, which has no row.

    Ids are below `limit_K`. `records` reads and checks some records; `library` is native.py's.
    """

    like: Split
    stretches: list[Stretch]
    records: Callable[[list[int]], dict[int, Split]]
    library: Any
    shards: Shards
    limit_K: np.ndarray

    def jobs(self, targets: list[Target]) -> Iterator[Callable[[], None]]:
        """Calls, by any thread, that together put all rows where they belong; rows of no target go nowhere."""
        rows = self.stretches[-1].at + self.stretches[-1].stop - self.stretches[-1].start
        places_R = np.full(rows, -1, np.int64)
        for number, (_, rows_R, at) in enumerate(targets):
            order_R = np.ascontiguousarray(rows_R, np.int64)
            self.library.dlrm_places(address(order_R), len(order_R), at + (number << 32), address(places_R))
        by_record: dict[int, list[Stretch]] = {}
        for stretch in self.stretches:
            by_record.setdefault(stretch.record, []).append(stretch)
        wanted = list(by_record.items())
        windows_T = np.array([address(words_RxW) for words_RxW, _, _ in targets], np.uint64)
        row = 4 * targets[0].words_RxW.shape[1]
        for i in range(0, len(wanted), _AT_ONCE):
            yield lambda some=wanted[i : i + _AT_ONCE]: self._put(dict(some), places_R, windows_T, row)  # type: ignore[misc]

    def _put(self, stretches: dict[int, list[Stretch]], places_R: np.ndarray, windows_T: np.ndarray, row: int) -> None:
        done = self._filled(stretches, places_R, windows_T, row)
        for record, split in self.records([record for record in stretches if record not in done]).items():
            columns = [getattr(split, name) for name in self._names.values()]
            for stretch in stretches[record]:
                starts_C = np.array([address(column[stretch.start :]) for column in columns], np.uint64)
                self.library.dlrm_scatter(
                    *(address(starts_C), address(self._widths_C), len(columns), self.like.weight_R is not None, row),
                    *(address(places_R[stretch.at :]), stretch.stop - stretch.start, address(windows_T)),
                )

    def _filled(
        self, stretches: dict[int, list[Stretch]], places_R: np.ndarray, windows_T: np.ndarray, row: int
    ) -> set[int]:
        """The records that C++ alone could put in their places: undamaged ones of the layout that most have."""
        if (layout := self.shards.layout) is None:
            return set()
        rows, widths_C = (layout.places["label"][1] - layout.places["label"][0]) // 4, self._widths_C
        places = [layout.places[name] for name in self._names]
        if [stop - start for start, stop in places] != (rows * widths_C).tolist():
            return set()
        of_layout = [record for record, some in stretches.items() if some[0].of == rows]
        if not (chunks := self.shards.chunks(of_layout, self.library)):
            return set()
        of_record = [stretches[record] for record, _, _ in chunks]
        stretches_Sx3: np.ndarray = np.array([one[1:4] for some in of_record for one in some], np.int64)
        firsts_C = np.array([0, *itertools.accumulate(map(len, of_record))], np.int64)
        files_C = np.array([file.number for _, _, (file, _, _) in chunks], np.int32)
        begins_C, ends_C = (np.array([chunk[i] for _, _, chunk in chunks], np.int64) for i in (1, 2))
        room, done_C = int((ends_C - begins_C).max()), np.zeros(len(chunks), np.uint8)
        memory = self.shards.memory.empty((2, room))
        gaps_Gx2: np.ndarray = np.array([(start, stop - start) for start, stop, _ in layout.between], np.int64)
        between = np.frombuffer(b"".join(held for _, _, held in layout.between) + b" ", np.uint8)
        columns_C: np.ndarray = np.array([start for start, _ in places], np.int64)
        counts = (layout.size, rows, len(gaps_Gx2), layout.places["ids"][0], len(self.limit_K), len(columns_C))
        arrays: tuple[np.ndarray, ...] = (gaps_Gx2, between, columns_C, widths_C, self.limit_K)
        struct = native.Layout(*counts, self.like.weight_R is not None, row, *map(address, arrays))
        self.library.dlrm_fill(
            *(ctypes.addressof(struct), len(chunks), address(files_C), address(begins_C), address(ends_C)),
            *(address(memory), room, address(firsts_C), address(stretches_Sx3), address(places_R)),
            *(address(windows_T), address(done_C)),
        )
        return {record for (record, _, _), done in zip(chunks, done_C.tolist(), strict=True) if done}

    @functools.cached_property
    def _widths_C(self) -> np.ndarray:
        """Bytes a row of each column."""
        return np.array([4 * math.prod(getattr(self.like, name).shape[1:]) for name in self._names.values()], np.int64)

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """Of the columns that these rows have."""
        like = {name: getattr(self.like, of_split) for name, of_split in _COLUMNS.items()}
        return {
            name: _COLUMNS[name] for name, column in like.items() if column is not None and math.prod(column.shape[1:])
        }
