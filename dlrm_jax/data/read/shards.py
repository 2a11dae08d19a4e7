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
from dlrm_jax.data.read.riegeli import SIMPLE, PlainFile, chunks_of, read_chunks, records_of
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
        self._memory = Recycler()
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
        plain = self._plain(indices, library) if library is not None and library.dlrm_reads() else {}
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

    def _plain(self, indices: list[int], library: Any) -> dict[int, memoryview]:
        """Those that could be read so; no shard of any other is tried again."""
        places, wanted = [(index, *self._place(index)) for index in indices], []
        for index, shard, offset in places:
            with contextlib.suppress(OSError):
                if self._chunks.get(shard, ()) is not None:
                    file = self._reader(shard, PlainFile)
                    if shard not in self._chunks:
                        self._chunks[shard] = chunks_of(library, self._memory, file, self._lengths[shard])
                    if (chunks := self._chunks[shard]) is not None:
                        wanted.append((index, shard, (file, *chunks[offset : offset + 2])))
        found = {}
        chunks_read = read_chunks(library, self._memory, [chunk for _, _, chunk in wanted])
        for (index, shard, _), (kind, data) in zip(wanted, chunks_read, strict=True):
            records = records_of(data) if kind == 1 << 8 | SIMPLE else None
            if records is not None and len(records) == 1:
                found[index] = records[0]
            else:
                self._chunks[shard] = None
        return found

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


class _Layout(NamedTuple):
    """Where a record's columns are, and the bytes between them."""

    places: dict[str, tuple[int, int]]
    between: tuple[tuple[int, int, bytes], ...]


class Parser:
    """blocks.parse, which remembers where the columns are of records of some lengths.

    Only what is between the columns says where they are: a record of the same length with the same bytes there has
    them in the same places.
    """

    def __init__(self, columns: Mapping[str, tuple[Any, tuple[int, ...]]]) -> None:
        self._columns = columns
        self._layouts: dict[int, _Layout] = {}

    def none(self) -> dict[str, np.ndarray]:
        """The columns of no row."""
        return {name: np.zeros((0, *shape), dtype) for name, (dtype, shape) in self._columns.items()}

    def __call__(self, record: Record) -> dict[str, np.ndarray]:
        """The columns; ValueError for bytes that are no such record."""
        known = self._layouts.get(len(record))
        if known is None or any(record[start:stop] != held for start, stop, held in known.between):
            known = self._layouts[len(record)] = _layout(record, places(record, self._columns))
        return columns_at(record, known.places, self._columns)


def _layout(record: Record, found: dict[str, tuple[int, int]]) -> _Layout:
    starts, stops = zip(*sorted(found.values()), strict=True)
    gaps = zip((0, *stops), (*starts, len(record)), strict=True)
    return _Layout(found, tuple((start, stop, bytes(record[start:stop])) for start, stop in gaps))
