"""A moment has one number in every form, and decides the split of a log that has one a row."""

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_jax.data.infer.infer import infer
from dlrm_jax.data.prepare.preparation import Options, prepare
from dlrm_jax.data.schema.schema import Split
from dlrm_jax.data.schema.schema_io import dump_yaml, load
from dlrm_jax.data.values import one_text, times
from tests.prepared_helpers import rows_of


@given(
    utc=st.datetimes(datetime.datetime(2, 1, 1), datetime.datetime(9998, 1, 1), timezones=st.just(datetime.UTC)),
    offset=st.integers(-1439, 1439),
)
@settings(max_examples=200, deadline=None)
def test_a_moment_has_one_number_in_every_form(utc, offset):
    moment = utc.astimezone(datetime.timezone(datetime.timedelta(minutes=offset)))
    expected = (utc - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(microseconds=1)
    basic = utc.isoformat().replace("-", "").replace(":", "").replace("+0000", "Z")
    forms = [utc.isoformat(), basic, moment.isoformat(), utc.isoformat(" ").replace("+00:00", " UTC")]
    forms += [utc.isoformat().replace("+00:00", ""), utc.isoformat().replace(".", ",")]
    assert [one_text.moment(form) for form in forms] == [expected] * len(forms)
    assert times.of_temporal(pa.array([utc], pa.timestamp("us", "UTC"))).tolist() == [expected]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("2024-01-01T10:10:00Z", "2024-01-01 10:10:00"),
        ("2024-01-01T12:10:00+02:00", "2024-01-01 10:10:00"),
        ("2024-01-01 10:10:00 UTC", "2024-01-01 10:10:00"),
        ("2024-01-01T10:10:00.1234569Z", "2024-01-01 10:10:00.123456"),
        ("20240101T101000Z", "2024-01-01 10:10:00"),
        ("2024-W01-1T10:10", "2024-01-01 10:10:00"),
        ("2024-001T10:10", "2024-01-01 10:10:00"),
        ("2024-01", "2024-01-01"),
        ("2023-12-31T24:00", "2024-01-01"),
        ("2023-12-31T23:59:60Z", "2024-01-01"),
    ],
)
def test_times_in_many_forms(text, same):
    assert one_text.moment(text) == one_text.moment(same) == times.of_common_texts(pa.array([same]))[0]


@pytest.mark.parametrize("kind", ["us, UTC", "ns", "ms, Europe/Berlin", "s"])
def test_times_of_parquet_split_the_log(tmp_path, kind):
    unit, _, zone = kind.partition(", ")
    moments = pa.array(np.arange(100)[::-1] * 10**9 + 1_700_000_000_000_000_001, pa.int64())
    column = moments.view(pa.timestamp("ns")).cast(pa.timestamp(unit, zone or None), safe=False)
    table = pa.table({"label": np.arange(100) % 2, "c": [f"v{i % 7}" for i in range(100)], "seen": column})
    pq.write_table(table, tmp_path / "log.parquet")
    found = infer((str(tmp_path / "log.parquet"),))
    assert found.timestamp == "seen" and found.split == Split("time")
    assert any(reason.startswith("split by time") for reason in found.reasons)
    prepare((str(tmp_path / "log.parquet"),), tmp_path / "out", found, Options())
    assert sorted(rows_of(tmp_path / "out", "test").row_R.tolist()) == list(range(10))


def guessed(tmp_path, **values):
    names = list(values)
    lines = [",".join(names)] + [",".join(str(values[name](i)) for name in names) for i in range(2000)]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    return infer((str(tmp_path / "log.csv"),))


CLICKS = {"click": lambda i: i % 2, "user": lambda i: f"u{i % 9}"}


@pytest.mark.parametrize(
    ("name", "value", "timestamp"),
    [
        ("eventTime", lambda i: f"2024-01-01T10:{i % 60:02d}:00Z", "eventTime"),
        ("seen", lambda i: f"2024-01-01 10:{i % 60:02d}:00 UTC", "seen"),
        ("unixTime", lambda i: 1_700_000_000 + i, "unixTime"),
        ("time", lambda i: i, "time"),
        ("watch_time", lambda i: i, ""),
        ("birth_date", lambda i: f"19{i % 80 + 10}-01-01", ""),
        ("release_date", lambda i: f"19{i % 80 + 10}-01-01", ""),
        ("note", lambda i: f"2024-01-0{i}", ""),
    ],
)
def test_the_split_that_was_chosen_is_said_and_written(tmp_path, name, value, timestamp):
    found = guessed(tmp_path, **CLICKS, **{name: value})
    assert found.timestamp == timestamp and found.split == Split("time" if timestamp else "random")
    words = (
        f"split by time, the last tenth test and the tenth before it val: {name}" if timestamp else "split at random"
    )
    assert sum(words in reason for reason in found.reasons) == 1
    (tmp_path / "schema.yaml").write_text(dump_yaml(found))
    assert f"split:\n  by: {'time' if timestamp else 'random'}\n" in (tmp_path / "schema.yaml").read_text()
    assert load(tmp_path / "schema.yaml").split == found.split


def test_of_two_columns_of_dates_the_named_one_counts(tmp_path):
    dates = {"seen": lambda i: f"2024-01-{i % 28 + 1:02d}", "shown": lambda i: f"2024-02-{i % 28 + 1:02d}"}
    found = guessed(tmp_path, **CLICKS, **dates)
    assert found.split == Split("random")
    assert any("seen, shown hold dates, but no name says which is the row's" in reason for reason in found.reasons)
    found = guessed(tmp_path, **CLICKS, **dates, event_time=lambda i: f"2024-03-{i % 28 + 1:02d}")
    assert found.timestamp == "event_time" and not {"seen", "shown"} & {c.name for c in (*found.dense, *found.sparse)}
