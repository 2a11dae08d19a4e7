"""Riegeli/records files as array_record writes them without compression, read by blocks.cc.

google/riegeli, doc/riegeli_records_file_format.md. The hash of every header and of every chunk is checked.
"""

import itertools
import os
import pathlib
from typing import Any

import numpy as np

from dlrm_jax.data.read.native import address
from dlrm_jax.host.recycled import Recycler

SIMPLE = ord("r")
"""The type of chunks of records."""
_BLOCK = 1 << 16
_CHUNK_HEADER = 40
_MAGIC = 0x71930E704FDAE05E
"""Of array_record's last chunk, which says where the footer is."""


class PlainFile:
    """An open file, closed when nobody has it any more."""

    def __init__(self, path: pathlib.Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


Chunk = tuple[PlainFile, int, int]
"""A file, and where in it the chunk begins and ends."""


def chunks_of(library: Any, memory: Recycler, file: PlainFile, count: int) -> tuple[int, ...] | None:
    """Where the chunks of an array_record file begin, and the last one ends; None unless it has `count`, all plain."""
    try:
        size = os.fstat(file.number).st_size
        ((_, data),) = read_chunks(library, memory, [(file, size - _BLOCK, size)])
        last = _numbers((records_of(data) or [memoryview(b"")])[0])
        footer, magic = last[1], last[2]
        ((_, data),) = read_chunks(library, memory, [(file, footer, size - _BLOCK)])
        about, *entries = records_of(data) or [memoryview(b"")]
        version, chunks, records = (_numbers(_numbers(about)[1])[field] for field in (1, 2, 3))
        found = [_numbers(entry) for entry in entries]
        begins = tuple(entry.get(1, 0) for entry in found)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    in_order = all(begin < end for begin, end in zip(begins, (*begins[1:], footer), strict=True))
    as_told = (magic, version, chunks, records, len(begins)) == (_MAGIC, 1, count, count, count)
    return (*begins, footer) if as_told and in_order else None


def read_chunks(library: Any, memory: Recycler, chunks: list[Chunk]) -> list[tuple[int, memoryview | None]]:
    """(type and number of records, data) of the chunks from and to places of files; no data where a hash is wrong."""
    chunks = [chunk if 0 <= chunk[1] < chunk[2] - _CHUNK_HEADER else (chunk[0], 0, 0) for chunk in chunks]
    into = [memory.empty((end - begin,)) for _, begin, end in chunks]
    files_C = np.array([file.number for file, _, _ in chunks], np.int32)
    begins_C, ends_C = (np.array([chunk[i] for chunk in chunks], np.int64) for i in (1, 2))
    places_C = np.array([address(chunk) for chunk in into], np.uint64)
    kinds_C, sizes_C = np.zeros(len(chunks), np.uint64), np.zeros(len(chunks), np.int64)
    arrays: tuple[np.ndarray, ...] = (files_C, begins_C, ends_C, places_C, kinds_C, sizes_C)
    library.dlrm_read_chunks(len(chunks), *map(address, arrays))
    return [
        (kind, None if size < 0 else memoryview(chunk)[_CHUNK_HEADER : _CHUNK_HEADER + size])
        for kind, size, chunk in zip(kinds_C.tolist(), sizes_C.tolist(), into, strict=True)
    ]


def records_of(data: memoryview | None) -> list[memoryview] | None:
    """The records of a simple chunk; None where it is compressed or none.

    Without compression it is 0, the size of the sizes, the sizes, the records.
    """
    if data is None or not len(data) or data[0]:
        return None
    try:
        num_bytes, at = _varint(data, 1)
        sizes_end, sizes = at + num_bytes, []
        while at < sizes_end:
            size, at = _varint(data, at)
            sizes.append(size)
    except IndexError:
        return None
    ends = list(itertools.accumulate(sizes, initial=at))
    return [data[start:stop] for start, stop in itertools.pairwise(ends)] if ends[-1] == len(data) else None


def _numbers(message: Any) -> dict[int, Any]:
    """The last value of each field of a protocol buffer: numbers, or bytes that may be a message."""
    values: dict[int, Any] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        value, at = _varint(message, at)
        if tag & 7 == 2:
            value, at = message[at : at + value], at + value
        elif tag & 7:
            raise ValueError("it has fields of other types")
        values[tag >> 3] = value
    return values


def _varint(data: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
