"""Parts of a time that make a category: hour, weekday, weekend; and times as a log may write them.

`time_format` of a schema is empty for ISO 8601 (one_text.py), where a number is none; a unit of UNITS for numbers since
1970; or a pattern of Python's `strptime`, as %y%m%d%H for 14102123. Times are those of UTC, or of the zone that
they name, taken to UTC.
"""

import datetime
from collections.abc import Callable

import numpy as np

from dlrm_jax.config import require
from dlrm_jax.data.values import one_text

_HOUR = 3600 * 10**6
_A_DAY = datetime.datetime(2014, 10, 21, tzinfo=datetime.UTC)
UNITS = {"seconds": 10**6, "milliseconds": 10**3, "microseconds": 1}
"""Microseconds of one."""


def _hour(moments: np.ndarray) -> np.ndarray:
    """0 to 23."""
    return moments // _HOUR % 24


def _weekday(moments: np.ndarray) -> np.ndarray:
    """0 to 6 from Sunday on, as C's %w; 1970 began on a Thursday."""
    return (moments // (24 * _HOUR) + 4) % 7


def _weekend(moments: np.ndarray) -> np.ndarray:
    """1 on Saturday and Sunday, else 0."""
    return (_weekday(moments) % 6 == 0).astype(np.int64)


PARTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"hour": _hour, "weekday": _weekday, "weekend": _weekend}


def require_format(where: str, time_format: str) -> None:
    """ConfigError for a time format that is none."""
    if not time_format or time_format in UNITS:
        return
    what = f"{where}: time_format is {time_format!r}"
    require("%" in time_format, f"{what}; give one of {', '.join(UNITS)}, or a pattern of strptime, as %y%m%d%H")
    try:
        datetime.datetime.strptime(_A_DAY.strftime(time_format), time_format)
    except ValueError as error:
        require(False, f"{what}, which strptime refuses: {' '.join(str(error).split())}")


def example(time_format: str) -> str:
    """Some time as a text in a format."""
    return "0" if time_format in UNITS else _A_DAY.strftime(time_format or "%Y-%m-%d")


def describe(time_format: str) -> str:
    """What a value is not, if it is no time: for errors."""
    if not time_format:
        return "a date (ISO 8601; of another form, say time_format)"
    return f"a number of {time_format} since 1970" if time_format in UNITS else f"a time of the form {time_format}"


def of_numbers(numbers: np.ndarray, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """(int64 microseconds since 1970, 0 where there are none; whether there are none) of float64, NaN being none."""
    with np.errstate(invalid="ignore", over="ignore"):
        moments = np.floor(numbers * UNITS[unit])
        wrong = ~(np.abs(moments) < one_text.BEYOND)
    return np.where(wrong, 0, moments).astype(np.int64), wrong


def of_text(text: str, time_format: str) -> int | None:
    """Microseconds since 1970 of a text in a format that is no unit; None if it is none."""
    if not time_format:
        return one_text.moment(text) if one_text.number(text) is None else None
    try:
        return one_text.microseconds(datetime.datetime.strptime(text, time_format))
    except (ValueError, OverflowError):
        return None
