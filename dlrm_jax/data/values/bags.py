"""Sparse columns of a chunk -> bags of keys: what a vocabulary numbers, or ids already."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm_jax.data.schema.schema import Sparse
from dlrm_jax.data.values.columns import Bad, Distinct, to_integers, to_numbers
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


def read_bags(sparse: Sparse, array: pa.Array, null_values: tuple[str, ...]) -> tuple[Bags, list[Bad]]:
    """(the bags of a column, bad rows)."""
    if sparse.separator and not _is_list(array.type):
        array = _split(array, sparse.separator, null_values)
    index_hxR = np.full((sparse.hotness, len(array)), EMPTY)
    truncated_R = None
    is_list, fill = _is_list(array.type), sparse.missing == "fill"
    if is_list:
        elements, row_E, slot_E, truncated_R = _flatten(array, sparse.hotness, null_values)
        index_hxR[slot_E, row_E] = elements.index_R
    else:
        elements, row_E = Distinct.of(array, null_values, keep_nulls=fill), None
        index_hxR[0] = elements.index_R
    empty_R = index_hxR[0] < 0
    bad = []
    if sparse.missing == "error" and empty_R.any():
        rows = np.flatnonzero(empty_R)
        bad.append(Bad(rows, sparse.source, pa.array([""] * len(rows)), "is missing"))
    values = elements.values
    if fill and values.null_count:
        values = _as_text(values).fill_null(sparse.fill)
    if fill and empty_R.any():
        values = pa.concat_arrays([_as_text(values), pa.array([sparse.fill])])
        index_hxR[0, empty_R] = len(values) - 1
    keys, checks, texts, wrong = _keys(sparse, values)
    for reason, wrong_U in wrong.items():
        for found in elements.bad(wrong_U[: len(elements.values)], sparse.source, reason):
            rows, first = np.unique(found.row_M if row_E is None else row_E[found.row_M], return_index=True)
            bad.append(dataclasses.replace(found, row_M=rows, values=found.values.take(pa.array(first))))
    return Bags(keys, index_hxR, checks, texts, not is_list, truncated_R), bad


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _split(array: pa.Array, separator: str, null_values: tuple[str, ...]) -> pa.Array:
    """Texts cut at `separator`, each distinct text once."""
    distinct = Distinct.of(array, null_values)
    lists = pc.split_pattern(_as_text(distinct.values), separator)
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


def _as_text(values: pa.Array) -> pa.Array:
    """Texts as they are, whole numbers in decimal, 3.0 as 3 (a column of ids with gaps is often stored as float)."""
    if pa.types.is_floating(values.type):
        whole, _ = to_numbers(values)
        integral = (whole == np.floor(whole)) & (np.abs(whole) < 2**53)
        as_int = pc.cast(pa.array(np.where(integral, whole, 0).astype(np.int64)), pa.string())
        return pc.if_else(pa.array(integral), as_int, pc.cast(values, pa.string()))
    return pc.cast(values, pa.string())


def _keys(
    sparse: Sparse, values: pa.Array
) -> tuple[np.ndarray, np.ndarray | None, pa.Array | None, dict[str, np.ndarray]]:
    """(keys, checks, texts, which values are wrong, by the reason why)."""
    if sparse.type == "string":
        texts = _as_text(values).fill_null("")
        keys = hash_strings(texts)
        if sparse.ids == "vocabulary":
            return keys, hash_strings(texts, seed=1), texts, {}
        return keys % np.uint64(sparse.size), None, None, {}
    integers, no_number = to_integers(values, sparse.type)
    wrong = {"is not a hexadecimal number" if sparse.type == "hex" else "is not a whole number": no_number}
    if sparse.modulo:
        # 64 bits of hex fill the sign too; as an unsigned number they have the remainder that they should.
        unsigned = integers.view(np.uint64) % np.uint64(sparse.modulo)
        integers = unsigned.view(np.int64) if sparse.type == "hex" else integers % sparse.modulo
    if sparse.ids == "hash":
        return hash_integers(integers) % np.uint64(sparse.size), None, None, wrong
    if sparse.ids == "raw":
        greatest = (sparse.size or _MAX_RAW_ID + 1) - 1
        outside = (integers < 0) | (integers > greatest)
        wrong[f"is outside the table's ids 0 to {greatest}"] = outside
        integers = np.where(outside, 0, integers)
    return integers.view(np.uint64), None, None, wrong
