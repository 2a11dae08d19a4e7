"""What a prepared dataset keeps beside its rows, so that a later preparation can go on from it (`--extend`).

    growth.json             where the log ended, and the sums that its statistics are made of, as exact numbers
    counts/TABLE.parquet    how often each value, in order of first appearance, or each id occurs in each group of rows
                            (splits.Splitter.groups); `id` is that of a value, -1 of one that is too rare to have one

A value that has an id stands in vocabularies/TABLE.parquet, and is left out here.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlrm_jax.config import ConfigError, require
from dlrm_jax.data.prepare.hashes import HASHES, checked
from dlrm_jax.data.prepare.runs import Part, Run, from_json, shard_paths
from dlrm_jax.data.prepare.staging import write_whole, writing
from dlrm_jax.data.prepare.time_bins import TimeBins
from dlrm_jax.data.read.prepared import read_json
from dlrm_jax.data.read.raw_values import read_vocabulary
from dlrm_jax.data.schema.schema import Schema
from dlrm_jax.data.schema.sparse import Sparse
from dlrm_jax.data.values.dense import DenseRange, DenseStatistics
from dlrm_jax.data.values.file_names import file_names
from dlrm_jax.data.values.hashing import hash_strings
from dlrm_jax.data.values.periods import Periods
from dlrm_jax.host.files import whole

GROWTH = "growth.json"
_KINDS = {"string": pa.large_string(), "hex": pa.uint64(), "int": pa.int64(), "number": pa.float64()}
_COUNTS = "counts"


@dataclasses.dataclass(frozen=True)
class Past:
    """The dataset that grows, as it was prepared; of one that is new, nothing. Values of its JSON files as they are."""

    schema: Schema
    directory: pathlib.Path | None = None
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    growth: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, directory: pathlib.Path, schema: Schema) -> "Past":
        """That of a finished dataset; ConfigError where it was changed, or prepared by a version that kept nothing."""
        require(
            all((directory / name).is_file() for name in (GROWTH, HASHES)),
            f"{directory} was prepared by an older version, which kept no counts to go on from; prepare it anew",
        )
        return cls(schema, directory, read_json(directory / "statistics.json"), read_json(directory / GROWTH))

    @property
    def runs(self) -> list[Run]:
        """Its runs."""
        return from_json(self.statistics.get("runs", ()))

    @property
    def rows(self) -> int:
        """Its rows."""
        return sum(run.rows for run in self.runs)

    @property
    def next_row(self) -> int:
        """The number of the next row of the log, those left out counted."""
        return int(self.growth.get("next_row", 0))

    @property
    def periods(self) -> Periods | None:
        """The periods that it is split by."""
        found = self.growth.get("period")
        return Periods(**found) if found else None

    def shard_paths(self) -> list[list[pathlib.Path]]:
        """The files of each run's shards."""
        return shard_paths(self.directory, self.schema.name, self.runs) if self.directory else []

    def time_bins(self) -> TimeBins:
        """The counts over time to go on from."""
        if not self.statistics:
            return TimeBins()
        names = ("bin_width", "positives_over_time", "time_range")
        width, bins, span = (self.statistics[name] for name in names)
        return TimeBins(width, bins, *span)

    def ranges(self) -> list[DenseRange]:
        """The ranges of the dense columns to go on from."""
        return [DenseRange(**self.growth.get("ranges", {}).get(dense.name, {})) for dense in self.schema.dense]

    def dense(self, fitted: bool = False) -> dict[int, DenseStatistics]:
        """The statistics of the columns that need them: those to go on from, or those that transforms use."""
        found = (self.statistics if fitted else self.growth).get("dense", {})
        columns = enumerate(self.schema.dense)
        return {i: DenseStatistics(**found.get(d.name, {})) for i, d in columns if d.needs_statistics}

    def num_keys(self, table: str) -> int:
        """How many values a table's vocabulary has, those without an id counted."""
        return int(self.growth.get("tables", {}).get(table, {}).get("keys", 0))

    def known(self, table: str, rule: Sparse, groups: list[Part]) -> "Known":
        """What is kept of a table, counted by `groups`."""
        kind = _KINDS[rule.value_type]
        if self.directory is None:
            none = np.zeros((len(groups), 0), np.int32)
            return Known(pa.array([], kind), np.zeros(0, np.int32), none, np.zeros(len(groups), np.int64), 0)
        found, to_groups = self._read(table), self._regrouped(groups)
        columns = [found[f"group_{i}"].to_numpy() for i in range(to_groups.shape[1])]
        kept = self.growth["tables"].get(table, {})
        ids_V = found["id"].to_numpy() if "id" in found.column_names else np.zeros(0, np.int32)
        return Known(
            self._values(table, rule, found) if "value" in found.column_names else pa.array([], kind),
            ids_V,
            to_groups @ np.stack(columns),
            to_groups @ np.asarray(kept["early"]) if "early" in kept else np.zeros(len(groups), np.int64),
            to_groups @ np.asarray(kept["buckets"]) if "buckets" in kept else 0,
        )

    def _regrouped(self, groups: list[Part]) -> np.ndarray:
        """Which of `groups` each of the past's is, as a matrix; a period that is held out no more is train."""
        index = {_key(group): i for i, group in enumerate(groups)}
        before = [Part(*group) for group in self.growth["groups"]]
        out = np.zeros((len(groups), len(before)), np.int64)
        for i, group in enumerate(before):
            out[index.get(_key(group), 0), i] = 1
        return out

    def _values(self, table: str, rule: Sparse, found: pa.Table) -> pa.Array:
        """The values of a vocabulary, in order of first appearance."""
        kind = _KINDS[rule.value_type]
        rare = found["value"].combine_chunks().cast(kind)
        if rule.is_quantile:
            return rare
        assert self.directory is not None
        known = read_vocabulary(self.directory, self.schema, table).cast(kind)
        ids_V, first = found["id"].to_numpy(), int(rule.oov)
        num_ids = int((ids_V >= 0).sum())
        require(
            len(known) == num_ids,
            f"{self.directory}: the vocabulary of table {table!r} has {len(known):,} values, where {num_ids:,} have "
            "ids; a vocabulary must not shrink, so prepare the dataset anew",
        )
        # Of a rare value the place among the rare ones, behind all that are known.
        place_V = np.where(ids_V >= 0, ids_V - first, len(known) + np.cumsum(ids_V < 0) - 1)
        return pa.concat_arrays([known, rare.drop_null()]).take(pa.array(place_V))

    def keys(self, table: str, rule: Sparse) -> tuple[np.ndarray, np.ndarray | None]:
        """The keys and checks of a vocabulary's values, as `bags.read_bags` gives them."""
        if self.directory is None:
            return np.zeros(0, np.uint64), np.zeros(0, np.uint64) if rule.value_type == "string" else None
        values = self._values(table, rule, self._read(table))
        if rule.value_type == "string":
            return hash_strings(values), hash_strings(values, seed=1)
        return values.to_numpy().view(np.uint64), None

    def _read(self, table: str) -> pa.Table:
        assert self.directory is not None
        path = counts_path(self.directory, self.schema, table)
        try:
            return pq.read_table(checked(self.directory, f"{path.parent.name}/{path.name}"))
        except (OSError, pa.ArrowInvalid) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{path} cannot be read: {reason}; prepare the dataset anew") from error


@dataclasses.dataclass(frozen=True)
class Known:
    """A table of the past: values of a vocabulary by first appearance and their ids, -1 for none; counts of values, or
    of ids where there is no vocabulary, by group.

    `early_G` counts what occurred before its value was frequent enough for an id, `buckets_GxB` the ids of quantiles.
    """

    values: pa.Array
    ids_V: np.ndarray
    counts_GxV: np.ndarray
    early_G: np.ndarray
    buckets_GxB: np.ndarray | int


def _key(group: Part) -> str | int:
    return group.split if group.period is None else group.period


def write_counts(path: pathlib.Path, counts_GxV: np.ndarray, columns: Mapping[str, pa.Array]) -> None:
    """counts/TABLE.parquet; `columns` are `id` and `value`, where there are any."""
    path.parent.mkdir(exist_ok=True)
    # The same bytes, however they were counted.
    kind = np.int32 if counts_GxV.max(initial=0) < 2**31 else np.int64
    counts = {f"group_{i}": pa.array(counts_V.astype(kind, copy=False)) for i, counts_V in enumerate(counts_GxV)}
    with writing(path), whole(path) as temporary:
        pq.write_table(pa.table({**columns, **counts}), temporary, compression="zstd", use_dictionary=False)


def counts_path(output: pathlib.Path, schema: Schema, table: str) -> pathlib.Path:
    """Where the counts of a table are written."""
    return output / _COUNTS / f"{file_names(schema.tables())[table]}.parquet"


def write_growth(output: pathlib.Path, values: Mapping[str, Any]) -> None:
    """growth.json."""
    write_whole(output / GROWTH, json.dumps(values, indent=1).encode())
