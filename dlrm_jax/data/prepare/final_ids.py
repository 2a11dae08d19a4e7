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


def plan_table(
    rule: Sparse, total_V: np.ndarray, values: pa.Array, known_V: np.ndarray
) -> tuple[TablePlan, np.ndarray]:
    """(the plan, provisional ids in the order of their final ones; those of infrequent values are left out).

    `values` of a vocabulary and how often they occur, by provisional id; `known_V` are the final ids that some have
    already, else -1: these stay, and new ones follow.
    """
    known = np.flatnonzero(known_V >= 0)
    new = np.flatnonzero((known_V < 0) & (total_V >= rule.min_count))
    if rule.order == "frequency":
        new = new[np.argsort(-total_V[new], kind="stable")]
    elif rule.order == "value":
        new = new[pc.array_sort_indices(values.take(pa.array(new))).to_numpy()]
    kept = np.concatenate([known[np.argsort(known_V[known])], new]) if len(known) else new
    num_keys, first = len(values), int(rule.oov)
    remap_V = np.full(num_keys + 1, 0 if rule.oov else -1, np.int32)
    remap_V[kept] = np.arange(first, first + len(kept), dtype=np.int32)
    remap_V[-1] = -1  # An empty slot is no value, so it is not an unknown one either.
    unchanged = not rule.oov and np.array_equal(kept, np.arange(num_keys))
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
