"""From provisional ids, in order of first appearance, to a table's final ones."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm_jax.data.schema.schema import Sparse


@dataclasses.dataclass
class TablePlan:
    """How provisional ids of a table become final ones: `remap_V` (None: they are final), and the table's rows."""

    rows: int
    remap_V: np.ndarray | None = None


def plan_table(features: list[Sparse], counts_SxV: np.ndarray, values: pa.Array | None) -> tuple[TablePlan, np.ndarray]:
    """(the plan, provisional ids in the order of their final ones; those of infrequent values are left out).

    `values` are those of a vocabulary, by provisional id.
    """
    rule = features[0]
    if values is None:
        rows = rule.size or (rule.modulo if rule.ids == "raw" else 0) or counts_SxV.shape[1]
        return TablePlan(max(rows, 1)), np.zeros(0, np.int64)
    num_keys = len(values)
    total_V = np.zeros(num_keys, np.int64)
    total_V[: counts_SxV.shape[1]] = counts_SxV[:, :num_keys].sum(axis=0)
    kept = np.flatnonzero(total_V >= rule.min_count)
    if rule.order == "frequency":
        kept = kept[np.argsort(-total_V[kept], kind="stable")]
    elif rule.order == "value":
        kept = kept[pc.array_sort_indices(values.take(pa.array(kept))).to_numpy()]
    first = int(rule.oov)
    remap_V = np.full(num_keys + 1, 0 if rule.oov else -1, np.int32)
    remap_V[kept] = np.arange(first, first + len(kept), dtype=np.int32)
    remap_V[-1] = -1  # An empty slot is no value, so it is not an unknown one either.
    unchanged = not rule.oov and len(kept) == num_keys and rule.order == "first"
    return TablePlan(max(first + len(kept), 1), None if unchanged else remap_V), kept


def counting_groups(num_bytes: list[int], num_cores: int, limit: int) -> list[list[int]]:
    """Indices of tables dealt out to the cores; a group holds at most `limit` bytes of counts, or one table."""
    groups: list[list[int]] = []
    for core in range(min(num_cores, len(num_bytes))):
        held = limit + 1
        for i in range(core, len(num_bytes), num_cores):
            if held + num_bytes[i] > limit:
                groups.append([])
                held = 0
            groups[-1].append(i)
            held += num_bytes[i]
    return groups
