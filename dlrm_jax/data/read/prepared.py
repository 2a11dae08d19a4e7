"""Reading a prepared dataset (blocks.py): blocks in a shuffled order, rows shuffled among the blocks of a window."""

import collections
import dataclasses
import json
import math
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from dlrm_jax.config import ConfigError
from dlrm_jax.data.prepare.blocks import BLOCK_ROWS, parse
from dlrm_jax.data.prepare.hashes import checked, require_lengths
from dlrm_jax.data.prepare.runs import Run, from_json, of_split, record_ends
from dlrm_jax.data.read.dataset import Dataset, Split
from dlrm_jax.data.read.windows import BlockOrder, read_windows
from dlrm_jax.data.schema.schema import SPLITS, Schema
from dlrm_jax.data.schema.schema_io import from_dict as schema_from_dict
from dlrm_jax.data.schema.schema_io import to_dict
from dlrm_jax.data.values.label_values import only_label

OPEN_SHARDS = 128
"""Files that a split keeps open: a day's log has thousands of shards, and a process may have 1,024 files open."""

WINDOW_BLOCKS = 32
"""Blocks whose rows are shuffled together: 131,072 rows, 22 MB for Criteo's columns."""
WINDOW_ROWS = WINDOW_BLOCKS * BLOCK_ROWS


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """Rows on disk. Blocks come in an order from (seed, epoch); rows are permuted within each run of 32 blocks.

    Block b has the rows from `first` + b * BLOCK_ROWS of the split on. It is one record, but where the dataset grew or
    was split by periods: there it may be parts of some.
    """

    name: str
    blocks: Any
    """A random access source of records, as TFDS' as_data_source gives it."""
    num_rows: int
    limit_K: np.ndarray
    """Rows of the table that each slot's ids name."""
    ends: np.ndarray
    """At which row of the split each record ends."""
    only_label: int | None = None
    """See dataset.Rows."""
    first: int = 0
    """The split's row at which these begin."""

    def __len__(self) -> int:
        return self.num_rows

    def windows(self, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[tuple[Split, np.ndarray]]:
        """See dataset.Rows."""
        return read_windows(self.order, self.read, seed, epoch, shuffle, start)

    def positions(self, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[np.ndarray]:
        """See dataset.Rows."""
        return self.order.positions(seed, epoch, shuffle, start)

    def whole(self) -> Split:
        """See dataset.Rows."""
        return self.read(np.arange(self.order.num_blocks))

    @property
    def order(self) -> BlockOrder:
        """How an epoch visits the blocks."""
        return BlockOrder(self.num_rows, BLOCK_ROWS, WINDOW_BLOCKS)

    def read(self, group: np.ndarray) -> Split:
        """Some blocks, one after the other, in memory."""
        if not len(group):
            none = np.zeros(0, np.float32)
            return Split(none[:, None], np.zeros((0, len(self.limit_K)), np.int32), none, none.astype(np.int64))
        records: dict[int, dict[str, np.ndarray]] = {}
        pieces = [piece for block in group.tolist() for piece in self._pieces(block, records)]
        columns = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
        dense_RxN = columns.get("dense", np.zeros((len(columns["label"]), 0), np.float32))
        return Split(dense_RxN, columns["ids"], columns["label"], columns["row"], columns.get("weight"))

    def part(self, first: int, num_rows: int, only_label: int | None) -> "PreparedSplit":
        """Some rows that follow each other."""
        return dataclasses.replace(self, first=self.first + first, num_rows=num_rows, only_label=only_label)

    def _pieces(self, block: int, records: dict[int, dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """The rows of a block, from the records that have them; `records` are those read already."""
        start = self.first + block * BLOCK_ROWS
        stop = min(start + BLOCK_ROWS, self.first + self.num_rows)
        for index in range(int(np.searchsorted(self.ends, start, "right")), int(np.searchsorted(self.ends, stop)) + 1):
            begin = int(self.ends[index - 1]) if index else 0
            if index not in records:
                records[index] = self._record(index, int(self.ends[index]) - begin)
            rows = slice(max(start - begin, 0), stop - begin)
            yield {key: column[rows] for key, column in records[index].items()}

    def _record(self, index: int, size: int) -> dict[str, np.ndarray]:
        try:
            block = self.blocks[index]
        except Exception as error:  # What a damaged shard raises depends on where it is damaged.
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"block {index} of split {self.name!r} cannot be read: {reason}; prepare it anew"
            ) from error
        if len(block["label"]) != size:
            raise ConfigError(f"block {index} of split {self.name!r} has {len(block['label'])} rows; prepare it anew")
        ids_RxK = block["ids"]
        if ids_RxK.shape[1] != len(self.limit_K) or (_largest(ids_RxK) >= self.limit_K).any() or ids_RxK.min() < -1:
            raise ConfigError(f"block {index} of split {self.name!r} holds ids outside their tables; prepare it anew")
        return block


def _largest(ids_RxK: np.ndarray) -> np.ndarray:
    """The largest id of each slot; many rows are taken as one wide one, as NumPy is slow where rows are narrow."""
    rows, slots = ids_RxK.shape
    wide = math.gcd(rows, 64)
    return ids_RxK.reshape(rows // wide, wide * slots).max(axis=0).reshape(wide, slots).max(axis=0)


class _Blocks:
    """The records of one split's shards, opened when first read, the last used kept open; by any thread."""

    def __init__(self, paths: list[pathlib.Path], lengths: list[int], spec: Any) -> None:
        self._paths, self._ends = paths, np.cumsum(lengths)
        self._columns = {name: (np.dtype(column.np_dtype), column.shape[1:]) for name, column in spec.items()}
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return parse(self.record(index), self._columns)

    def record(self, index: int) -> bytes:
        """A block as it is stored."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        offset = index - (int(self._ends[shard - 1]) if shard else 0)
        record: bytes = self._reader(shard).read([offset])[0]
        return record

    def _reader(self, shard: int) -> Any:
        from array_record.python import array_record_module

        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = array_record_module.ArrayRecordReader(str(self._paths[shard]))
                if len(self._readers) > OPEN_SHARDS:
                    self._readers.popitem(last=False)  # Its file is closed once the last thread has read from it.
            self._readers.move_to_end(shard)
            return self._readers[shard]


def is_prepared(directory: pathlib.Path) -> bool:
    """Whether `directory` holds a finished dataset."""
    return (directory / "dataset_info.json").exists() and (directory / "schema.json").exists()


def read_schema(directory: pathlib.Path) -> Schema:
    """The schema of a prepared dataset."""
    return schema_from_dict(read_json(directory / "schema.json"), str(directory / "schema.json"))


def read_json(path: pathlib.Path) -> Any:
    """A JSON file of a prepared dataset; ConfigError if it is none, or was changed."""
    try:
        return json.loads(checked(path.parent, path.name).read_text())
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}; prepare the dataset anew") from error


def open_prepared(directory: pathlib.Path) -> Dataset:
    """A prepared dataset; rows are read as they are needed."""
    import tensorflow_datasets as tfds  # Half a second to import.

    schema, statistics = read_schema(directory), read_json(directory / "statistics.json")
    checked(directory, "features.json")
    try:
        builder = tfds.builder_from_directory(directory)
        shards = {
            name: list(zip(map(pathlib.Path, info.filepaths), info.shard_lengths, strict=True))
            for name, info in builder.info.splits.items()
        }
    except Exception as error:  # TFDS raises many kinds for damaged metadata.
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{directory} is not a whole dataset: {reason}; prepare it anew") from error
    require_lengths(directory, {name: [length for _, length in of_split] for name, of_split in shards.items()})
    features = schema.features()
    sizes = {name: statistics["tables"][name]["rows"] for name in schema.tables()}
    limit_K = np.repeat([sizes[f.table] for f in features], [f.hotness for f in features])
    splits = {}
    for name in SPLITS:
        paths = [path for path, _ in shards.get(name, ())]
        for path in paths:
            if not path.is_file():
                raise ConfigError(f"{path} is missing; prepare the dataset anew")
        blocks = _Blocks(paths, [length for _, length in shards.get(name, ())], builder.info.features)
        counts = statistics["splits"][name]
        only = only_label(counts["rows"], counts.get("positives"), counts["positive_rate"])
        runs = [Run(name, counts["rows"], 0)]  # As older versions had them.
        if "runs" in statistics:
            runs = of_split(from_json(statistics["runs"]), name)
        splits[name] = PreparedSplit(name, blocks, counts["rows"], limit_K, record_ends(runs), only)
    return Dataset(
        name=schema.name,
        # What was prepared by older versions has a column of ones where the log has no numbers.
        dense_names=tuple(d.name for d in schema.dense) or ("constant",) * ("dense" in builder.info.features),
        embedded_columns=tuple(i for i, dense in enumerate(schema.dense) if dense.embed),
        features=features,
        table_sizes=sizes,
        splits=splits,
        schema=to_dict(schema),
        directory=directory,
        checksum="-".join(statistics["splits"][name]["checksum"] for name in SPLITS),
    )


def in_memory(dataset: Dataset) -> Dataset:
    """A prepared dataset with its rows in memory: an epoch shuffles them as a whole, not window by window."""
    return dataclasses.replace(
        dataset, splits={name: split.whole() for name, split in dataset.splits.items()}, checksum=""
    )
