"""The records of a split's shards (blocks.py), by number, from any thread.

Where blocks.cc is there it reads shards of the plain form: Riegeli/records files of uncompressed chunks of one record
each, as array_record writes them without compression. Whatever is not exactly so, damage included, is left to
array_record, whose word is the last.
"""

import bisect
import collections
import contextlib
import itertools
import pathlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dlrm_jax.data.prepare.blocks import columns_at, places
from dlrm_jax.data.read.riegeli import SIMPLE, Chunk, PlainFile, chunks_of, read_chunks, records_of
from dlrm_jax.host.recycled import Recycler

OPEN_SHARDS = 128
"""Files that a split keeps open: a day's log has thousands of shards, and a process may have 1,024 files open."""

Record = bytes | memoryview


class Shards:
    """The records of one split's shards, opened when first read, the last used kept open."""

    def __init__(self, paths: list[pathlib.Path], lengths: list[int], spec: Any) -> None:
        self._paths, self._lengths = paths, lengths
        self._ends = list(itertools.accumulate(lengths))
        self._parse = Parser({name: (np.dtype(column.np_dtype), column.shape[1:]) for name, column in spec.items()})
        self._open: collections.OrderedDict[tuple[int, Any], Any] = collections.OrderedDict()
        self._chunks: dict[int, tuple[int, ...] | None] = {}
        """Where the records of a plain shard begin, and the last one ends; None for a shard that is array_record's."""
        self.memory = Recycler()
        self.layout: Layout | None = None
        """That of most plain chunks, once some were read."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def none(self) -> dict[str, np.ndarray]:
        """The columns of no row."""
        return self._parse.none()

    def blocks(self, indices: list[int], library: Any = None) -> Iterator[dict[str, np.ndarray]]:
        """The columns of some blocks, views of their records."""
        return map(self._parse, self.records(indices, library))

    def records(self, indices: list[int], library: Any = None) -> Iterator[Record]:
        """Some blocks as they are stored, by `library` (native.py) where that is given and their shards are plain."""
        plain = self._plain(indices, library) if library is not None else {}
        for index in indices:
            if index in plain:
                yield plain[index]
            else:
                shard, offset = self._place(index)
                yield self._reader(shard, _array_record).read([offset])[0]

    def _place(self, index: int) -> tuple[int, int]:
        """(shard, number of the record there)."""
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def chunks(self, indices: list[int], library: Any) -> list[tuple[int, int, Chunk]]:
        """(number, shard, chunk) of the blocks that lie in plain shards."""
        wanted: list[tuple[int, int, Chunk]] = []
        for index in indices:
            shard, offset = self._place(index)
            with contextlib.suppress(OSError):
                if self._chunks.get(shard, ()) is not None:
                    file = self._reader(shard, PlainFile)
                    if shard not in self._chunks:
                        self._chunks[shard] = chunks_of(library, self.memory, file, self._lengths[shard])
                    if (chunks := self._chunks[shard]) is not None:
                        wanted.append((index, shard, (file, chunks[offset], chunks[offset + 1])))
        return wanted

    def _plain(self, indices: list[int], library: Any) -> dict[int, memoryview]:
        """Those that could be read so; no shard of any other is tried again."""
        found, wanted = {}, self.chunks(indices, library)
        chunks_read = read_chunks(library, self.memory, [chunk for _, _, chunk in wanted])
        for (index, shard, _), (kind, data) in zip(wanted, chunks_read, strict=True):
            records = records_of(data) if kind == 1 << 8 | SIMPLE else None
            if data is not None and records is not None and len(records) == 1:
                found[index] = records[0]
                self._learn(data, records[0])
            else:
                self._chunks[shard] = None
        return found

    def _learn(self, data: memoryview, record: memoryview) -> None:
        """Note where the columns are in the data of most chunks, which are the largest."""
        if self.layout is None or len(data) > self.layout.size:
            prefix = len(data) - len(record)
            with contextlib.suppress(ValueError):
                found = self._parse.places(record)
                shifted = {name: (start + prefix, stop + prefix) for name, (start, stop) in found.items()}
                self.layout = layout_of(data, shifted)

    def _reader(self, shard: int, opened: Any) -> Any:
        with self._lock:
            if (shard, opened) not in self._open:
                self._open[shard, opened] = opened(self._paths[shard])
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)  # Its file is closed once the last thread has read from it.
            self._open.move_to_end((shard, opened))
            return self._open[shard, opened]


def _array_record(path: pathlib.Path) -> Any:
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(str(path))


class Layout(NamedTuple):
    """Of some bytes: how many they are, where the columns begin and end, and from where to where what is between."""

    size: int
    places: dict[str, tuple[int, int]]
    between: tuple[tuple[int, int, bytes], ...]


class Parser:
    """blocks.parse, which remembers where the columns are of records of some lengths.

    Only what is between the columns says where they are: a record of the same length with the same bytes there has
    them in the same places.
    """

    def __init__(self, columns: Mapping[str, tuple[Any, tuple[int, ...]]]) -> None:
        self._columns = columns
        self._layouts: dict[int, Layout] = {}

    def none(self) -> dict[str, np.ndarray]:
        """The columns of no row."""
        return {name: np.zeros((0, *shape), dtype) for name, (dtype, shape) in self._columns.items()}

    def __call__(self, record: Record) -> dict[str, np.ndarray]:
        """The columns; ValueError for bytes that are no such record."""
        return columns_at(record, self.places(record), self._columns)

    def places(self, record: Record) -> dict[str, tuple[int, int]]:
        """Where each column begins and ends; ValueError as above."""
        known = self._layouts.get(len(record))
        if known is None or any(record[start:stop] != held for start, stop, held in known.between):
            known = self._layouts[len(record)] = layout_of(record, places(record, self._columns))
        return known.places


def layout_of(record: Record, found: dict[str, tuple[int, int]]) -> Layout:
    """The layout of a record whose columns are found."""
    starts, stops = zip(*sorted(found.values()), strict=True)
    gaps = zip((0, *stops), (*starts, len(record)), strict=True)
    return Layout(len(record), found, tuple((start, stop, bytes(record[start:stop])) for start, stop in gaps))
