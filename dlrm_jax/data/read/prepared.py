"""Reading a prepared dataset (blocks.py): blocks in a shuffled order, rows shuffled among the blocks of a window."""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from dlrm_jax.config import EMPTY_SLOT, ConfigError
from dlrm_jax.data.prepare.blocks import BLOCK_ROWS
from dlrm_jax.data.prepare.hashes import checked, require_lengths
from dlrm_jax.data.prepare.runs import Run, from_json, of_split, record_ends
from dlrm_jax.data.read import native
from dlrm_jax.data.read.dataset import Dataset, Split
from dlrm_jax.data.read.native import address
from dlrm_jax.data.read.shards import Shards
from dlrm_jax.data.read.unread import Stretch, Unread
from dlrm_jax.data.read.windows import BlockOrder, concatenate, read_windows, slice_rows
from dlrm_jax.data.schema.schema import SPLITS, Schema
from dlrm_jax.data.schema.schema_io import from_dict as schema_from_dict
from dlrm_jax.data.schema.schema_io import to_dict
from dlrm_jax.data.values.label_values import only_label

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
    blocks: Shards
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

    @property
    def maker(self) -> None:
        """See dataset.Rows."""
        return None

    def windows(self, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[tuple[Split, np.ndarray]]:
        """See dataset.Rows."""
        return read_windows(self.order, self.read, seed, epoch, shuffle, start)

    def sources(self, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[tuple[Any, np.ndarray]]:
        """See dataset.Rows."""
        if self.library is None:
            return self.windows(seed, epoch, shuffle, start)
        visits = (visit() for visit in self.order.visits(seed, epoch, shuffle, start))
        return ((self._unread(blocks_G), order_R) for blocks_G, order_R in visits)

    def positions(self, seed: int, epoch: int, shuffle: bool, start: int = 0) -> Iterator[np.ndarray]:
        """See dataset.Rows."""
        return self.order.positions(seed, epoch, shuffle, start)

    def whole(self) -> Split:
        """See dataset.Rows."""
        return self.read(np.arange(self.order.num_blocks))

    @property
    def order(self) -> BlockOrder:
        """How an epoch visits the blocks."""
        return BlockOrder(self.num_rows, BLOCK_ROWS, WINDOW_BLOCKS, self.library)

    def read(self, group: np.ndarray) -> Split:
        """Some blocks, one after the other, in memory."""
        stretches = list(self._stretches(group))
        records = self._records(list(dict.fromkeys(stretch.record for stretch in stretches)))
        parts = [slice_rows(records[record], first, last) for record, first, last, *_ in stretches]
        return concatenate([self._split(self.blocks.none()), *parts])

    def _unread(self, group: np.ndarray) -> Unread:
        assert self.library is not None
        none, stretches = self._split(self.blocks.none()), list(self._stretches(group))
        return Unread(none, stretches, self._records, self.library, self.blocks, self._limit_K)

    @property
    def library(self) -> Any:
        """What reads blocks faster; not worth compiling for a split that a window holds."""
        return native.library() if self.num_rows > WINDOW_BLOCKS * BLOCK_ROWS else None

    def part(self, first: int, num_rows: int, only_label: int | None) -> "PreparedSplit":
        """Some rows that follow each other."""
        return dataclasses.replace(self, first=self.first + first, num_rows=num_rows, only_label=only_label)

    def _stretches(self, group: np.ndarray) -> Iterator[Stretch]:
        """The rows of some blocks, one after the other, by the records that have them."""
        at = 0
        for block in group.tolist():
            start = self.first + block * BLOCK_ROWS
            stop = min(start + BLOCK_ROWS, self.first + self.num_rows)
            record, last = np.searchsorted(self.ends, (start, stop - 1), "right").tolist()
            for index in range(record, last + 1):
                begin, end = self._begin(index), int(self.ends[index])
                stretch = Stretch(index, max(start, begin) - begin, min(stop, end) - begin, at, end - begin)
                at += stretch.stop - stretch.start
                yield stretch

    def _begin(self, index: int) -> int:
        return int(self.ends[index - 1]) if index else 0

    def _records(self, indices: list[int]) -> dict[int, Split]:
        blocks, records = self.blocks.blocks(indices, self.library), {}
        for index in indices:
            try:
                block = next(blocks)
            except Exception as error:  # What a damaged shard raises depends on where it is damaged.
                reason = " ".join(str(error).split())[:200]
                raise ConfigError(
                    f"block {index} of split {self.name!r} cannot be read: {reason}; prepare it anew"
                ) from error
            records[index] = self._checked(index, block, int(self.ends[index]) - self._begin(index))
        return records

    def _checked(self, index: int, block: dict[str, np.ndarray], size: int) -> Split:
        if len(block["label"]) != size:
            raise ConfigError(f"block {index} of split {self.name!r} has {len(block['label'])} rows; prepare it anew")
        if self._any_outside(block["ids"]):
            raise ConfigError(f"block {index} of split {self.name!r} holds ids outside their tables; prepare it anew")
        return self._split(block)

    @staticmethod
    def _split(block: dict[str, np.ndarray]) -> Split:
        dense_RxN = block["dense"] if "dense" in block else np.zeros((len(block["label"]), 0), np.float32)
        return Split(dense_RxN, block["ids"], block["label"], block["row"], block.get("weight"))

    def _any_outside(self, ids_RxK: np.ndarray) -> bool:
        if ids_RxK.shape[1] != len(self.limit_K):
            return True
        if self.library is None:
            return bool((_largest(ids_RxK) >= self.limit_K).any() or ids_RxK.min() < EMPTY_SLOT)
        return bool(self.library.dlrm_any_outside(address(ids_RxK), *ids_RxK.shape, address(self._limit_K)))

    @functools.cached_property
    def _limit_K(self) -> np.ndarray:
        """The limits as C++ has them."""
        return np.minimum(self.limit_K, 2**31).astype(np.uint32)


def _largest(ids_RxK: np.ndarray) -> np.ndarray:
    """The largest id of each slot; many rows are taken as one wide one, as NumPy is slow where rows are narrow."""
    rows, slots = ids_RxK.shape
    wide = math.gcd(rows, 64)
    return ids_RxK.reshape(rows // wide, wide * slots).max(axis=0).reshape(wide, slots).max(axis=0)


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
        blocks = Shards(paths, [length for _, length in shards.get(name, ())], builder.info.features)
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
