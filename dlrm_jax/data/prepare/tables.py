"""Tables of a staged log: final ids, vocabularies, statistics, and the counts that a later preparation goes on from."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm_jax.data.prepare.final_ids import TablePlan, plan_table
from dlrm_jax.data.prepare.growth import Past, counts_path, write_counts
from dlrm_jax.data.prepare.runs import Part
from dlrm_jax.data.prepare.staging import Staging
from dlrm_jax.data.prepare.statistics import summarise_table, top_ids
from dlrm_jax.data.prepare.vocabularies import describe_buckets, describe_ids, vocabulary_values, write_vocabulary
from dlrm_jax.data.schema.schema import SPLITS, Schema
from dlrm_jax.data.schema.sparse import Sparse
from dlrm_jax.data.values import buckets
from dlrm_jax.data.values.file_names import file_names


@dataclasses.dataclass(frozen=True)
class Finished:
    """A table that has its final ids: how these come about, its statistics, and what is kept for a later preparation.

    `notes` say where it is not as one preparation of all days would have made it.
    """

    plan: TablePlan
    statistics: dict[str, Any]
    kept: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finisher:
    """Finishes tables, by counts_GxV of their provisional ids in the new rows, for `groups` of rows."""

    schema: Schema
    output: pathlib.Path
    staging: Staging
    num_files: int
    groups: list[Part]
    past: Past
    refit: bool

    def finish(self, name: str, new_GxV: np.ndarray) -> Finished:
        """Give a table its final ids, write its vocabulary and its counts."""
        rule = self.schema.tables()[name][0]
        if rule.is_quantile:
            return self._finish_quantiles(name, rule, new_GxV)
        if rule.ids == "vocabulary":
            return self._finish_vocabulary(name, rule, new_GxV)
        counts_GxV = _sum(self.past.known(name, rule, self.groups).counts_GxV, new_GxV)
        write_counts(counts_path(self.output, self.schema, name), counts_GxV, {})
        rows = rule.size or (rule.modulo if rule.ids == "raw" else 0) or counts_GxV.shape[1]
        final_SxV = self._by_split(_widened(counts_GxV, max(rows, 1)))
        top = top_ids(final_SxV.sum(axis=0))
        return Finished(TablePlan(max(rows, 1)), summarise_table(final_SxV, top, describe_ids(top, None, 0)), {})

    def _finish_vocabulary(self, name: str, rule: Sparse, new_GxV: np.ndarray) -> Finished:
        known = self.past.known(name, rule, self.groups)
        values, num_known = self._with_new(known.values, name, rule), len(known.values)
        ids_V = np.append(known.ids_V, np.full(len(values) - num_known, -1, np.int32))
        counts_GxV = _widened(_sum(known.counts_GxV, new_GxV), len(values))
        plan, kept = plan_table(rule, counts_GxV.sum(axis=0), values, ids_V)
        # Rows of days before keep the id of rare values, or none, where a value has only now become frequent.
        risen = kept[(ids_V[kept] < 0) & (kept < num_known)]
        risen_G = known.counts_GxV[:, risen].sum(axis=1)
        early_G = known.early_G + risen_G
        if len(risen):
            counts_GxV[:, risen] -= known.counts_GxV[:, risen]
        first = int(rule.oov)
        final_GxV = np.zeros((len(self.groups), plan.rows), counts_GxV.dtype)
        final_GxV[:, first : first + len(kept)] = counts_GxV[:, kept]
        rare_G = counts_GxV.sum(axis=1) - final_GxV.sum(axis=1) + early_G
        if first:
            final_GxV[:, 0] = rare_G
        in_order = values.take(pa.array(kept))
        self._write_values(name, first, values, kept, counts_GxV)
        final_SxV, rare_S = self._by_split(final_GxV), self._by_split(rare_G)
        path = self.output / "vocabularies" / f"{file_names(self.schema.tables())[name]}.parquet"
        write_vocabulary(path, in_order, final_SxV.sum(axis=0)[first:], first)
        top, total_S = top_ids(final_SxV.sum(axis=0)), self._by_split(counts_GxV.sum(axis=1) + early_G)
        statistics = summarise_table(final_SxV, top, describe_ids(top, in_order, first))
        statistics["infrequent_values"] = len(values) - len(kept)
        if rule.value_type == "string":
            statistics["longest"] = pc.max(pc.binary_length(in_order)).as_py() or 0
        statistics["coverage"] = {
            split: round(1 - float(rare_S[i] / total_S[i]), 6) if total_S[i] else None for i, split in enumerate(SPLITS)
        }
        notes = self._notes(name, rule, len(kept) - int((known.ids_V >= 0).sum()), len(risen), int(risen_G.sum()))
        return Finished(plan, statistics, {"keys": len(values), "early": early_G.tolist()}, notes)

    def _write_values(self, name: str, first: int, values: pa.Array, kept: np.ndarray, counts_GxV: np.ndarray) -> None:
        """counts/TABLE.parquet of a vocabulary, with the values that are too rare for an id."""
        ids_V = np.full(len(values), -1, np.int32)
        ids_V[kept] = np.arange(first, first + len(kept))
        rare = pc.if_else(pa.array(ids_V >= 0), None, values)
        write_counts(counts_path(self.output, self.schema, name), counts_GxV, {"id": pa.array(ids_V), "value": rare})

    def _notes(self, name: str, rule: Sparse, new: int, risen: int, early: int) -> tuple[str, ...]:
        if self.past.directory is None or not new:
            return ()
        notes = []
        if rule.order != "first":
            notes.append(
                f"{name}: {new:,} new values have the ids after those known, by {rule.order}; one preparation of all "
                "days would number all of them by it"
            )
        if risen:
            rows = "have id 0" if rule.oov else "are left out of their bags"
            notes.append(
                f"{name}: {risen:,} values of the days before reached min_count {rule.min_count} and have ids in the "
                f"new rows; their {early:,} earlier occurrences {rows}, where one preparation of all days would "
                "have given them ids"
            )
        return tuple(notes)

    def _finish_quantiles(self, name: str, rule: Sparse, new_GxV: np.ndarray) -> Finished:
        """Edges are of the rows for training, those of the days before if there were any, unless they are refitted."""
        known = self.past.known(name, rule, self.groups)
        numbers_V = self._with_new(known.values, name, rule).to_numpy()
        new_GxV = _widened(new_GxV, len(numbers_V))
        counts_GxV = _sum(known.counts_GxV, new_GxV)
        write_counts(counts_path(self.output, self.schema, name), counts_GxV, {"value": pa.array(numbers_V)})
        fitted = self.past.statistics.get("tables", {}).get(name, {}).get("edges")
        if fitted is None or self.refit:
            edges_E = buckets.edges(numbers_V, self._by_split(counts_GxV)[0], rule.size)
        else:
            edges_E = np.asarray(fitted)
        bucket_V = buckets.among(edges_E, numbers_V)
        of_new_GxV = np.stack([np.bincount(bucket_V, counts_V, rule.size) for counts_V in new_GxV]).astype(np.int64)
        final_GxV = of_new_GxV + known.buckets_GxB
        final_SxV = self._by_split(final_GxV)
        top = top_ids(final_SxV.sum(axis=0))
        statistics = summarise_table(final_SxV, top, describe_buckets(top, edges_E)) | {"edges": edges_E.tolist()}
        kept = {"keys": len(numbers_V), "buckets": final_GxV.tolist()}
        notes: list[str] = []
        if fitted is not None and self.refit and edges_E.tolist() != fitted:
            notes.append(f"{name}: buckets have new edges in the new rows; rows of the days before keep their buckets")
        return Finished(TablePlan(rule.size, np.append(bucket_V, np.int32(-1))), statistics, kept, tuple(notes))

    def _with_new(self, known: pa.Array, name: str, rule: Sparse) -> pa.Array:
        """All values of a vocabulary, in order of first appearance."""
        index = list(self.schema.tables()).index(name)
        new = vocabulary_values(self.staging, self.num_files, index, rule)
        return pa.concat_arrays([known, new]) if len(known) else new

    def _by_split(self, of_groups: np.ndarray) -> np.ndarray:
        """Sums of groups, their first axis, by split."""
        if [part.split for part in self.groups] == list(SPLITS):
            return of_groups
        return np.asarray([[part.split == name for part in self.groups] for name in SPLITS], np.int64) @ of_groups


def _sum(old_GxV: np.ndarray, new_GxV: np.ndarray) -> np.ndarray:
    """Counts of days before and new ones, either of which may know more ids."""
    if not old_GxV.shape[1]:
        return new_GxV
    width = max(old_GxV.shape[1], new_GxV.shape[1])
    return _widened(old_GxV, width) + _widened(new_GxV, width)


def _widened(counts_GxV: np.ndarray, rows: int) -> np.ndarray:
    """Counts of `rows` ids; those beyond what was counted never occurred."""
    if counts_GxV.shape[1] >= rows:
        return counts_GxV[:, :rows]
    return np.pad(counts_GxV, ((0, 0), (0, rows - counts_GxV.shape[1])))
