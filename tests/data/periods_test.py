"""Tests splitting a log day by day (`values/periods.py`, `prepare/splits.py`) and reading a period's rows."""

import datetime
import itertools

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dlrm_jax.config import ConfigError
from dlrm_jax.data.read.periods import periods_of, rows_of_period
from dlrm_jax.data.read.prepared import in_memory, open_prepared
from dlrm_jax.data.schema.schema import Split
from dlrm_jax.data.schema.schema_io import from_dict
from dlrm_jax.data.values.periods import Periods
from tests.batches import train_batches
from tests.prepared_helpers import in_small_blocks, prepare_text, schema

DAILY = Split("time", period="1d", val=1, test=1)
RNG = np.random.default_rng(0)
DAYS = RNG.choice([0, 1, 2, 4, 5], 700, p=[0.3, 0.3, 0.05, 0.15, 0.2])
"""The day of each row, in no order; day 3 has none."""


def text_of(times) -> str:
    return "label,x,c,t\n" + "".join(f"{i % 3 // 2},{i},v{i % 40},{time}\n" for i, time in enumerate(times))


@pytest.fixture
def small_blocks(monkeypatch):
    in_small_blocks(monkeypatch)
    monkeypatch.setattr("dlrm_jax.data.prepare.runs.BLOCKS_PER_SHARD", 2)


def test_each_period_lies_together_in_its_split(tmp_path, small_blocks):
    start = datetime.date(2024, 2, 27)
    dates = [f"{start + datetime.timedelta(days=int(day))} {i % 24:02d}:30" for i, day in enumerate(DAYS)]
    output = prepare_text(tmp_path, text_of(dates), schema(timestamp="t", split=DAILY))
    dataset = open_prepared(output)
    periods = periods_of(dataset)
    assert [p.name for p in periods] == ["2024-02-27", "2024-02-28", "2024-02-29", "2024-03-02", "2024-03-03"]
    assert [p.split for p in periods] == ["train"] * 3 + ["val", "test"]
    for day, period in zip([0, 1, 2, 4, 5], periods, strict=True):
        of_day = np.flatnonzero(day == DAYS)
        for rows in (rows_of_period(dataset, period), rows_of_period(in_memory(dataset), period)):
            window = np.concatenate([part.row_R[order] for part, order in rows.windows(0, 0, shuffle=False)])
            assert window.tolist() == of_day.tolist()
        assert period.positives == (of_day % 3 == 2).sum()
        batches = itertools.islice(train_batches(rows_of_period(dataset, period), 50, 1, 0), -(-len(of_day) // 50))
        shuffled = np.concatenate([batch.dense_BxN[batch.weight_B > 0, 0] for batch in batches])
        assert sorted(shuffled) == of_day.tolist() and (len(of_day) < 50 or shuffled.tolist() != of_day.tolist())
    records = tfds.builder_from_directory(output).as_data_source("train")
    assert np.concatenate([record["row"] for record in records]).tolist() == [
        row for day in (0, 1, 2) for row in np.flatnonzero(day == DAYS)
    ]


def test_records_of_train_are_its_blocks(tmp_path, small_blocks):
    """Though its periods end anywhere, a block of train is read from whole records."""
    all_train = Split("time", period="1", val=0, test=0)
    output = prepare_text(tmp_path, text_of(DAYS), schema(timestamp="t", split=all_train))
    ends = open_prepared(output).splits["train"].ends
    assert set(range(64, len(DAYS), 64)) < set(ends.tolist())
    assert set(np.cumsum(np.bincount(DAYS)).tolist()) <= set(ends.tolist())


@pytest.mark.parametrize(
    ("text", "dates", "times", "names"),
    [
        ("1w", True, [1_704_067_200_000_000], ["2024-01-01"]),  # A Monday.
        ("12h", False, [1_704_067_199, 1_704_067_200], ["2023-12-31T12:00", "2024-01-01"]),
        ("30m", False, [1_704_067_199_999], ["2023-12-31T23:30"]),
        ("7", False, [-1, 0, 13, 14], ["-7", "0", "7", "14"]),
        ("90", False, [1_704_067_290], ["2024-01-01T00:01:30"]),
    ],
)
def test_periods_and_their_names(text, dates, times, names):
    periods = Periods.of(text, "t", dates, min(times), max(times))
    assert [periods.name(k) for k in periods.number(np.array(times)).tolist()] == names


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ({"by": "time", "period": "1y"}, "split: period is '1y'; it is a whole number and m, h, d or w, as 1d"),
        ({"by": "time", "period": "0d"}, "period is '0d'"),
        ({"by": "random", "period": "1d"}, "period is '1d', but by is random; a period needs by: time"),
        ({"by": "time", "period": "1d", "val": 0.2}, "val is 0.2; beside a period it is a whole number of periods"),
        ({"by": "time", "period": "1d", "test": -1}, "test is -1"),
    ],
)
def test_a_period_that_is_none_is_refused(split, says):
    values = {"name": "log", "label": "label", "sparse": ["c"], "timestamp": "t"}
    assert from_dict(values | {"split": {"by": "time", "period": "1d"}}).split == DAILY
    with pytest.raises(ConfigError, match=says):
        from_dict(values | {"split": split})


@pytest.mark.parametrize(
    ("times", "period", "says"),
    [
        (["2024-01-01", "2024-01-02"], "1d", r"has 2 periods of 1d, of which val \(1\) and test \(1\) leave none"),
        (["2024-01-01", "2024-01-02"], "7", "period is 7, but column t holds dates; say it as 1d or 12h"),
        ([1, 2, 3], "1d", "the numbers of column t, 1 to 3, are no dates; give a number in their unit"),
        (range(10_001), "1", "cuts the log into 10,001 periods; at most 10,000, so make it longer"),
    ],
)
def test_a_log_that_has_no_such_periods_is_refused(tmp_path, times, period, says):
    with pytest.raises(ConfigError, match=says):
        prepare_text(tmp_path, text_of(times), schema(timestamp="t", split=Split("time", period=period, val=1, test=1)))


def test_other_splits_have_no_periods(tmp_path):
    output = prepare_text(tmp_path, text_of(DAYS), schema(timestamp="t"))
    with pytest.raises(ConfigError, match=r"is not split by periods; prepare it with split: \{by: time, period: 1d\}"):
        periods_of(open_prepared(output))
