"""Runs: rows of a prepared dataset that lie together, in shards of their own.

A split is its runs, one after the other: one from each preparation that brought it rows (`--extend`), and of a log that
is split by periods one for each period. `offset` says how full the block before is that the rows go on from: a run's
first record holds what fills it up, all others but the last a whole block. So the blocks of a split, counted from its
first row, are whole records wherever no rows have come between, and a split that grew has the blocks of one that was
prepared at once:

    5,000 rows, offset 0: records of 4,096 and 904 rows; then 6,000 more, offset 904: of 3,192 and 2,808
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dlrm_jax.data.prepare import blocks
from dlrm_jax.data.schema.schema import SPLITS
from dlrm_jax.data.values.periods import Periods

BLOCKS_PER_SHARD = 64


@dataclasses.dataclass(frozen=True)
class Part:
    """What a row belongs to: a split, and in a log that is split by periods the number of one."""

    split: str
    period: int | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """Rows of one part from one preparation; `shards` has the records of each shard, and its checksum once written."""

    split: str
    rows: int
    positives: int
    offset: int = 0
    period: int | None = None
    shards: tuple[tuple[int, int | None], ...] = ()

    @classmethod
    def planned(cls, part: Part, rows: int, positives: int, offset: int) -> "Run":
        """One whose shards are yet to be written."""
        run = cls(part.split, rows, positives, offset, part.period)
        starts = range(0, len(run.ends), BLOCKS_PER_SHARD)
        shards = tuple((min(BLOCKS_PER_SHARD, len(run.ends) - start), None) for start in starts)
        return dataclasses.replace(run, shards=shards)

    @property
    def part(self) -> Part:
        """What its rows belong to."""
        return Part(self.split, self.period)

    @property
    def ends(self) -> np.ndarray:
        """At which of its rows each record ends."""
        size = blocks.BLOCK_ROWS
        return np.append(np.arange(size - self.offset, self.rows, size), self.rows)

    def as_json(self) -> dict[str, Any]:
        """As statistics.json has it."""
        return dataclasses.asdict(self) | {"shards": [list(shard) for shard in self.shards]}

    @property
    def lengths(self) -> list[int]:
        """Records of each shard, as it was written."""
        return [records for records, _ in self.shards]


def from_json(values: Iterable[Mapping[str, Any]]) -> list[Run]:
    """Runs as statistics.json has them."""
    return [Run(**{**value, "shards": tuple(map(tuple, value["shards"]))}) for value in values]


def of_split(runs: Iterable[Run], split: str) -> list[Run]:
    """The runs of a split, in its order."""
    return [run for run in runs if run.split == split]


def record_ends(runs: Sequence[Run]) -> np.ndarray:
    """At which row each record of a split ends."""
    ends, start = [np.zeros(0, np.int64)], 0
    for run in runs:
        ends.append(start + run.ends)
        start += run.rows
    return np.concatenate(ends)


def shard_lengths(runs: Sequence[Run]) -> dict[str, list[int]]:
    """Records in each shard, by split, as TFDS has it."""
    lengths = {name: [n for run in of_split(runs, name) for n in run.lengths] for name in SPLITS}
    return {name: of for name, of in lengths.items() if of}


def shard_paths(directory: pathlib.Path, name: str, runs: Sequence[Run]) -> list[list[pathlib.Path]]:
    """The files of each run's shards; a split numbers its shards through."""
    count = {split: sum(len(run.shards) for run in of_split(runs, split)) for split in SPLITS}
    numbers = {split: iter(range(of)) for split, of in count.items()}
    return [
        [directory / blocks.shard_name(name, run.split, next(numbers[run.split]), count[run.split]) for _ in run.shards]
        for run in runs
    ]


def index_of_periods(runs: Iterable[Run], periods: Periods) -> list[dict[str, Any]]:
    """Each period as statistics.json has it: its name, when it begins, and which rows of which split it is.

    One that rows were added to later has two runs, which lie together.
    """
    out, first = [], dict.fromkeys(SPLITS, 0)
    for (split, period), of_period in itertools.groupby(runs, lambda run: (run.split, run.period)):
        together = list(of_period)
        rows, positives = (sum(getattr(run, field) for run in together) for field in ("rows", "positives"))
        assert period is not None
        values = {"name": periods.name(period), "start": periods.start(period), "split": split, "first": first[split]}
        out.append(values | {"rows": rows, "positives": positives})
        first[split] += rows
    return out
