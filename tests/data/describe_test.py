"""Tests `dlrm_jax/data/prepare/describe.py`: what a person sees of a prepared dataset."""

import datetime
import json

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.figure import Figure

from dlrm_jax.data.formats import text_source
from dlrm_jax.data.prepare.describe import describe
from dlrm_jax.data.read.prepared import read_json
from dlrm_jax.data.schema.schema import Dense, Split
from dlrm_jax.data.values.columns import is_missing
from dlrm_jax.data.values.dense import DenseRange, inverse, transform
from tests.prepared_helpers import prepare_text, schema

COLUMNS = (
    Dense("plain"),
    Dense("counts", transform="log1p"),
    Dense("aged", transform="standardise", missing="mean"),
    Dense("criteo", transform="nvidia_log"),
    Dense("filled", fill=7.0),
)
ROWS = [
    "label,plain,counts,aged,criteo,filled,c",
    *("0,1.5,3,20,-1,,a", "1,-2.5,,,5,,a", "0,,8,40,2,3,b", "1,4,NA,,,9,b", "0,bad,1000,99,99,99,b"),
]
RIGHT = {  # least, most, mean, share of rows that are missing; the bad row does not count.
    "plain": (-2.5, 4, 1, 0.25),
    "counts": (3, 8, 5.5, 0.5),
    "aged": (20, 40, 30, 0.5),
    "criteo": (-1, 5, 2, 0.25),
    "filled": (3, 9, 6, 0.5),
}


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(text_source.TextSource.__init__, "__defaults__", (False, 30))  # A chunk a row.
    log = schema(dense=COLUMNS, null_values=("", "NA"))
    return prepare_text(tmp_path, "\n".join(ROWS) + "\n", log, on_bad_row="skip_and_count")


def test_range_mean_and_missing_of_every_dense_column(prepared):
    found = read_json(prepared / "statistics.json")["dense_columns"]
    assert list(found) == list(RIGHT)
    for name, numbers in RIGHT.items():
        values = [found[name][key] for key in ("least", "most", "mean", "missing_share")]
        np.testing.assert_allclose(values, numbers, rtol=1e-5)
    lines = [line.split() for line in describe(prepared).splitlines()]
    assert ["plain", "-2.5", "4", "1", "25.00%"] in lines and ["counts", "3", "8", "5.5", "50.00%"] in lines


def test_a_column_without_a_number_and_a_dataset_of_before(prepared):
    path = prepared / "statistics.json"
    (prepared / "hashes.json").unlink()
    statistics = json.loads(path.read_text())
    statistics["dense_columns"]["plain"] = DenseRange().summary()
    path.write_text(json.dumps(statistics))
    assert ["plain", "-", "-", "-", "-"] in [line.split() for line in describe(prepared).splitlines()]
    del statistics["dense_columns"]
    path.write_text(json.dumps(statistics))
    assert "dense columns: not counted when this dataset was prepared" in describe(prepared)


@pytest.mark.parametrize("name", ["none", "log1p", "nvidia_log"])
def test_inverse_undoes_a_transform(name):
    numbers = np.array([0.0, 1.0, 2.5, 1e4])
    np.testing.assert_allclose(inverse(name, transform(name, numbers)), numbers, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("array", "missing"),
    [
        (pa.array(["a", "", None, "NA"]), [False, True, True, True]),
        (pa.array(["a", "NA", None, "a"]).dictionary_encode(), [False, True, True, False]),
        (pa.array([1.0, float("nan"), None]), [False, True, True]),
        (pa.array([1, None]), [False, True]),
        (pa.array([], pa.string()), []),
    ],
)
def test_missing_values_of_any_array(array, missing):
    assert is_missing(array, ("", "NA")).tolist() == missing


def log_over_time(directory, times):
    text = "label,x,c,t\n" + "".join(f"{i % 2},1,a,{time}\n" for i, time in enumerate(times))
    return prepare_text(directory, text, schema(timestamp="t", split=Split("time")))


START = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
DAYS = [START + datetime.timedelta(days=day) for day in range(50)]


@pytest.mark.parametrize("unit", [None, 1, 1_000, 1_000_000, 1_000_000_000])
def test_times_are_dates_in_table_and_picture(tmp_path, monkeypatch, unit):
    """Also where the log counts seconds, or parts of them, since 1970."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), savefig(self, *args, **kw)))
    times = [f"{day:%Y-%m-%d %H:%M:%S}" if unit is None else int(day.timestamp()) * unit for day in DAYS]
    output = log_over_time(tmp_path, times)
    assert "time: 2024-01-01 00:00:00 to 2024-02-19 00:00:00 UTC" in describe(output)
    axes = figures[-1].axes[2]
    assert axes.get_xlabel() == "time, UTC"
    assert [tick.get_text()[:4] for tick in axes.get_xticklabels()] == ["2024"] * len(axes.get_xticklabels())


def test_other_numbers_are_no_dates(tmp_path):
    assert "time:" not in describe(log_over_time(tmp_path, range(50)))
