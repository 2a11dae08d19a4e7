"""Sparse columns of a chunk -> bags of keys: what a vocabulary numbers, or ids already."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm_jax.data.schema.sparse import Sparse
from dlrm_jax.data.values.columns import Bad, Distinct
from dlrm_jax.data.values.derived import as_text, integers_of
from dlrm_jax.data.values.hashing import hash_integers, hash_strings

EMPTY = np.int32(-1)
_MAX_RAW_ID = 2**31 - 2


@dataclasses.dataclass
class Bags:
    """Bags of one feature: `index_hxR` names the key of each slot, -1 for an empty one.

    `keys_U`, uint64, are what the vocabulary numbers (whole numbers, or hashes of strings), or where the schema
    has no vocabulary the ids themselves. `checks_U` are second hashes of strings, `texts_U` the strings. `ordered`:
    the keys stand in the order in which rows first use them. `truncated_R` counts the ids beyond the hotness.
    """

    keys_U: np.ndarray
    index_hxR: np.ndarray
    checks_U: np.ndarray | None = None
    texts_U: pa.Array | None = None
    ordered: bool = False
    truncated_R: np.ndarray | None = None
    ids_U: np.ndarray | None = None
    """The id of each key as far as it is known, -1 where a vocabulary has yet to give one."""

    def keep(self, kept_R: np.ndarray) -> "Bags":
        """The bags of some rows. Keys that only other rows have stay, unused."""
        truncated = None if self.truncated_R is None else self.truncated_R[kept_R]
        return dataclasses.replace(self, index_hxR=self.index_hxR[:, kept_R], ordered=False, truncated_R=truncated)

    def slots(self, out_hxR: np.ndarray) -> None:
        """Write the id of each slot, once all ids are known."""
        # mode="wrap" takes -1 as the last one, which is that of empty slots; the default mode would buffer the output.
        assert self.ids_U is not None
        np.append(self.ids_U, EMPTY).take(self.index_hxR, out=out_hxR, mode="wrap")


@dataclasses.dataclass
class Elements:
    """The values of a column's bags before they are keys: `index_hxR` names the value of each slot, -1 for none.

    A missing value is filled in already, where the schema says so. `found` are the values of the log, of which
    `values` are the first, and `row_E` the rows of these where the column is one of lists.
    """

    values: pa.Array
    index_hxR: np.ndarray
    found: Distinct
    row_E: np.ndarray | None
    truncated_R: np.ndarray | None

    @classmethod
    def of(cls, sparse: Sparse, array: pa.Array, null_values: tuple[str, ...]) -> "Elements":
        """The values of a column."""
        if sparse.separator and not _is_list(array.type):
            array = _split(array, sparse.separator, null_values)
        index_hxR = np.full((sparse.hotness, len(array)), EMPTY)
        row_E = truncated_R = None
        fill = sparse.missing == "fill"
        if _is_list(array.type):
            found, row_E, slot_E, truncated_R = _flatten(array, sparse.hotness, null_values)
            index_hxR[slot_E, row_E] = found.index_R
        else:
            found = Distinct.of(array, null_values, keep_nulls=fill)
            index_hxR[0] = found.index_R
        values = found.values
        if fill and values.null_count:
            values = as_text(values).fill_null(sparse.fill)
        empty_R = index_hxR[0] < 0
        if fill and empty_R.any():
            values = pa.concat_arrays([as_text(values), pa.array([sparse.fill])])
            index_hxR[0, empty_R] = len(values) - 1
        return cls(values, index_hxR, found, row_E, truncated_R)

    def bad(self, column: str, reason: str, wrong_U: np.ndarray) -> list[Bad]:
        """The rows with a wrong value, once each; what was filled in is right."""
        out = []
        for bad in self.found.bad(wrong_U[: len(self.found.values)], column, reason):
            rows, first = np.unique(bad.row_M if self.row_E is None else self.row_E[bad.row_M], return_index=True)
            out.append(dataclasses.replace(bad, row_M=rows, values=bad.values.take(pa.array(first))))
        return out


def read_bags(sparse: Sparse, array: pa.Array, null_values: tuple[str, ...]) -> tuple[Bags, list[Bad]]:
    """(the bags of a column, bad rows)."""
    elements = Elements.of(sparse, array, null_values)
    bad = []
    if sparse.missing == "error":
        rows = np.flatnonzero(elements.index_hxR[0] < 0)
        bad += [Bad(rows, sparse.source, pa.array([""] * len(rows)), "is missing")] if len(rows) else []
    keys, checks, texts, wrong = _keys(sparse, elements.values)
    for reason, wrong_U in wrong.items():
        bad += elements.bad(sparse.source, reason, wrong_U)
    return Bags(keys, elements.index_hxR, checks, texts, elements.row_E is None, elements.truncated_R), bad


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _split(array: pa.Array, separator: str, null_values: tuple[str, ...]) -> pa.Array:
    """Texts cut at `separator`, each distinct text once."""
    distinct = Distinct.of(array, null_values)
    lists = pc.split_pattern(as_text(distinct.values), separator)
    return lists.take(pa.array(distinct.index_R, mask=distinct.index_R < 0))


def _flatten(
    lists: pa.Array, hotness: int, null_values: tuple[str, ...]
) -> tuple[Distinct, np.ndarray, np.ndarray, np.ndarray]:
    """(elements of all bags, their rows, their slots, how many of each row were beyond `hotness`).

    Missing elements are left out.
    """
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    elements = Distinct.of(lists.flatten(), null_values)
    row_E = np.repeat(np.arange(len(lists)), lengths)
    present = elements.index_R >= 0
    row_E, index_E = row_E[present], elements.index_R[present]
    slot_E = np.arange(len(row_E)) - np.searchsorted(row_E, row_E)
    fits = slot_E < hotness
    elements.index_R = index_E[fits]
    return elements, row_E[fits], slot_E[fits], np.bincount(row_E[~fits], minlength=len(lists))


def _keys(
    sparse: Sparse, values: pa.Array
) -> tuple[np.ndarray, np.ndarray | None, pa.Array | None, dict[str, np.ndarray]]:
    """(keys, checks, texts, which values are wrong, by the reason why)."""
    if sparse.value_type == "string":
        texts = as_text(values).fill_null("")
        keys = hash_strings(texts)
        if sparse.ids == "vocabulary":
            return keys, hash_strings(texts, seed=1), texts, {}
        return keys % np.uint64(sparse.size), None, None, {}
    integers, wrong = integers_of(sparse, values)
    if sparse.is_quantile:
        return integers.view(np.uint64), None, None, wrong
    if sparse.ids == "hash":
        return hash_integers(integers) % np.uint64(sparse.size), None, None, wrong
    if sparse.ids == "raw":
        greatest = (sparse.size or _MAX_RAW_ID + 1) - 1
        outside = (integers < 0) | (integers > greatest)
        wrong[f"is outside the table's ids 0 to {greatest}"] = outside
        integers = np.where(outside, 0, integers)
    return integers.view(np.uint64), None, None, wrong
