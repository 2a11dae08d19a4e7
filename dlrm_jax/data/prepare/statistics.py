"""Counting what the first pass staged: rows, labels, and how often each id occurs in each split."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from dlrm_jax.config import ConfigError
from dlrm_jax.data.prepare.growth import Past
from dlrm_jax.data.prepare.splits import Splitter
from dlrm_jax.data.prepare.staging import Staging, wide_name
from dlrm_jax.data.schema.schema import SPLITS, Schema, Sparse
from dlrm_jax.data.values.dense import inverse

NUM_TOP_IDS = 10
_CURVE_POINTS = 60
_MAX_COUNTED = 500_000_000


@dataclasses.dataclass
class FeatureCount:
    """Of one feature: ids looked up, and empty bags."""

    lookups: int = 0
    empty: int = 0


class Counts:
    """Everything that is counted over the staged rows."""

    def __init__(self, schema: Schema, staging: Staging, num_files: int, splitter: Splitter, past: Past) -> None:
        self._schema, self._staging, self._num_files, self._splitter = schema, staging, num_files, splitter
        self._slots = np.cumsum([0, *(feature.hotness for feature in schema.sparse)])
        self.rows_FxP = np.zeros((num_files, len(splitter.parts)), np.int64)
        self.positives_P = np.zeros(len(splitter.parts), np.int64)
        self.time_bins = past.time_bins()
        before = past.growth.get("lookups", {})
        self.features = {f.name: FeatureCount(*before.get(f.name, ())) for f in schema.sparse}
        self.ranges = past.ranges()
        self.dense = past.dense()

    def count_rows(self) -> None:
        """Count rows and labels, and what dense transforms want to know; comes before everything else."""
        by_time, num_parts = bool(self._schema.timestamp), len(self._splitter.parts)
        wanted = ["label", "dense", "missing", *(["time"] if by_time else []), *map(wide_name, self.dense)]
        for file, batch, columns, codes in self._batches(wanted):
            label_R = columns["label"]
            codes_R = np.broadcast_to(codes, label_R.shape)
            self.rows_FxP[file] += np.bincount(codes_R, minlength=num_parts)
            self.positives_P += np.bincount(codes_R, label_R, minlength=num_parts).astype(np.int64)
            first = self._splitter.first_row(file, batch)
            self.time_bins.add(columns["time"] if by_time else np.arange(first, first + len(label_R)), label_R)
            for column, statistics in self.dense.items():
                statistics.add(columns[wide_name(column)])
            self._count_ranges(columns)

    def _count_ranges(self, columns: dict[str, np.ndarray]) -> None:
        if "missing" not in columns:
            return  # Staged by a version that did not keep it.
        missing_RxN = np.unpackbits(columns["missing"], axis=1).view(bool)
        for i, (dense, into) in enumerate(zip(self._schema.dense, self.ranges, strict=True)):
            wide = columns.get(wide_name(i))
            into.add(inverse(dense.transform, columns["dense"][:, i]) if wide is None else wide, missing_RxN[:, i])

    def _batches(self, names: list[str]) -> Iterator[tuple[int, int, dict[str, np.ndarray], np.ndarray | int]]:
        """(staged file, batch, its columns, its rows' parts)."""
        for file in range(self._num_files):
            for i, columns in enumerate(self._staging.batches(file, [*names, *self._splitter.columns])):
                yield file, i, columns, self._splitter.codes(file, i, columns)

    def count_tables(self, tables: list[list[Sparse]]) -> list[np.ndarray]:
        """counts_GxV of some tables' provisional ids, given the features of each; fills `features` for these."""
        index_of = {feature.name: i for i, feature in enumerate(self._schema.sparse)}
        # Half the memory, where no id can occur 2^31 times.
        most = self._splitter.num_rows * max(feature.hotness for features in tables for feature in features)
        dtype = np.int32 if most * max(map(len, tables)) < 2**31 else np.int64
        group_P = self._splitter.group_of
        counts = [np.zeros((len(self._splitter.groups), features[0].size + 1), dtype) for features in tables]
        for _, _, columns, parts in self._batches(["ids"]):
            ids_KxR, codes = columns["ids"].T, group_P[parts]
            for i, features in enumerate(tables):
                for feature in features:
                    start = self._slots[index_of[feature.name]]
                    bag = [np.ascontiguousarray(ids_R) for ids_R in ids_KxR[start : start + feature.hotness]]
                    counts[i] = _count_bag(self.features[feature.name], bag, codes, counts[i])
        return [counts_GxV[:, 1 : 1 + _seen(counts_GxV[:, 1:])] for counts_GxV in counts]


def _seen(counts_GxV: np.ndarray) -> int:
    """One more than the greatest id that occurs."""
    return int(np.flatnonzero(counts_GxV.any(axis=0)).max(initial=-1)) + 1


def _count_bag(
    into: FeatureCount, slots: list[np.ndarray], codes: np.ndarray | np.integer, counts_GxV: np.ndarray
) -> np.ndarray:
    """Add some rows. Column 0 of `counts_GxV` takes the empty slots, so that id i is column i + 1."""
    top = max((int(ids_R.max(initial=-1)) for ids_R in slots), default=-1) + 2
    if top > _MAX_COUNTED:
        raise ConfigError(
            f"ids: raw gives ids up to {top - 2:,}, so a table of that many rows; say ids: vocabulary or hash instead"
        )
    if top > counts_GxV.shape[1]:
        grown = np.zeros((len(counts_GxV), max(top, counts_GxV.shape[1] * 3 // 2)), counts_GxV.dtype)
        grown[:, : counts_GxV.shape[1]] = counts_GxV
        counts_GxV = grown
    empty_before = int(counts_GxV[:, 0].sum())
    for group in np.unique(codes):
        parts = slots if codes.ndim == 0 else [ids_R[codes == group] for ids_R in slots]
        for ids in parts:
            if counts_GxV.shape[1] < 4 * len(ids):
                counts_GxV[group] += np.bincount(ids + 1, minlength=counts_GxV.shape[1]).astype(counts_GxV.dtype)
            else:
                np.add.at(counts_GxV[group], ids + 1, counts_GxV.dtype.type(1))
    empty_slots = int(counts_GxV[:, 0].sum()) - empty_before
    into.lookups += sum(map(len, slots)) - empty_slots
    several = len(slots) > 1
    into.empty += int(np.logical_and.reduce([ids_R < 0 for ids_R in slots]).sum()) if several else empty_slots
    return counts_GxV


def summarise_table(counts_SxV: np.ndarray, top: np.ndarray, texts: list[str]) -> dict[str, Any]:
    """Statistics of a table's final ids, `top` being the most frequent ones and `texts` their values."""
    total_V = counts_SxV.sum(axis=0)
    lookups = int(total_V.sum())
    seen_V = counts_SxV[0] > 0
    ordered = np.sort(total_V[total_V > 0])[::-1]
    ranks = np.unique(np.geomspace(1, max(len(ordered), 1), _CURVE_POINTS).astype(np.int64))
    return {
        "rows": len(total_V),
        "distinct": int((total_V > 0).sum()),
        "lookups": lookups,
        "seen_in_train": {
            name: _share(int(counts_SxV[i][seen_V].sum()), int(counts_SxV[i].sum()))
            for i, name in enumerate(SPLITS)
            if i
        },
        "top": [
            {"id": int(i), "value": text, "share": _share(int(total_V[i]), lookups)}
            for i, text in zip(top, texts, strict=True)
        ],
        "top_10_share": _share(int(total_V[top].sum()), lookups),
        "frequency_curve": [[int(rank), int(ordered[rank - 1])] for rank in ranks if len(ordered)],
    }


def top_ids(total_V: np.ndarray) -> np.ndarray:
    """The most frequent ids, at most ten, the lower id first among equals."""
    count = min(NUM_TOP_IDS, len(total_V))
    if not count:
        return np.zeros(0, np.int64)
    # Of a long tail only what stands out is worth partitioning.
    head = total_V[total_V > max(2 * int(total_V.mean()), 1)]
    head = head if len(head) >= count else total_V
    candidates = np.flatnonzero(total_V >= np.partition(head, -count)[-count])
    candidates = candidates[total_V[candidates] > 0]
    return candidates[np.argsort(-total_V[candidates], kind="stable")][:count]


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None
