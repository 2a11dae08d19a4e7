"""Times of a log as microseconds since 1970 in UTC: texts of ISO 8601 (one_text.py), and what Arrow calls temporal.

Digits alone are a number, not a date: 20240131 as well as 1706695800.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm_jax.data.values.one_text import BEYOND, moment

_FIRST_YEAR = moment("0001-01-01") or 0
"""Arrow also reads the year 0, which Python's calendar has not."""

_UNITS_A_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def is_temporal(kind: pa.DataType) -> bool:
    """Whether `of_temporal` reads a column of this type: dates and moments, not times of a day, not durations."""
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind)


def of_temporal(values: pa.Array) -> np.ndarray:
    """int64 of dates or of moments in any unit and zone, nulls as 0; what is below a microsecond is cut."""
    kind = values.type
    if pa.types.is_date(kind):
        values = values.cast(pa.timestamp("ms"))
        kind = values.type
    numbers = values.view(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    units = _UNITS_A_SECOND[kind.unit]
    if units >= 10**6:
        return numbers // (units // 10**6)
    bound = -(-BEYOND // (10**6 // units))  # So that a moment beyond what 64 bits hold stays beyond all that are read.
    return numbers.clip(-bound, bound) * (10**6 // units)


def as_text(values: pa.Array) -> pa.Array:
    """Dates or moments as texts in UTC, which the functions below read."""
    moments = pa.array(of_temporal(values), mask=values.is_null().to_numpy(zero_copy_only=False))
    return pc.cast(moments.cast(pa.timestamp("us")), pa.string())


def of_common_texts(texts: pa.Array) -> np.ndarray | None:
    """int64 of texts that Arrow reads, nulls as 0: all without a zone, or all with one. None if any is another.

    A fast way to what `one_text.moment` gives.
    """
    texts = pc.utf8_trim_whitespace(texts)
    for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC")):
        if kind.tz:
            texts = pc.replace_substring_regex(texts, r" ?(UTC|GMT|z)$", "Z")
        try:
            found = pc.cast(texts, kind).view(pa.int64())
        except pa.ArrowInvalid:
            continue
        out: np.ndarray = found.fill_null(0).to_numpy(zero_copy_only=False)
        return out if not len(out) or out.min() >= _FIRST_YEAR else None
    return None
