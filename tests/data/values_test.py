"""A value of a log is good or bad by itself, whatever rows, chunks and threads are beside it."""

import dataclasses
import datetime
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats import text_source
from dlrm_jax.data.formats.json_lines import parse_json
from dlrm_jax.data.read.prepared import read_json
from dlrm_jax.data.schema.schema import Dense, Label, Sparse, Split
from dlrm_jax.data.values import columns, one_text, times
from dlrm_jax.data.values.bags import read_bags
from dlrm_jax.data.values.dense import DenseStatistics, finish_dense, transform
from dlrm_jax.serving.artifact.raw_values import Refused, integer_of, number_of_text
from tests.prepared_helpers import prepare_text, rows_of, schema

NULLS = ("", "NA")
ODD = [
    *(
        "",
        "NA",
        "0",
        "1",
        "-1",
        "+5",
        "+-5",
        "++5",
        " 7 ",
        "007",
        "1.0",
        "1.5",
        ".5",
        "5.",
        "1e3",
        "1e999",
        "1e-999",
        "-0",
    ),
    *(
        "nan",
        "NaN",
        "nan(1)",
        "inf",
        "-Infinity",
        "0x10",
        "0X1f",
        "1_000",
        "1,5",
        "abc",
        "True",
        "true",
        "train",
        "test",
    ),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775808", "1234567890123456789", "0" * 30 + "8"),
    *("ffffffffffffffff", "0ffffffffffffffff", "00ff", "zz", "12345678", "a|b", "a||NA", "|", "١٢", "\x1c3", "x" * 50),
    *("2024-01-01", "2024-02-30", "0000-00-00 00:00:00", "0000-01-01", "2024-01-01 10:10:00", "2024-01-01T10:10:00Z"),
    *("2024-01-01 10:10:00 UTC", "2024-01-01T10:10:00.1234567+02:00", "20240101T101000Z", "2024-W01-1", "2024-366"),
    *("2024-01-01T24:00:00", "2024-01-01T10:10:00z", "2024-01", "20240101", "1704067200", "01/02/2024", "T10:00"),
]
TEXT = st.one_of(
    st.sampled_from(ODD),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(repr),
    st.integers(0, 2**70).map("{:x}".format),
    st.datetimes().map(str),
    st.datetimes(timezones=st.timezones()).map(datetime.datetime.isoformat),
    st.text(st.sampled_from("0123456789+-.eExTZ: |anif"), max_size=12),
)
DENSE = [Dense("x", transform=name) for name in ("none", "log1p", "nvidia_log", "torchrec_log", "standardise")]
DENSE += [Dense("x", missing="mean"), Dense("x", missing="error")]
SPARSE = [
    Sparse("c"),
    Sparse("c", separator="|", hotness=2),
    Sparse("c", ids="hash", size=97),
    Sparse("c", missing="fill", fill="zero"),
    *(
        Sparse("c", type=kind, **more)
        for kind in ("int", "hex")
        for more in ({}, {"modulo": 13}, {"ids": "hash", "size": 9})
    ),
    *(Sparse("c", type=kind, ids="raw", size=size) for kind in ("int", "hex") for size in (0, 1000)),
    Sparse("c", type="int", missing="error"),
    Sparse("c", type="int", separator="|", hotness=3),
]


def bag_of(sparse: Sparse, array: pa.Array):
    bags, bad = read_bags(sparse, array, NULLS)
    keys = np.append(bags.keys_U, np.uint64(2**64 - 1))
    return [tuple(np.where(index < 0, -1.0, keys[index].astype(float))) for index in bags.index_hxR.T], bad


def time_of(array: pa.Array):
    (moments, dates), bad = columns.read_time("t", array, NULLS)
    return list(zip(moments.tolist(), dates.tolist(), strict=True)), bad


READERS = {
    "label": lambda array: columns.read_label(Label("y"), array, NULLS),
    "threshold": lambda array: columns.read_label(Label("y", threshold=0.5), array, NULLS),
    "number": lambda array: columns.read_number("n", array, NULLS),
    "split": lambda array: columns.read_split("s", array, NULLS),
    "time": time_of,
    **{
        f"dense {i}": lambda array, dense=dense: columns.read_dense(dense, array, NULLS)
        for i, dense in enumerate(DENSE)
    },
    **{f"bags {i}": lambda array, sparse=sparse: bag_of(sparse, array) for i, sparse in enumerate(SPARSE)},
}


def by_row(read, array: pa.Array) -> list:
    """(value or, for a bad row, nothing; the first reason why it is bad) of each row."""
    values, bad = read(array)
    reasons: dict[int, str] = {}
    for item in bad:
        for row in item.row_M.tolist():
            reasons.setdefault(row, item.reason)
    return [(None if row in reasons else repr(values[row]), reasons.get(row)) for row in range(len(array))]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("5", 5), ("+5", 5), ("-5", -5), ("007", 7), (" 7 ", 7), ("-0", 0), ("0" * 30 + "8", 8)),
        *((str(2**63 - 1), 2**63 - 1), (str(-(2**63)), -(2**63)), (str(2**63), None), (str(-(2**63) - 1), None)),
        *((text, None) for text in ("", "+", "++5", "+-5", "--5", "5-", "1.0", "1e3", "0x10", "1_000", "1 000", "٣")),
    ],
)
def test_a_whole_number_is_digits_with_at_most_one_sign(text, value):
    assert one_text.integer(text) == value


@pytest.mark.parametrize("reader", READERS)
@given(texts=st.lists(TEXT, min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
@pytest.mark.sample(8)
def test_a_text_means_the_same_alone_as_among_others(reader, texts):
    read = READERS[reader]
    alone = [by_row(read, pa.array([text]))[0] for text in texts]
    assert by_row(read, pa.array(texts)) == alone
    assert by_row(read, pa.array(texts).dictionary_encode()) == alone


JSON_VALUE = st.one_of(
    st.none(),
    st.sampled_from(["", "NA", "a", "a|b", "|", "a||NA|c|d", "1|2"]),
    st.integers(-5, 5),
    st.floats(allow_nan=False),
    st.booleans(),
    st.lists(st.one_of(st.none(), st.sampled_from(["", "a", "a|b", "NA"]), st.integers(0, 3)), max_size=4),
)


@given(values=st.lists(JSON_VALUE, min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_a_value_of_json_means_the_same_alone_as_among_others(values):
    """A list in another line makes the column one of lists; texts must be cut at the separator all the same."""

    def bags(values: list) -> list:
        lines = "".join(json.dumps({"c": value}) + "\n" for value in values).encode()
        array = parse_json(lines, 1, ["c"], (), separators={"c": "|"}).arrays["c"]
        return by_row(lambda array: bag_of(Sparse("c", separator="|", hotness=3), array), array)

    assert bags(values) == [bags([value])[0] for value in values]


TYPED = {
    "int64": (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    "uint64": (pa.uint64(), st.integers(0, 2**64 - 1)),
    "double": (pa.float64(), st.floats()),
    "bool": (pa.bool_(), st.booleans()),
    "timestamp[s]": (pa.timestamp("s"), st.integers(-(2**63), 2**63 - 1)),
    "timestamp[ns, UTC]": (pa.timestamp("ns", "UTC"), st.integers(-(2**63), 2**63 - 1)),
    "date32": (pa.date32(), st.integers(-(2**31), 2**31 - 1)),
}


@pytest.mark.parametrize(
    ("reader", "kind"),
    [
        (reader, kind)
        for reader in READERS
        for kind in TYPED
        if not kind.startswith(("timestamp", "date")) or reader.startswith(("time", "number", "dense"))
    ],
)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
@pytest.mark.sample(50)
def test_a_typed_value_means_the_same_alone_as_among_others(reader, kind, data):
    of, strategy = TYPED[kind]
    values = data.draw(st.lists(st.none() | strategy, min_size=1, max_size=8))
    plain = {"timestamp[s]": pa.int64(), "timestamp[ns, UTC]": pa.int64(), "date32": pa.int32()}.get(kind, of)
    array = pa.array(values, plain).view(of) if plain != of else pa.array(values, of)
    assert by_row(READERS[reader], array) == [
        by_row(READERS[reader], array.slice(i, 1).take([0]))[0] for i in range(len(array))
    ]


@given(text=TEXT)
@settings(max_examples=400, deadline=None)
def test_serving_reads_numbers_as_preparation_does(text):
    def served(parse):
        try:
            return parse(text)
        except Refused:
            return None

    numbers, wrong = columns.to_numbers(pa.array([text]))
    number = served(number_of_text)
    assert (number is None or abs(number) == np.inf) == bool(wrong[0])
    if not wrong[0]:
        assert repr(float(numbers[0])) == repr(number)
    integers, wrong = columns.to_integers(pa.array([text]), "int")
    assert (None if wrong[0] else int(integers[0])) == served(integer_of) == one_text.integer(text)


@given(text=TEXT)
@settings(max_examples=600, deadline=None)
def test_the_fast_way_to_a_time_is_the_plain_one(text):
    fast = times.of_common_texts(pa.array([text]))
    if fast is not None:
        assert fast[0] == one_text.moment(text)


LOG = schema(dense=(Dense("x"),), sparse=(Sparse("c", type="int"),), timestamp="t", split=Split("time", 0, 0))


def log_text(rows: list[tuple]) -> str:
    return "label,x,c,t\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)


def test_one_bad_value_leaves_the_rest_of_its_chunk_alone(tmp_path):
    rows = [(i % 2, i, 10**18 + i, f"2024-01-01 10:00:{i % 60:02d}") for i in range(500)]
    rows[123] = (0, 1, 5, "0000-00-00 00:00:00")
    rows[321] = (0, 1, "n/a", "2024-01-01")
    with pytest.raises(ConfigError, match=r"line 125, column t: '0000-00-00 00:00:00' is neither a number nor a date"):
        prepare_text(tmp_path, log_text(rows), LOG)
    (tmp_path / "skipping").mkdir()
    output = prepare_text(tmp_path / "skipping", log_text(rows), LOG, on_bad_row="skip_and_count")
    skipped = read_json(output / "statistics.json")["skipped"]
    assert skipped["rows"] == 2 and len(skipped["reasons"]) == 2
    assert rows_of(output).row_R.tolist() == [i for i in range(500) if i not in (123, 321)]


@given(
    rows=st.lists(st.tuples(st.integers(0, 1), TEXT, TEXT, TEXT), min_size=1, max_size=30),
    chunk_bytes=st.integers(16, 600),
)
@settings(max_examples=40, deadline=None)
def test_which_rows_are_good_does_not_depend_on_the_chunks(tmp_path_factory, rows, chunk_bytes):
    """Each row alone in a log of its own is the plain version."""
    quoted = [tuple(json.dumps(str(cell), ensure_ascii=False).replace('\\"', '""') for cell in row) for row in rows]
    good = []
    for i, row in enumerate(quoted):
        with_date = [row[0], row[1], row[2], row[3]]
        try:
            prepare_text(tmp_path_factory.mktemp("alone"), log_text([with_date]), LOG)
            good.append(i)
        except ConfigError:
            continue
    defaults = text_source.TextSource.__init__.__defaults__
    text_source.TextSource.__init__.__defaults__ = (False, chunk_bytes)
    try:
        directory = tmp_path_factory.mktemp("together")
        output = prepare_text(directory, log_text(quoted), LOG, on_bad_row="skip_and_count")
        assert sorted(rows_of(output).row_R.tolist()) == good
    except ConfigError as error:
        assert (not good and "no rows" in str(error)) or "no common order" in str(error)
    finally:
        text_source.TextSource.__init__.__defaults__ = defaults


def test_dates_beside_numbers_have_no_order(tmp_path):
    rows = [(i % 2, i, i, "2024-01-01" if i % 9 else 1_700_000_000) for i in range(100)]
    with pytest.raises(ConfigError, match="column t is a number in 12 rows and a date in 88, which"):
        prepare_text(tmp_path, log_text(rows), LOG)
    without = dataclasses.replace(LOG, timestamp="", split=Split("random"))
    assert len(rows_of(prepare_text(tmp_path, log_text(rows), without)).label_R) > 0


def statistics_of(values: np.ndarray, pieces: int) -> DenseStatistics:
    statistics = DenseStatistics()
    for part in np.array_split(values, pieces):
        statistics.add(part)
    return statistics


@pytest.mark.parametrize("value", [0.1, -3e-7, 1 / 3, 0.0, 1e20, 123456.789])
@pytest.mark.parametrize("pieces", [1, 7, 300])
def test_a_constant_column_is_standardised_to_zero(value, pieces):
    own = statistics_of(np.full(100_000, value), pieces)
    assert own.deviation == 1.0
    standardise = Dense("x", transform="standardise", missing="mean")
    found = finish_dense(standardise, np.array([value, np.nan, value + 0.5]), own, 0.0)
    assert found[0] == 0 and found[1] == 0 and found[2] == np.float32(value + 0.5 - value)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_other_columns_have_numpys_deviation(values, pieces):
    own = statistics_of(np.array(values), pieces)
    spread = np.std(values)
    if spread > 1e-12 * np.abs(values).max():
        np.testing.assert_allclose(own.deviation, spread, rtol=1e-6)


def test_log1p_has_one_meaning_whatever_becomes_of_missing_values():
    counts = np.random.default_rng(0).integers(0, 10**7, 20_000).astype(np.float64)
    own = statistics_of(counts, 3)
    finished = finish_dense(Dense("x", transform="log1p", missing="mean"), counts, own, 0.0)
    np.testing.assert_array_equal(finished, transform("log1p", counts))
