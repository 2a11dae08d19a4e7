"""Sparse columns whose value is made of what the log has: the bucket of a number, the part of a time. Whole columns.

A few values at a time, without Arrow, are made so in serving/artifact/raw_values.py.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm_jax.data.schema.sparse import Sparse
from dlrm_jax.data.values import buckets, time_parts
from dlrm_jax.data.values.columns import to_integers, to_numbers, to_times

Integers = tuple[np.ndarray, dict[str, np.ndarray]]


def integers_of(sparse: Sparse, values: pa.Array) -> Integers:
    """(int64 of each value, modulo taken; which are wrong, by the reason why) of a column that is no string's.

    Of a quantile's the bits of the number, float64.
    """
    if sparse.buckets:
        return _of_number(sparse.buckets, values)
    if sparse.part:
        moments, wrong = moments_of(values, sparse.time_format)
        reason = f"is not {time_parts.describe(sparse.time_format)}"
        return np.where(wrong, 0, time_parts.PARTS[sparse.part](moments)), {reason: wrong}
    integers, wrong = to_integers(values, sparse.type)
    if sparse.modulo:
        # 64 bits of hex fill the sign too; as an unsigned number they have the remainder that they should.
        unsigned = integers.view(np.uint64) % np.uint64(sparse.modulo)
        integers = unsigned.view(np.int64) if sparse.type == "hex" else integers % sparse.modulo
    return integers, {"is not a hexadecimal number" if sparse.type == "hex" else "is not a whole number": wrong}


def _of_number(rule: str, values: pa.Array) -> Integers:
    numbers, wrong = to_numbers(values)
    wrong = wrong | np.isnan(numbers)
    numbers = np.where(wrong, 0.0, numbers) + 0.0  # So that -0 is 0.
    no_number = {"is not a finite number": wrong}
    if rule == buckets.QUANTILE:
        return numbers.view(np.int64), no_number
    integers, undefined = buckets.bucket(rule, numbers)
    return integers, no_number | {f"has no whole number under {rule}": undefined & ~wrong}


def moments_of(values: pa.Array, time_format: str) -> tuple[np.ndarray, np.ndarray]:
    """(int64 microseconds since 1970, 0 where it is no time; whether it is none) of each value."""
    if not time_format:
        moments, wrong, dates = to_times(values)
        return moments, wrong | ~dates
    if time_format in time_parts.UNITS:
        numbers, wrong = to_numbers(values)
        moments, beyond = time_parts.of_numbers(numbers, time_format)
        return moments, wrong | beyond
    texts = as_text(values).to_pylist()
    found = [None if text is None else time_parts.of_text(text, time_format) for text in texts]
    return np.asarray([one or 0 for one in found], np.int64), np.asarray([one is None for one in found], bool)


def as_text(values: pa.Array) -> pa.Array:
    """Texts as they are, whole numbers in decimal, 3.0 as 3 (a column of ids with gaps is often stored as float).

    A null stays one.
    """
    if pa.types.is_floating(values.type):
        whole, _ = to_numbers(values)
        there = values.is_valid().to_numpy(zero_copy_only=False)
        integral = there & (whole == np.floor(whole)) & (np.abs(whole) < 2**53)
        as_int = pc.cast(pa.array(np.where(integral, whole, 0).astype(np.int64)), pa.string())
        return pc.if_else(pa.array(integral), as_int, pc.cast(values, pa.string()))
    return pc.cast(values, pa.string())
