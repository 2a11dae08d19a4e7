"""The periods of a prepared log that is split by them (`split: {by: time, period: 1d}`), and the rows of each."""

from dlrm_jax.config import ConfigError, require
from dlrm_jax.data.read.dataset import Dataset, Period, Rows, Split
from dlrm_jax.data.read.prepared import PreparedSplit, read_json
from dlrm_jax.data.read.windows import slice_rows
from dlrm_jax.data.values.label_values import only_label


def periods_of(dataset: Dataset) -> list[Period]:
    """All periods, the earliest first; ConfigError for data that is not split by them."""
    if dataset.periods:
        return list(dataset.periods)
    found = read_json(dataset.directory / "statistics.json").get("periods") if dataset.directory else None
    if not found:
        raise ConfigError(
            f"dataset {dataset.name!r} is not split by periods; prepare it with split: {{by: time, period: 1d}} in its "
            "schema"
        )
    return [Period(**period) for period in found]


def between(periods: list[Period], names: str) -> list[Period]:
    """Those from the first to the last of `names`, FIRST:LAST, both included; either may be left out."""
    known = [period.name for period in periods]
    first, colon, last = names.partition(":")
    require(bool(colon), f"--periods={names}; give FIRST:LAST, either may be left out, as {known[0]}:")
    for name in filter(None, (first, last)):
        require(name in known, f"--periods={names}: there is no period {name!r}; they are {known[0]} to {known[-1]}")
    found = periods[known.index(first) if first else 0 : known.index(last) + 1 if last else None]
    require(bool(found), f"--periods={names}: {first} comes after {last}")
    return found


def rows_of_period(dataset: Dataset, period: Period) -> Rows:
    """The rows of a period, in the order of the log, to be read as those of a split are."""
    split = dataset.splits[period.split]
    if isinstance(split, PreparedSplit):
        return split.part(period.first, period.rows, only_label(period.rows, period.positives, None))
    assert isinstance(split, Split), "what is prepared is on disk or in memory"
    return slice_rows(split, period.first, period.first + period.rows)
