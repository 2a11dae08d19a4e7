"""Periods of time by which a log is cut: `1d`, `12h`, `30m`, `2w` of dates, or a number in the unit of the timestamps.

Periods begin at whole multiples of their length since 1970 in UTC, weeks on Mondays; those of other numbers since 0.
"""

import dataclasses
import datetime
import re

import numpy as np

from dlrm_jax.config import require

_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_MONDAY = 4 * 86_400
"""1970-01-05, in seconds since 1970."""
UNITS = (1, 10**3, 10**6, 10**9)
"""A second in the units in which logs count time since 1970."""
MICROSECONDS = 10**6
_DATED = (1e8, 4.1e9)
"""Seconds since 1970 from 1973 to 2099; a number beyond these is no date."""


def require_period(text: str) -> None:
    """ConfigError for what is no period."""
    right = re.fullmatch(r"0*[1-9]\d{0,15}[mhdw]?", text, re.ASCII)
    what = "a whole number and m, h, d or w, as 1d, or a number alone in the unit of the timestamps"
    require(right is not None, f"split: period is {text!r}; it is {what}")


def units_a_second(low: float, high: float) -> int:
    """In which unit times from `low` to `high` are dates since 1970; 0 if in none, as days from 0."""
    return next((unit for unit in UNITS if _DATED[0] <= low / unit <= high / unit <= _DATED[1]), 0)


@dataclasses.dataclass(frozen=True)
class Periods:
    """Period k holds the times from `origin + k * width` on; `units` of them are a second (0: they are no dates)."""

    width: int
    origin: int
    units: int

    @classmethod
    def of(cls, text: str, column: str, dates: bool, low: int, high: int) -> "Periods":
        """The periods of a column whose times, dates or numbers, lie from `low` to `high`."""
        units = MICROSECONDS if dates else units_a_second(low, high)
        if text[-1].isdigit():
            require(not dates, f"split: period is {text}, but column {column} holds dates; say it as 1d or 12h")
            return cls(int(text), 0, units)
        where = f"split: period is {text}, but the numbers of column {column}, {low} to {high}, are no dates"
        require(units > 0, f"{where}; give a number in their unit")
        return cls(int(text[:-1]) * _SECONDS[text[-1]] * units, _MONDAY * units * (text[-1] == "w"), units)

    def number(self, times: np.ndarray) -> np.ndarray:
        """The period of each time."""
        return (times - self.origin) // self.width

    def start(self, number: int) -> int:
        """When a period begins, in the log's unit."""
        return self.origin + number * self.width

    def name(self, number: int) -> str:
        """A period's begin for a person, as 2024-01-31 or 2024-01-31T12:00."""
        start = self.start(number)
        try:
            seconds = datetime.timedelta(microseconds=start * MICROSECONDS // self.units)
            when = datetime.datetime(1970, 1, 1) + seconds
        except (ZeroDivisionError, OverflowError):  # No date, or one beyond the calendar of Python.
            return str(start)
        return when.isoformat(timespec="auto" if when.second else "minutes").removesuffix("T00:00")
