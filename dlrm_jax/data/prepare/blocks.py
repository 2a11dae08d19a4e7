"""The prepared form: array_record shards whose records are blocks of rows, as TFDS features that need no TensorFlow.

A record is a tf.Example with raw bytes of: ids (R, K) int32, label (R,) float32, row (R,) int64 (the row's number in
the raw log); dense (R, N) float32 if the log has numbers; weight (R,) float32 if it has weights.
"""

import json
import math
import pathlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dlrm_jax.data.prepare.hashes import write_hashes
from dlrm_jax.data.prepare.staging import write_whole, writing
from dlrm_jax.host.files import whole

VERSION = "1.0.0"
COMPRESSIONS = ("none", "zstd")
BLOCK_ROWS = 4096
_DESCRIPTION = (
    "A click log prepared by dlrm_jax. A record is a block of rows; schema.yaml beside this file says of what."
)
_TFDS = "tensorflow_datasets.core.features"
Columns = Mapping[str, tuple[Any, tuple[int, ...]]]
"""(dtype, shape behind the rows) by name."""
_OPTIONS = {"none": "group_size:1,uncompressed", "zstd": "group_size:1,zstd:1"}


def _columns(num_dense: int, num_slots: int, weighted: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape behind the rows) of what a block holds."""
    # Of a column of no width nobody could tell how many rows it has.
    columns: dict[str, tuple[str, tuple[int, ...]]] = {"dense": ("float32", (num_dense,))} if num_dense else {}
    columns |= {
        "ids": ("int32", (num_slots,)),
        "label": ("float32", ()),
        "row": ("int64", ()),
    }
    return columns | ({"weight": ("float32", ())} if weighted else {})


def features(num_dense: int, num_slots: int, weighted: bool) -> Any:
    """The tfds.features.FeaturesDict of a block."""
    import tensorflow_datasets as tfds  # Half a second to import.

    return tfds.features.FeaturesDict(
        {
            name: tfds.features.Tensor(
                shape=(None, *shape), dtype=np.dtype(dtype), encoding=tfds.features.Encoding.BYTES
            )
            for name, (dtype, shape) in _columns(num_dense, num_slots, weighted).items()
        }
    )


def serialize(block: Mapping[str, np.ndarray]) -> bytes:
    """A block's record: the bytes of TFDS' own serializer with its map sorted, put together with one copy of the data.

    Example { features: Features { feature: map<string, Feature { bytes_list: BytesList { value: bytes } }> } }
    in protocol buffers' wire format, where each of these is field 1 but for a map's value, field 2.
    """
    pieces: list[bytes | memoryview] = []
    total = 0
    for name in sorted(block):
        data = np.ascontiguousarray(block[name])
        framed, length = [memoryview(data).cast("B")] if data.size else [b""], data.nbytes
        for field in (1, 1, 2):  # The value, its list, the map's value.
            framed, length = _frame(field, framed, length)
        key, key_length = _frame(1, [name.encode()], len(name))
        framed, length = _frame(1, [*key, *framed], key_length + length)
        pieces += framed
        total += length
    return b"".join(_frame(1, pieces, total)[0])


def parse(record: bytes | memoryview, columns: Columns) -> dict[str, np.ndarray]:
    """A block's columns, views of its record; `columns` says dtype, and shape behind the rows, of each.

    ValueError for bytes that are no such record.
    """
    return columns_at(record, places(record, columns), columns)


def places(record: bytes | memoryview, columns: Columns) -> dict[str, tuple[int, int]]:
    """Where each column's bytes begin and end in a block's record; ValueError as `parse`."""
    found: dict[str, tuple[int, int]] = {}
    for features in _fields(record, (0, len(record)), 1):
        for entry in _fields(record, features, 1):
            ((start, stop),) = _fields(record, entry, 1)
            (feature,) = _fields(record, entry, 2)
            (values,) = _fields(record, feature, 1)
            (found[bytes(record[start:stop]).decode()],) = _fields(record, values, 1)
    if found.keys() != columns.keys():
        raise ValueError(f"it has the columns {sorted(found)}, not {sorted(columns)}")
    return found


def columns_at(
    record: bytes | memoryview, found: Mapping[str, tuple[int, int]], columns: Columns
) -> dict[str, np.ndarray]:
    """The columns whose places are known, as views."""
    parsed = {}
    for name, (dtype, shape) in columns.items():
        start, stop = found[name]
        width = math.prod(shape)
        rows = (stop - start) // int(np.dtype(dtype).itemsize * width)
        parsed[name] = np.frombuffer(record, dtype, rows * width, start).reshape(rows, *shape)
    return parsed


def _fields(record: bytes | memoryview, message: tuple[int, int], field: int) -> list[tuple[int, int]]:
    """Where the contents of the length-delimited fields of a number are in a message, which has no other kinds."""
    at, stop = message
    found = []
    while at < stop:
        tag, length, shift, byte = record[at], 0, 0, 128
        while byte & 128:
            at += 1
            if at >= stop:
                raise ValueError("it ends within a length")
            byte = record[at]
            length, shift = length | (byte & 127) << shift, shift + 7
        at += 1
        if tag & 7 != 2 or at + length > stop:
            raise ValueError("it is no record of a block")
        if tag >> 3 == field:
            found.append((at, at + length))
        at += length
    return found


def _frame(field: int, pieces: list[Any], length: int) -> tuple[list[Any], int]:
    """Pieces behind the tag and the length of a length-delimited field."""
    head = bytearray([field << 3 | 2])
    rest = length
    while rest > 127:
        head.append(rest & 127 | 128)
        rest >>= 7
    head.append(rest)
    return [bytes(head), *pieces], length + len(head)


def shard_name(name: str, split: str, index: int, count: int) -> str:
    """TFDS' file name of a shard."""
    return f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"


def write_shard(path: pathlib.Path, records: Iterable[bytes], compression: str) -> int:
    """Write a shard so that it is whole or absent; the checksum of its records before compression."""
    from array_record.python import array_record_module

    checksum, count = 0, 0
    with writing(path), whole(path) as temporary:
        try:
            writer = array_record_module.ArrayRecordWriter(str(temporary), _OPTIONS[compression])
            for record in records:
                writer.write(record)
                checksum, count = zlib.crc32(record, checksum), count + 1
            writer.close()
            if num_records(temporary) != count:
                raise OSError(f"{count} blocks were written, {num_records(temporary)} are there")
        except (RuntimeError, ValueError, IndexError) as error:
            raise OSError(str(error)) from error
    return checksum


def num_records(path: pathlib.Path) -> int:
    """Blocks in a shard."""
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path))
    count = reader.num_records()
    reader.close()
    return count


def write_metadata(
    output: pathlib.Path, name: str, widths: tuple[int, int], weighted: bool, shard_lengths: dict[str, list[int]]
) -> None:
    """TFDS' features.json, our hashes.json, and TFDS' dataset_info.json last: it makes the dataset count as finished.

    `widths` are those of dense and ids. The bytes are those that TFDS itself writes, which takes long to import.
    """
    write_whole(output / "features.json", _features_json(*widths, weighted).encode())
    write_hashes(output, shard_lengths)
    write_whole(output / "dataset_info.json", _info_json(output, name, shard_lengths).encode())


def _features_json(num_dense: int, num_slots: int, weighted: bool) -> str:
    """What `features(...).save_config` writes."""
    columns = {
        name: {
            "pythonClassName": f"{_TFDS}.tensor_feature.Tensor",
            "tensor": {
                "dtype": dtype,
                "encoding": "bytes",
                "shape": {"dimensions": [str(dim) for dim in (-1, *shape)]},
            },
        }
        for name, (dtype, shape) in _columns(num_dense, num_slots, weighted).items()
    }
    whole = {"featuresDict": {"features": columns}, "pythonClassName": f"{_TFDS}.features_dict.FeaturesDict"}
    return json.dumps(whole, indent=4)


def _info_json(output: pathlib.Path, name: str, shard_lengths: dict[str, list[int]]) -> str:
    """What `DatasetInfo.write_to_directory` writes; as protocol buffers do, it leaves out what is 0 or empty."""
    splits = []
    for split, lengths in shard_lengths.items():
        sizes = [(output / shard_name(name, split, i, len(lengths))).stat().st_size for i in range(len(lengths))]
        values = {
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "name": split,
            "numBytes": str(sum(sizes)),
            "shardLengths": [str(length) for length in lengths],
        }
        splits.append(values if lengths else {key: values[key] for key in ("filepathTemplate", "name")})
    info = {"description": _DESCRIPTION, "fileFormat": "array_record", "name": name, "splits": splits}
    return json.dumps(info | {"version": VERSION}, indent=2)
