"""The second pass of a preparation: staged rows become final ids, in shards that are whole or absent."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from dlrm_jax.data.prepare import blocks
from dlrm_jax.data.prepare.final_ids import TablePlan, counting_groups, plan_table
from dlrm_jax.data.prepare.splits import Splitter
from dlrm_jax.data.prepare.staging import Staging, wide_name, write_whole
from dlrm_jax.data.prepare.statistics import Counts, summarise_table, top_ids
from dlrm_jax.data.prepare.vocabularies import describe_buckets, describe_ids, vocabulary_values, write_vocabulary
from dlrm_jax.data.schema.schema import SPLITS, Schema
from dlrm_jax.data.values import buckets
from dlrm_jax.data.values.dense import finish_dense
from dlrm_jax.data.values.file_names import file_names

_BLOCKS_PER_SHARD = 64
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

    def run(self, progress: Callable[[int], None]) -> dict[str, Any]:
        """Write everything but TFDS' metadata; the statistics. `progress(rows)` is told of rows written."""
        self._counts.count_rows()
        torchrec = [i for i, dense in enumerate(self._schema.dense) if dense.transform == "torchrec_log"]
        self._least = min((self._counts.dense[i].least for i in torchrec), default=float("inf"))
        tables = self._finish_tables()
        self._remaps = self._slot_remaps()
        shards = self._write_shards(progress)
        return {
            "splits": {
                name: {
                    "rows": int(rows),
                    "positives": int(positives),
                    "positive_rate": round(float(positives / rows), 6) if rows else None,
                    "shards": len(shards[name]),
                    "checksum": _combine([checksum for _, checksum in shards[name]]),
                }
                for name, rows, positives in zip(
                    SPLITS, self._counts.rows_FxS.sum(axis=0), self._counts.positives_S, strict=True
                )
            },
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
            "positives_over_time": self._counts.time_bins,
        }

    def shard_lengths(self) -> dict[str, list[int]]:
        """Blocks in each shard of the splits that have rows."""
        lengths = {}
        for i, name in enumerate(SPLITS):
            rows = int(self._counts.rows_FxS[:, i].sum())
            num_blocks = -(-rows // blocks.BLOCK_ROWS)
            if num_blocks:
                starts = range(0, num_blocks, _BLOCKS_PER_SHARD)
                lengths[name] = [min(_BLOCKS_PER_SHARD, num_blocks - start) for start in starts]
        return lengths

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
        rows_S = self._counts.rows_FxS.sum(axis=0)
        out = {}
        for i, feature in enumerate(self._schema.sparse):
            count = self._counts.features[feature.name]
            rows = int(rows_S.sum())
            out[feature.name] = {
                "table": feature.table_name,
                "hotness": feature.hotness,
                "mean_hotness": round(float(count.lookups_S.sum() / rows), 6),
                "empty_share": round(float(count.empty_S.sum() / rows), 6),
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

    def _write_shards(self, progress: Callable[[int], None]) -> dict[str, list[tuple[int, int]]]:
        """Write the shards that are missing: (rows, checksum) of each, by split."""
        written = 0
        shards: dict[str, list[tuple[int, int]]] = {name: [] for name in SPLITS}
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            futures = [
                (name, pool.submit(self._write_shard, split, i, len(lengths), length))
                for split, (name, lengths) in self._numbered_lengths()
                for i, length in enumerate(lengths)
            ]
            try:
                for name, future in futures:
                    shards[name].append(future.result())
                    written += shards[name][-1][0]
                    progress(written)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return shards

    def _numbered_lengths(self) -> list[tuple[int, tuple[str, list[int]]]]:
        return [(SPLITS.index(name), (name, lengths)) for name, lengths in self.shard_lengths().items()]

    def _write_shard(self, split: int, index: int, count: int, num_blocks: int) -> tuple[int, int]:
        name = blocks.shard_name(self._schema.name, SPLITS[split], index, count)
        path, note = self._output / name, self._staging.directory / f"{name}.json"
        if path.exists() and note.exists():
            done = json.loads(note.read_text())
            return done["rows"], done["checksum"]
        start = index * _BLOCKS_PER_SHARD * blocks.BLOCK_ROWS
        total = int(self._counts.rows_FxS[:, split].sum())
        rows = min(total - start, num_blocks * blocks.BLOCK_ROWS)
        checksum = blocks.write_shard(path, self._records(split, start, start + rows), self._compression)
        write_whole(note, json.dumps({"rows": rows, "checksum": checksum}).encode())
        return rows, checksum

    def _records(self, split: int, start: int, stop: int) -> Iterator[bytes]:
        """Serialized blocks of the split's rows `start` to `stop`."""
        held: list[dict[str, np.ndarray]] = []
        for part in self._parts(split, start, stop):
            held.append(part)
            count = sum(len(piece["label"]) for piece in held)
            if count >= blocks.BLOCK_ROWS:
                block = {key: _joined([piece[key] for piece in held]) for key in part}
                yield blocks.serialize({key: column[: blocks.BLOCK_ROWS] for key, column in block.items()})
                held = [{key: column[blocks.BLOCK_ROWS :] for key, column in block.items()}]
        if held and any(len(piece["label"]) for piece in held):
            yield blocks.serialize({key: _joined([piece[key] for piece in held]) for key in held[0]})

    def _parts(self, split: int, start: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
        """The split's rows `start` to `stop`, finished, at most a block at once: so they stay in the cache."""
        first = 0
        for file, count in enumerate(self._counts.rows_FxS[:, split]):
            if first + count > start and first < stop:
                position = first
                for i, columns in enumerate(self._staging.batches(file, self._staged_names())):
                    codes = self._splitter.codes(file, i, columns)
                    mine = np.flatnonzero(np.broadcast_to(codes, columns["label"].shape) == split)
                    rows = mine[max(start - position, 0) : max(stop - position, 0)]
                    position += len(mine)
                    for piece in range(0, len(rows), blocks.BLOCK_ROWS):
                        yield self._finish(columns, rows[piece : piece + blocks.BLOCK_ROWS])
            first += int(count)

    def _staged_names(self) -> list[str]:
        names = ["row", "label", "dense", "ids", *(["weight"] if self._schema.weight else [])]
        return [*names, *self._splitter.columns, *map(wide_name, self._counts.dense)]

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


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _combine(checksums: list[int]) -> str:
    return f"{zlib.crc32(np.asarray(checksums, np.uint32).tobytes()):08x}"
