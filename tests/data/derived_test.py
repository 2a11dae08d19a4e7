"""Tests categories that are made: buckets of numbers, parts of times, crosses; `values/` and the schema's checks."""

import dataclasses
import datetime
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dlrm_jax.config import ConfigError
from dlrm_jax.data.prepare.preparation import Options, prepare
from dlrm_jax.data.read.prepared import read_json
from dlrm_jax.data.schema.schema import Sparse, Split
from dlrm_jax.data.schema.schema_io import from_dict
from dlrm_jax.data.values import buckets, one_text, time_parts
from dlrm_jax.data.values.bags import Elements, read_bags
from dlrm_jax.data.values.sparse_columns import crossed_texts
from tests.prepared_helpers import ALL_TRAIN, prepare_text, rows_of, schema

NUMBERS = st.one_of(st.integers(-(10**6), 10**6).map(float), st.floats(-1e15, 1e300, allow_nan=False))


@given(NUMBERS)
@example(2.0)
@example(2.5)
@example(3.0)
def test_log_squared_is_that_of_criteos_winners(x):
    want = math.floor(math.log(x) ** 2) if x > 2 else int(x)
    (found,), (undefined,) = buckets.bucket("log_squared", np.array([x]))
    assert not undefined and found == want


def test_a_number_without_a_whole_number_is_told():
    found, undefined = buckets.bucket("log_squared", np.array([-1e300, 7.0, 2**53 * -1.0]))
    assert undefined.tolist() == [True, False, False] and found.tolist() == [0, 3, -(2**53)]


@given(st.lists(st.sampled_from([-3.5, 0.0, 1.0, 2.0, 1e300]) | NUMBERS, min_size=1, max_size=60), st.integers(2, 9))
def test_edges_are_quantiles(values, size):
    numbers, counts = np.unique(values, return_counts=True)
    shuffled = np.random.default_rng(0).permutation(len(numbers))
    edges = buckets.edges(numbers[shuffled], counts[shuffled], size)
    cuts = [sorted(values)[math.ceil(k * len(values) / size) - 1] for k in range(1, size)]
    assert edges.tolist() == sorted(set(cuts))
    bucket = buckets.among(edges, np.array(values))
    assert bucket.max() < size
    if len(set(values)) == len(values):  # Then buckets are of equal size, but for one row.
        assert np.ptp(np.bincount(bucket, minlength=min(size, len(values)))) <= 1


def test_quantiles_are_those_of_training_rows_and_kept(tmp_path):
    rows = [(i % 2, "" if i == 3 else (i if i < 80 else 10**6 + i), "a") for i in range(100)]
    text = "label,x,c\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    columns = (Sparse("c"), Sparse("q", column="x", buckets="quantile", size=4, missing="fill", fill="79.5"))
    log = schema(dense=(), sparse=columns, split=Split("order", val=0.2, test=0))
    output = prepare_text(tmp_path, text, log)
    table = read_json(output / "statistics.json")["tables"]["q"]
    trained = np.sort([79.5 if x == "" else x for _, x, _ in rows[:80]])
    assert table["edges"] == trained[[19, 39, 59]].tolist() and table["rows"] == 4
    assert {top["value"] for top in table["top"]} == {"<= 20", "> 20 and <= 40", "> 40 and <= 60", "> 60"}
    ids = rows_of(output).ids_RxK[:, 1]
    assert np.bincount(ids).tolist() == [20] * 4 and ids[3] == 3
    assert set(rows_of(output, "val").ids_RxK[:, 1]) == {3}
    assert not (output / "vocabularies" / "q.parquet").exists()


def test_rules_of_numbers_and_times_become_vocabularies(tmp_path):
    rows = [
        (1, x, f"14102{1 + i % 7}{i % 24:02d}") for i, x in enumerate(["", "1", "5", "5.5", "900", "1e3", "-7", ""])
    ]
    text = "label,x,t\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    columns = (
        Sparse("b", column="x", buckets="log_squared", missing="fill", fill="0", min_count=2, oov=True),
        *(Sparse(part, column="t", part=part, time_format="%y%m%d%H") for part in time_parts.PARTS),
        Sparse("b_hour", cross=("b", "hour")),
    )
    output = prepare_text(tmp_path, text, schema(dense=(), sparse=columns))
    tables = {column.name: pq.read_table(output / "vocabularies" / f"{column.name}.parquet") for column in columns}
    value = {
        name: dict(zip(table["id"].to_pylist(), table["value"].to_pylist(), strict=True))
        for name, table in tables.items()
    }
    rare = 0
    found = [[value[c.name].get(i, rare) for c, i in zip(columns, ids, strict=True)] for ids in rows_of(output).ids_RxK]
    bucket = [0, rare, 2, 2, rare, rare, rare, 0]  # 46, 47, -7 and 1 occur once.
    days = [datetime.date(2014, 10, 21 + i % 7) for i in range(8)]
    whole = [0, 1, 2, 2, 46, 47, -7, 0]
    assert found == [
        [bucket[i], i, int(day.strftime("%w")), int(day.weekday() >= 5), f"{whole[i]} & {i}"]
        for i, day in enumerate(days)
    ]


@given(
    st.lists(st.text("a&\\ é", max_size=5), min_size=2, max_size=3), st.lists(st.text("a&\\ é", max_size=5), min_size=2)
)
@settings(max_examples=300)
def test_a_crossed_text_tells_its_parts(one, other):
    assert (one_text.joined(one) == one_text.joined(other)) == (one == other)


@given(st.lists(st.tuples(*[st.sampled_from(["", "a", "a & b", "\\", "é"]) | st.text(max_size=3)] * 3), max_size=20))
def test_crosses_of_whole_columns_are_those_of_single_rows(rows):
    parts = [Sparse("p"), Sparse("q", missing="fill", fill="none"), Sparse("r")]
    columns = [pa.array([row[i] for row in rows], pa.string()) for i in range(3)]
    crossed = crossed_texts(
        [(part, Elements.of(part, array, ("",))) for part, array in zip(parts, columns, strict=True)]
    )
    want = [one_text.joined((p, q or "none", r)) if p and r else None for p, q, r in rows]
    assert crossed.to_pylist() == want


@pytest.mark.parametrize(
    ("text", "time_format", "hour", "weekday"),
    [
        ("2024-02-29T23:59:60Z", "", 0, 5),
        ("2024-03-03 01:30+02:00", "", 23, 6),
        ("1706695800", "seconds", 10, 3),
        ("-1", "milliseconds", 23, 3),
        ("14102123", "%y%m%d%H", 23, 2),
        ("03/Mar/2024 +0200 01", "%d/%b/%Y %z %H", 23, 6),
        ("1706695800", "", None, None),
        ("2024-02-30", "", None, None),
        ("1e300", "seconds", None, None),
        ("141021", "%y%m%d%H %M", None, None),
    ],
)
def test_parts_of_times(tmp_path, text, time_format, hour, weekday):
    columns = [
        Sparse(part, column="t", part=part, time_format=time_format, ids="raw", size=24) for part in ("hour", "weekday")
    ]
    log = f"label,t\n1,{text}\n"
    if hour is None:
        with pytest.raises(ConfigError, match=r"column t: '.*' is not a (date|number of|time of)"):
            prepare_text(tmp_path, log, schema(dense=(), sparse=tuple(columns)))
        return
    ids = rows_of(prepare_text(tmp_path, log, schema(dense=(), sparse=tuple(columns)))).ids_RxK
    assert ids.tolist() == [[hour, weekday]]


def test_typed_columns_and_lists_of_numbers(tmp_path):
    table = pa.table(
        {
            "label": [0, 1],
            "x": pa.array([10.5, None]),
            "t": pa.array([datetime.datetime(2024, 3, 3, 5), None], pa.timestamp("ms")),
            "many": pa.array([[3, 100], []], pa.list_(pa.int64())),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    columns = (
        Sparse("b", column="x", buckets="log_squared", ids="raw", size=9),
        Sparse("h", column="t", part="hour", ids="raw", size=24),
        Sparse("many", buckets="log_squared", ids="raw", size=99, hotness=2),
        Sparse("bh", cross=("b", "h"), ids="hash", size=7),
    )
    log = schema(dense=(), sparse=columns, split=ALL_TRAIN)
    prepare((str(tmp_path / "log.parquet"),), tmp_path / "out", log, Options())
    ids = rows_of(tmp_path / "out").ids_RxK
    assert ids[0, :4].tolist() == [5, 5, 1, 21] and ids[0, 4] >= 0 and set(ids[1]) == {-1}


@pytest.mark.parametrize("column", [pa.array([7.0, None]), pa.array([7, None]), pa.array(["7", None])])
def test_what_is_missing_is_filled_whatever_the_type_of_its_column(column):
    bags, bad = read_bags(Sparse("c", missing="fill", fill="x"), column, ("",))
    assert [bags.texts_U[i].as_py() for i in bags.index_hxR[0]] == ["7", "x"] and not bad


def test_decimal_commas_are_read_in_buckets(tmp_path):
    log = schema(dense=(), sparse=(Sparse("x", buckets="log_squared", ids="raw", size=99),), decimal=",", delimiter=";")
    assert rows_of(prepare_text(tmp_path, "label;x\n1;7,5\n0;1e1\n", log)).ids_RxK.tolist() == [[4], [5]]
    (tmp_path / "bad").mkdir()
    with pytest.raises(ConfigError, match=r"line 2, column x: '7\.5' is not a finite number"):
        prepare_text(tmp_path / "bad", "label;x\n1;7.5\n", log)


def test_a_value_without_a_bucket_is_a_bad_row(tmp_path):
    log = schema(dense=(), sparse=(Sparse("x", buckets="log_squared"),))
    for text, words in (("-1e30", "has no whole number under log_squared"), ("nan", "is not a finite number")):
        with pytest.raises(ConfigError, match=f"column x: '{text}' {words}"):
            prepare_text(tmp_path, f"label,x\n1,{text}\n", log)


WRONG = [
    ("{name: c, buckets: tens}", "buckets is 'tens'; choose one of log_squared, quantile"),
    ("{name: c, buckets: quantile}", "buckets: quantile needs size"),
    ("{name: c, buckets: quantile, size: 4, ids: hash}", "gives the ids; leave ids: hash out"),
    ("{name: c, buckets: quantile, size: 4, min_count: 2}", "min_count needs ids: vocabulary"),
    ("{name: c, buckets: log_squared, type: int}", "buckets says what is read; leave type out"),
    ("{name: c, buckets: log_squared, part: hour}", "it has buckets and part; a value is made in one of these ways"),
    (
        "{name: c, buckets: log_squared, missing: fill, fill: none}",
        "fill 'none' is not a finite number that has a bucket",
    ),
    ("{name: c, buckets: log_squared, missing: fill, fill: '-1e30'}", "fill '-1e30' is not a finite number that has"),
    ("{name: c, buckets: log_squared, modulo: 7}", "modulo needs type: int or hex"),
    ("{name: c, part: minute}", "part is 'minute'; choose one of hour, weekday, weekend"),
    ("{name: c, time_format: seconds}", "time_format is for a part of a time; say part"),
    ("{name: c, part: hour, time_format: hours}", "time_format is 'hours'; give one of seconds, milliseconds"),
    ("{name: c, part: hour, time_format: '%Q'}", "time_format is '%Q', which strptime refuses"),
    ("{name: c, part: hour, missing: fill, fill: noon}", "fill 'noon' is not a date"),
    ("{name: c, cross: d}", "cross is d; it needs two sparse columns or more"),
    ("{name: c, cross: [d, d]}", "cross is d, d; it needs two"),
    ("{name: c, cross: [d, x]}", "cross: x is not a sparse column of this schema"),
    ("{name: c, cross: [d, e]}", "cross: e is a cross itself"),
    ("{name: c, cross: [d, f]}", "cross: f is a list"),
    ("{name: c, cross: [d, q]}", "cross: q has quantile buckets"),
    ("{name: c, cross: [d, g], ids: raw}", "ids: raw needs type: int or hex"),
    ("{name: c, cross: [d, g], column: d}", "leave column, separator and hotness out"),
    ("{name: c, buckets: log_squared, table: d}", "share table 'd' but differ in type or ids"),
]


@pytest.mark.parametrize(("column", "words"), WRONG)
def test_what_cannot_be_made_is_one_clear_line(column, words):
    others = (
        "d, g, {name: e, cross: [d, g]}, {name: f, separator: ';', hotness: 2}, {name: q, buckets: quantile, size: 3}"
    )
    with pytest.raises(ConfigError) as error:
        from_dict(yaml.safe_load(f"{{name: log, label: y, sparse: [{others}, {column}]}}"))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_crosses_are_no_columns_of_the_log():
    log = schema(sparse=(Sparse("d"), Sparse("g", column="h"), Sparse("e", cross=("d", "g"))))
    assert log.source_columns() == ["label", "x", "d", "h"]
    assert dataclasses.replace(log.sparse[2], ids="hash", size=5).value_type == "string"
