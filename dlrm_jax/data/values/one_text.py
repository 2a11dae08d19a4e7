"""What one text says, in plain Python: a whole number, a number, a moment; and several texts as one.

Serving reads each value so, and preparation what Arrow does not read, or reads otherwise.

A moment is ISO 8601: a date, alone or with a time, a time alone or with a zone; a time without a zone is one of UTC:

    2024-01-31   20240131   2024-W05-3   2024-031   2024-01         (a date without a day is the first of its month)
    T10   T10:10   T101000   T10:10:00.5   T10:10:00,123456789      (behind T, t or a space; below 1 us it is cut)
    Z   UTC   GMT   +02   +0200   -05:30
"""

import datetime
import re
from collections.abc import Iterable

BEYOND = 2**62
"""No time is so many microseconds from 1970; a number of this size or larger is none either."""
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)
_INTEGER = re.compile(r"[+-]?0*([0-9]{1,19})", re.ASCII)
_MOMENT = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d|\d{8}|\d{4}-?W\d\d-?\d|(?P<ordinal>\d{4}-?\d{3})|(?P<month>\d{4}-\d\d))"
    r"(?:[Tt ](?P<hour>\d\d)(?::?(?P<minute>\d\d)(?::?(?P<second>\d\d)(?:[.,](?P<fraction>\d+))?)?)?"
    r" ?(?P<zone>[Zz]|UTC|GMT|[+-]\d\d(?::?\d\d)?)?)?",
    re.ASCII,
)


def integer(text: str) -> int | None:
    """The whole number of 64 bits that a text is: digits with at most one sign, and space around; None for others."""
    match = _INTEGER.fullmatch(text.strip())
    if match is None:
        return None
    found = -int(match[1]) if text.strip()[0] == "-" else int(match[1])
    return found if -(2**63) <= found < 2**63 else None


def number(text: str) -> float | None:
    """What Python's `float` reads, but for `_`: also NaN and the infinities; None for others."""
    try:
        return float(text) if "_" not in text else None
    except ValueError:
        return None


def microseconds(when: datetime.datetime) -> int:
    """From 1970 to a moment; one without a zone is one of UTC."""
    return ((when if when.tzinfo else when.replace(tzinfo=datetime.UTC)) - _EPOCH) // _MICROSECOND


def moment(text: str) -> int | None:
    """Microseconds since 1970 in UTC; None if a text is none of the module's forms, or names a day that is none."""
    match = _MOMENT.fullmatch(text.strip())
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
        whole = microseconds(datetime.datetime.combine(day, of_day, zone))
        return whole + 86_400 * 10**6 * midnight_after + 10**6 * leap_second
    except ValueError:
        return None


def _offset(zone: str | None) -> str:
    return zone if zone and zone[0] in "+-" else "+00:00"


def joined(texts: Iterable[str]) -> str:
    """One text of several, as `a & b`, from which these could be told: their own & and \\ have a \\ before them."""
    return " & ".join(text.replace("\\", "\\\\").replace("&", "\\&") for text in texts)
