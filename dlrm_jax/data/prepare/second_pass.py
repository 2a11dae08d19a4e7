"""The second pass of a preparation: staged rows become final ids, in shards that are whole or absent."""

import concurrent.futures
import dataclasses
import logging
import os
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from dlrm_jax.config import require
from dlrm_jax.data.prepare import blocks
from dlrm_jax.data.prepare.extend import notes, require_same_separators
from dlrm_jax.data.prepare.final_ids import counting_groups
from dlrm_jax.data.prepare.growth import Past
from dlrm_jax.data.prepare.runs import Part, Run, index_of_periods, of_split, shard_paths
from dlrm_jax.data.prepare.shards import ShardWriter
from dlrm_jax.data.prepare.splits import Splitter
from dlrm_jax.data.prepare.staging import Staging, wide_name, writing
from dlrm_jax.data.prepare.statistics import Counts
from dlrm_jax.data.prepare.tables import Finished, Finisher
from dlrm_jax.data.schema.schema import SPLITS, Schema
from dlrm_jax.data.values.dense import DenseStatistics, finish_dense
from dlrm_jax.host.files import link_or_copy

_LOG = logging.getLogger("dlrm_jax")
_COUNT_BYTES = 20
"""What counting takes for an id: three counts, their sum, and room to grow."""
_MAX_COUNT_BYTES = 200 << 20
"""Of one core, unless a single table needs more."""


class SecondPass:
    """Vocabularies, statistics and shards of a staged log, behind those of the past."""

    def __init__(
        self,
        schema: Schema,
        output: pathlib.Path,
        staging: Staging,
        num_files: int,
        splitter: Splitter,
        compression: str,
        past: Past,
        refit: bool,
    ) -> None:
        self._schema, self._output, self._staging, self._splitter = schema, output, staging, splitter
        self._num_files, self._compression, self._past, self._refit = num_files, compression, past, refit
        self._tables = schema.tables()
        self._counts = Counts(schema, staging, num_files, splitter, past)
        self._finisher = Finisher(schema, output, staging, num_files, splitter.groups, past, refit)
        self._finished: dict[str, Finished] = {}
        self._fitted: dict[int, DenseStatistics] = {}
        self._least = float("inf")
        self._remaps: list[tuple[slice, np.ndarray]] = []
        self.runs: list[Run] = []

    def run(self, progress: Callable[[int], None]) -> dict[str, Any]:
        """Write everything but TFDS' metadata; the statistics. `progress(rows)` is told of rows written."""
        self._counts.count_rows()
        self._fit()
        self._finished = self._finish_tables()
        self._check_lists()
        self._remaps = self._slot_remaps()
        self.runs = self._write(progress)
        periods = self._splitter.periods
        of_tables = [note for table in self._finished.values() for note in table.notes]
        return {
            "splits": {name: _summary(of_split(self.runs, name)) for name in SPLITS},
            "runs": [run.as_json() for run in self.runs],
            "periods": index_of_periods(self.runs, periods) if periods else [],
            "features": self._feature_statistics(),
            "tables": {name: table.statistics for name, table in self._finished.items()},
            "dense": {
                self._schema.dense[i].name: dataclasses.asdict(own) for i, own in self._fitted.items() if own.count
            },
            "dense_columns": {
                dense.name: counted.summary()
                for dense, counted in zip(self._schema.dense, self._counts.ranges, strict=True)
            },
            "notes": [*notes(self._past, self.runs, self._counts.dense, self._refit), *of_tables],
        } | self._counts.time_bins.summary()

    def growth(self) -> dict[str, Any]:
        """What a later preparation goes on from, beside the statistics (growth.py)."""
        periods, dense = self._splitter.periods, self._schema.dense
        return {
            "groups": [[group.split, group.period] for group in self._splitter.groups],
            "period": dataclasses.asdict(periods) if periods else None,
            "lookups": {name: [count.lookups, count.empty] for name, count in self._counts.features.items()},
            "ranges": {d.name: dataclasses.asdict(own) for d, own in zip(dense, self._counts.ranges, strict=True)},
            "dense": {dense[i].name: dataclasses.asdict(own) for i, own in self._counts.dense.items()},
            "tables": {name: table.kept for name, table in self._finished.items()},
        }

    def _fit(self) -> None:
        """Take the statistics that transforms use: of all rows, or those that the past used."""
        keep = self._past.directory is not None and not self._refit
        self._fitted = self._past.dense(fitted=True) if keep else self._counts.dense
        for i in (i for i, dense in enumerate(self._schema.dense) if dense.transform == "torchrec_log"):
            self._least = min(self._least, self._fitted[i].least)
        for i, own in self._counts.dense.items():
            dense = self._schema.dense[i]
            require(
                dense.transform != "torchrec_log" or not own.count or own.least > self._least - 2,
                f"column {dense.source}: its least number is {own.least:g}, and torchrec_log as the days before fitted "
                f"it is not defined at {self._least - 2:g} and below; give --refit, or prepare all days anew",
            )

    def _laid_out(self) -> list[tuple[Run, list[pathlib.Path]]]:
        """All runs in the order in which they lie in their splits, with the files of those that are there already.

        A period's split is that which it has now.
        """
        by_periods = self._splitter.periods is not None
        held_out = {part.period: part.split for part in self._splitter.groups}
        before = list(zip(self._past.runs, self._past.shard_paths(), strict=True))
        if by_periods:
            before = [(dataclasses.replace(run, split=held_out.get(run.period, "train")), f) for run, f in before]
        counts = zip(self._counts.rows_FxP.sum(axis=0).tolist(), self._counts.positives_P.tolist(), strict=True)
        new = {part: of for part, of in zip(self._splitter.parts, counts, strict=True) if of[0]}
        out: list[tuple[Run, list[pathlib.Path]]] = []
        place = 0
        for part in sorted({*new, *(run.part for run, _ in before)}, key=_place):
            # Blocks are counted from the first row of the split; or of all, since a period may change its split.
            place = place if by_periods else 0
            together = [(run, files) for run, files in before if run.part == part]
            place += sum(run.rows for run, _ in together)
            out += together
            if part in new:
                rows, positives = new[part]
                out.append((Run.planned(part, rows, positives, place % blocks.BLOCK_ROWS), []))
                place += rows
        return out

    def _write(self, progress: Callable[[int], None]) -> list[Run]:
        """Link the shards that are there, write the others; all runs with their checksums."""
        laid_out = self._laid_out()
        runs = [run for run, _ in laid_out]
        paths = shard_paths(self._output, self._schema.name, runs)
        linked = []
        for (_, files), targets in zip(laid_out, paths, strict=True):
            for source, target in zip(files, targets, strict=False):
                with writing(target):
                    linked.append(link_or_copy(source, target))
        if not all(linked):
            _LOG.warning("%d shards of the days before were copied: they cannot be linked there", linked.count(False))
        names = ["row", "label", "dense", "ids", *(["weight"] if self._schema.weight else [])]
        names += [*self._splitter.columns, *map(wide_name, self._counts.dense)]
        rows_FxP = self._counts.rows_FxP
        writer = ShardWriter(self._staging, self._splitter, rows_FxP, names, self._finish, self._compression)
        new = [(run, path) for (run, files), path in zip(laid_out, paths, strict=True) if not files]
        written = iter(writer.write(new, progress))
        return [run if files else next(written) for run, files in laid_out]

    def _finish_tables(self) -> dict[str, Finished]:
        """All tables, in groups that are dealt out to the cores."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            found = {name: out for group in pool.map(self._finish_group, self._groups()) for name, out in group.items()}
        return {name: found[name] for name in self._tables}

    def _check_lists(self) -> None:
        lookups = {}
        for name, count in self._counts.features.items():
            ids, empty = self._past.growth.get("lookups", {}).get(name, (0, 0))
            lookups[name] = count.lookups - ids, count.empty - empty
        require_same_separators(self._schema, self._past, lookups, self._splitter.num_rows)

    def _groups(self) -> list[list[int]]:
        """Tables that are counted in one reading of the ids: as many as a core's memory for counts holds."""
        keys = self._staging.num_keys(self._num_files)
        num_bytes = []
        for i, (name, features) in enumerate(self._tables.items()):
            num_keys = keys[i] + self._past.num_keys(name)
            num_bytes.append(_COUNT_BYTES * (num_keys or features[0].size or features[0].modulo))
        return counting_groups(num_bytes, os.cpu_count() or 1, _MAX_COUNT_BYTES)

    def _finish_group(self, group: list[int]) -> dict[str, Finished]:
        names = [list(self._tables)[i] for i in group]
        counts = self._counts.count_tables([self._tables[name] for name in names])
        return {name: self._finisher.finish(name, of_table) for name, of_table in zip(names, counts, strict=True)}

    def _feature_statistics(self) -> dict[str, Any]:
        metas = [self._staging.meta(file) for file in range(self._num_files)]
        before = self._past.statistics.get("features", {})
        rows = self._past.rows + self._splitter.num_rows
        out = {}
        for i, feature in enumerate(self._schema.sparse):
            count = self._counts.features[feature.name]
            truncated = before.get(feature.name, {}).get("truncated_ids", 0)
            out[feature.name] = {
                "table": feature.table_name,
                "hotness": feature.hotness,
                "mean_hotness": round(count.lookups / rows, 6),
                "empty_share": round(count.empty / rows, 6),
                "truncated_ids": truncated + sum(meta["truncated"][i] for meta in metas),
            }
        return out

    def _slot_remaps(self) -> list[tuple[slice, np.ndarray]]:
        """(slots of a feature, how their ids change), where they change."""
        remaps, start = [], 0
        for feature in self._schema.sparse:
            remap_V = self._finished[feature.table_name].plan.remap_V
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
        for i, statistics in self._fitted.items():
            dense_RxN = dense_RxN if dense_RxN.flags.writeable else dense_RxN.copy()
            values = columns[wide_name(i)]
            dense_RxN[:, i] = finish_dense(self._schema.dense[i], values, statistics, self._least)
        for slots, remap_V in self._remaps:
            ids_RxK = ids_RxK if ids_RxK.flags.writeable else ids_RxK.copy()
            ids_RxK[:, slots] = remap_V[ids_RxK[:, slots]]
        kept = {name: column for name, column in columns.items() if name in ("label", "row", "weight")}
        return ({"dense": dense_RxN} if self._schema.dense else {}) | {"ids": ids_RxK} | kept


def _place(part: Part) -> int:
    return SPLITS.index(part.split) if part.period is None else part.period


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
