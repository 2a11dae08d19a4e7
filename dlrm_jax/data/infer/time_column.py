"""Which column of an undescribed log says when each row was written; rows are then split by it, else at random."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from dlrm_jax.data.values.columns import to_numbers, to_times

_NAMES = ("timestamp", "time", "datetime", "date", "ts", "event_time", "created_at", "hour_of_event")
"""Names of a time that may count from anywhere, in any unit."""
_LAST_WORD = re.compile(r"(^|_)(timestamp|time|datetime|date|ts|at)$")
_OF_A_THING = re.compile(
    r"(^|_)(birth|born|dob|birthday|signup|registered|registration|release|released|expiry|expires)(_|$)"
)
"""Words for dates of a person or a thing, which say nothing of when a row was written."""
_YEAR_1990, _YEAR_2100 = 631_152_000, 4_102_444_800
"""In seconds since 1970."""
_SAMPLE = 1000
_WRONG_SHARE = 0.001


def find_time(texts_of: Mapping[str, Sequence[str]]) -> tuple[str, list[str], str]:
    """(the column of times or "", all columns of dates, how the log is split and why), given columns as texts."""
    dated = [name for name, texts in texts_of.items() if _are_dates(texts)]
    named = [name for name in dated if _is_named_time(name)]
    named += [name for name, texts in texts_of.items() if _is_named_time(name) and _are_moments(name, texts)]
    by_time = "split by time, the last tenth test and the tenth before it val"
    if named:
        return named[0], dated, f"{by_time}: {named[0]} is the timestamp by its name and values"
    of_rows = [name for name in dated if not _OF_A_THING.search(_words(name))]
    if len(of_rows) == 1:
        return of_rows[0], dated, f"{by_time}: {of_rows[0]} is the timestamp, as it holds dates"
    why = "no column is a time" if not dated else f"{', '.join(dated)} hold dates, but no name says which is the row's"
    advice = "if rows have a time, name it as timestamp, so that no row is trained on that comes after the test's"
    return "", dated, f"split at random, a tenth val and a tenth test: {why}; {advice}"


def _words(name: str) -> str:
    """A column's name in lower case with _ between words: event_time of eventTime."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()).strip("_")


def _is_named_time(name: str) -> bool:
    return bool(_LAST_WORD.search(_words(name)) or _words(name) in _NAMES) and not _OF_A_THING.search(_words(name))


def _are_dates(texts: Sequence[str]) -> bool:
    """Whether the first values, but for a thousandth of them, are dates, and not numbers."""
    _, wrong, dates = to_times(pa.array(texts[:_SAMPLE], pa.string()))
    return len(texts) > 0 and bool(dates[~wrong].all()) and wrong.mean() <= _WRONG_SHARE


def _are_moments(name: str, texts: Sequence[str]) -> bool:
    """Whether the values are numbers that can be times: of watch_time only seconds, ... since 1970, not durations."""
    numbers, wrong = to_numbers(pa.array(texts, pa.string()))
    if not len(texts) or wrong.mean() > _WRONG_SHARE or len(set(texts)) < 2:
        return False
    middle = float(np.median(numbers[~wrong]))
    since_1970 = any(_YEAR_1990 * unit < middle < _YEAR_2100 * unit for unit in (1, 10**3, 10**6, 10**9))
    return since_1970 or _words(name) in _NAMES
