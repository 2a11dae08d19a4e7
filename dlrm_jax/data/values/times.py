"""Times of a log as microseconds since 1970 in UTC: ISO 8601 as text, and the columns that Arrow calls temporal.

Text is a date, alone or with a time, a time alone or with a zone; a time without a zone is one of UTC:

    2024-01-31   20240131   2024-W05-3   2024-031   2024-01         (a date without a day is the first of its month)
    T10   T10:10   T101000   T10:10:00.5   T10:10:00,123456789      (behind T, t or a space; below 1 us it is cut)
    Z   UTC   GMT   +02   +0200   -05:30

Digits alone are a number, not a date: 20240131 as well as 1706695800.
"""

import datetime
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)
BEYOND = 2**62
"""No time is so many microseconds from 1970; a number of this size or larger is none either."""
_FIRST_YEAR = (datetime.datetime(1, 1, 1, tzinfo=datetime.UTC) - _EPOCH) // _MICROSECOND
"""Arrow also reads the year 0, which Python's calendar has not."""

_TEXT = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d|\d{8}|\d{4}-?W\d\d-?\d|(?P<ordinal>\d{4}-?\d{3})|(?P<month>\d{4}-\d\d))"
    r"(?:[Tt ](?P<hour>\d\d)(?::?(?P<minute>\d\d)(?::?(?P<second>\d\d)(?:[.,](?P<fraction>\d+))?)?)?"
    r" ?(?P<zone>[Zz]|UTC|GMT|[+-]\d\d(?::?\d\d)?)?)?",
    re.ASCII,
)
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

    A fast way to what `of_text` gives.
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


def of_text(text: str) -> int | None:
    """Microseconds of one text; None if it is none of the module's forms, or names a day or a time that is none."""
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        return None
    part = match.groupdict()
    try:
        if part["ordinal"]:
            day = datetime.datetime.strptime(part["ordinal"].replace("-", ""), "%Y%j")
            if day.year != int(part["ordinal"][:4]):  # Day 366 of a year that has 365.
                return None
        else:
            day = datetime.datetime.fromisoformat(part["date"] + ("-01" if part["month"] else ""))
        hour, minute, second = (int(part[name] or 0) for name in ("hour", "minute", "second"))
        fraction = int((part["fraction"] or "0").ljust(6, "0")[:6])
        midnight_after = (hour, minute, second, fraction) == (24, 0, 0, 0)
        leap_second = (hour, minute, second) == (23, 59, 60)
        of_day = datetime.time(0 if midnight_after else hour, minute, 59 if leap_second else second, fraction)
        zone = datetime.time.fromisoformat(f"00:00{_offset(part['zone'])}").tzinfo
        moment = datetime.datetime.combine(day, of_day, zone)
        return (moment - _EPOCH) // _MICROSECOND + 86_400 * 10**6 * midnight_after + 10**6 * leap_second
    except ValueError:
        return None


def _offset(zone: str | None) -> str:
    return zone if zone and zone[0] in "+-" else "+00:00"
