"""The periods of a prepared log that is split by them (`split: {by: time, period: 1d}`), and the rows of each."""

import dataclasses

from dlrm_jax.config import ConfigError
from dlrm_jax.data.read.dataset import Dataset, Rows, Split
from dlrm_jax.data.read.prepared import PreparedSplit, read_json
from dlrm_jax.data.read.windows import slice_rows
from dlrm_jax.data.values.label_values import only_label


@dataclasses.dataclass(frozen=True)
class Period:
    """A period that has rows: rows `first` to `first + rows` of its split. `start` is in the unit of the log."""

    name: str
    start: int
    split: str
    first: int
    rows: int
    positives: int


def periods_of(dataset: Dataset) -> list[Period]:
    """All periods, the earliest first; ConfigError for data that is not split by them."""
    found = read_json(dataset.directory / "statistics.json").get("periods") if dataset.directory else None
    if not found:
        raise ConfigError(
            f"dataset {dataset.name!r} is not split by periods; prepare it with split: {{by: time, period: 1d}} in its "
            "schema"
        )
    return [Period(**period) for period in found]


def rows_of_period(dataset: Dataset, period: Period) -> Rows:
    """The rows of a period, in the order of the log, to be read as those of a split are."""
    split = dataset.splits[period.split]
    if isinstance(split, PreparedSplit):
        return split.part(period.first, period.rows, only_label(period.rows, period.positives, None))
    assert isinstance(split, Split), "what is prepared is on disk or in memory"
    return slice_rows(split, period.first, period.first + period.rows)
