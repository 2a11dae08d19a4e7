"""The second pass of a preparation: staged rows become final ids, in shards that are whole or absent."""

import concurrent.futures
import dataclasses
import os
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from dlrm_jax.data.prepare import blocks
from dlrm_jax.data.prepare.final_ids import TablePlan, counting_groups, plan_table
from dlrm_jax.data.prepare.runs import Run, index_of_periods, of_split, shard_paths
from dlrm_jax.data.prepare.shards import ShardWriter
from dlrm_jax.data.prepare.splits import Splitter
from dlrm_jax.data.prepare.staging import Staging, wide_name
from dlrm_jax.data.prepare.statistics import Counts, summarise_table, top_ids
from dlrm_jax.data.prepare.vocabularies import describe_buckets, describe_ids, vocabulary_values, write_vocabulary
from dlrm_jax.data.schema.schema import SPLITS, Schema
from dlrm_jax.data.values import buckets
from dlrm_jax.data.values.dense import finish_dense
from dlrm_jax.data.values.file_names import file_names

_COUNT_BYTES = 20
"""What counting takes for an id: three counts, their sum, and room to grow."""
_MAX_COUNT_BYTES = 200 << 20
"""Of one core, unless a single table needs more."""


class SecondPass:
    """Vocabularies, statistics and shards of a staged log."""

    def __init__(
        self,
        schema: Schema,
        output: pathlib.Path,
        staging: Staging,
        num_files: int,
        splitter: Splitter,
        compression: str,
    ) -> None:
        self._schema, self._output, self._staging, self._splitter = schema, output, staging, splitter
        self._num_files, self._compression = num_files, compression
        self._tables = schema.tables()
        self._file_names = file_names(self._tables)
        self._counts = Counts(schema, staging, num_files, splitter)
        self._plans: dict[str, TablePlan] = {}
        self._least = float("inf")
        self._remaps: list[tuple[slice, np.ndarray]] = []
        self.runs: list[Run] = []

    def run(self, progress: Callable[[int], None]) -> dict[str, Any]:
        """Write everything but TFDS' metadata; the statistics. `progress(rows)` is told of rows written."""
        self._counts.count_rows()
        torchrec = [i for i, dense in enumerate(self._schema.dense) if dense.transform == "torchrec_log"]
        self._least = min((self._counts.dense[i].least for i in torchrec), default=float("inf"))
        tables = self._finish_tables()
        self._remaps = self._slot_remaps()
        runs = self._laid_out()
        names = ["row", "label", "dense", "ids", *(["weight"] if self._schema.weight else [])]
        names += [*self._splitter.columns, *map(wide_name, self._counts.dense)]
        writer = ShardWriter(
            self._staging, self._splitter, self._counts.rows_FxP, names, self._finish, self._compression
        )
        paths = shard_paths(self._output, self._schema.name, runs)
        self.runs = writer.write(list(zip(runs, paths, strict=True)), progress)
        return {
            "splits": {name: _summary(of_split(self.runs, name)) for name in SPLITS},
            "runs": [run.as_json() for run in self.runs],
            "periods": self._periods(),
            "features": self._feature_statistics(),
            "tables": tables,
            "dense": {
                self._schema.dense[i].name: dataclasses.asdict(own)
                for i, own in self._counts.dense.items()
                if own.count
            },
            "dense_columns": {
                dense.name: counted.summary()
                for dense, counted in zip(self._schema.dense, self._counts.ranges, strict=True)
            },
        } | self._counts.time_bins.summary()

    def _laid_out(self) -> list[Run]:
        """The runs of this log, in the order in which they lie in their splits; those of no row are none."""
        counts = zip(
            self._splitter.parts,
            self._counts.rows_FxP.sum(axis=0).tolist(),
            self._counts.positives_P.tolist(),
            strict=True,
        )
        runs, place = [], 0
        for part, rows, positives in counts:
            if rows:
                # A period may change its split, so that its place among all rows counts.
                offset = place % blocks.BLOCK_ROWS if self._splitter.periods else 0
                runs.append(Run.planned(part, rows, positives, offset))
            place += rows
        return runs

    def _periods(self) -> list[dict[str, Any]]:
        periods = self._splitter.periods
        return index_of_periods(self.runs, periods) if periods else []

    def _finish_tables(self) -> dict[str, dict[str, Any]]:
        """Statistics of all tables, in groups that are dealt out to the cores."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            found = {name: out for group in pool.map(self._finish_group, self._groups()) for name, out in group.items()}
        return {name: found[name] for name in self._tables}

    def _groups(self) -> list[list[int]]:
        """Tables that are counted in one reading of the ids: as many as a core's memory for counts holds."""
        keys = self._staging.num_keys(self._num_files)
        tables = enumerate(self._tables.values())
        num_bytes = [_COUNT_BYTES * (keys[i] or features[0].size or features[0].modulo) for i, features in tables]
        return counting_groups(num_bytes, os.cpu_count() or 1, _MAX_COUNT_BYTES)

    def _finish_group(self, group: list[int]) -> dict[str, dict[str, Any]]:
        names = [list(self._tables)[i] for i in group]
        counts = self._counts.count_tables([self._tables[name] for name in names])
        to_split_SxG = np.asarray([[part.split == name for part in self._splitter.groups] for name in SPLITS], int)
        counts = [to_split_SxG @ counts_GxV for counts_GxV in counts]
        return {name: self._finish_table(i, name, c) for i, name, c in zip(group, names, counts, strict=True)}

    def _finish_table(self, index: int, name: str, counts_SxV: np.ndarray) -> dict[str, Any]:
        """Give a table its final ids and write its vocabulary; its statistics."""
        features = self._tables[name]
        values: pa.Array | None = None
        if features[0].is_quantile:
            return self._finish_quantiles(index, name, counts_SxV)
        if features[0].ids == "vocabulary":
            values = vocabulary_values(self._staging, self._num_files, index, features[0])
        plan, kept = plan_table(features, counts_SxV, values)
        self._plans[name] = plan
        if values is None:
            final_SxV = _widened(counts_SxV, plan.rows)
        else:
            num_keys = len(values)
            padded_SxV = _widened(counts_SxV, num_keys)
            first = int(features[0].oov)
            final_SxV = np.zeros((3, plan.rows), counts_SxV.dtype)
            final_SxV[:, first : first + len(kept)] = padded_SxV[:, kept]
            infrequent_S = padded_SxV.sum(axis=1) - padded_SxV[:, kept].sum(axis=1)
            if first:
                final_SxV[:, 0] = infrequent_S
            values = values.take(pa.array(kept))
            path = self._output / "vocabularies" / f"{self._file_names[name]}.parquet"
            write_vocabulary(path, values, final_SxV.sum(axis=0)[first:], first)
        top = top_ids(final_SxV.sum(axis=0))
        out = summarise_table(final_SxV, top, describe_ids(top, values, int(features[0].oov)))
        if values is not None:
            out["infrequent_values"] = num_keys - len(kept)
            out["coverage"] = {
                split: round(1 - float(infrequent_S[i] / padded_SxV[i].sum()), 6) if padded_SxV[i].sum() else None
                for i, split in enumerate(SPLITS)
            }
        return out

    def _finish_quantiles(self, index: int, name: str, counts_SxV: np.ndarray) -> dict[str, Any]:
        """Give a table of quantile buckets its edges, of the rows for training, and its final ids; its statistics."""
        rule = self._tables[name][0]
        numbers_V = vocabulary_values(self._staging, self._num_files, index, rule).to_numpy()
        counts_SxV = _widened(counts_SxV, len(numbers_V))
        edges_E = buckets.edges(numbers_V, counts_SxV[0], rule.size)
        bucket_V = buckets.among(edges_E, numbers_V)
        self._plans[name] = TablePlan(rule.size, np.append(bucket_V, np.int32(-1)))
        final_SxV = np.stack([np.bincount(bucket_V, counts_V, rule.size) for counts_V in counts_SxV]).astype(np.int64)
        top = top_ids(final_SxV.sum(axis=0))
        return summarise_table(final_SxV, top, describe_buckets(top, edges_E)) | {"edges": edges_E.tolist()}

    def _feature_statistics(self) -> dict[str, Any]:
        metas = [self._staging.meta(file) for file in range(self._num_files)]
        rows = self._splitter.num_rows
        out = {}
        for i, feature in enumerate(self._schema.sparse):
            count = self._counts.features[feature.name]
            out[feature.name] = {
                "table": feature.table_name,
                "hotness": feature.hotness,
                "mean_hotness": round(count.lookups / rows, 6),
                "empty_share": round(count.empty / rows, 6),
                "truncated_ids": sum(meta["truncated"][i] for meta in metas),
            }
        return out

    def _slot_remaps(self) -> list[tuple[slice, np.ndarray]]:
        """(slots of a feature, how their ids change), where they change."""
        remaps, start = [], 0
        for feature in self._schema.sparse:
            remap_V = self._plans[feature.table_name].remap_V
            if remap_V is not None:
                remaps.append((slice(start, start + feature.hotness), remap_V))
            start += feature.hotness
        return remaps

    def _finish(self, columns: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
        if rows[-1] - rows[0] + 1 == len(rows):  # Mostly they follow each other: views instead of copies.
            columns = {name: column[rows[0] : rows[-1] + 1] for name, column in columns.items()}
        else:
            columns = {name: column[rows] for name, column in columns.items()}
        dense_RxN, ids_RxK = columns["dense"], columns["ids"]
        for i, statistics in self._counts.dense.items():
            dense_RxN = dense_RxN if dense_RxN.flags.writeable else dense_RxN.copy()
            values = columns[wide_name(i)]
            dense_RxN[:, i] = finish_dense(self._schema.dense[i], values, statistics, self._least)
        for slots, remap_V in self._remaps:
            ids_RxK = ids_RxK if ids_RxK.flags.writeable else ids_RxK.copy()
            ids_RxK[:, slots] = remap_V[ids_RxK[:, slots]]
        kept = {name: column for name, column in columns.items() if name in ("label", "row", "weight")}
        return ({"dense": dense_RxN} if self._schema.dense else {}) | {"ids": ids_RxK} | kept


def _widened(counts_SxV: np.ndarray, rows: int) -> np.ndarray:
    """Counts of `rows` ids; those beyond what was counted never occurred."""
    if counts_SxV.shape[1] >= rows:
        return counts_SxV[:, :rows]
    return np.pad(counts_SxV, ((0, 0), (0, rows - counts_SxV.shape[1])))


def _summary(runs: list[Run]) -> dict[str, Any]:
    """A split as statistics.json has it."""
    rows, positives = sum(run.rows for run in runs), sum(run.positives for run in runs)
    checksums = [checksum for run in runs for _, checksum in run.shards]
    return {
        "rows": rows,
        "positives": positives,
        "positive_rate": round(positives / rows, 6) if rows else None,
        "shards": len(checksums),
        "checksum": f"{zlib.crc32(np.asarray(checksums, np.uint32).tobytes()):08x}",
    }
