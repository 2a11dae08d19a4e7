"""Any text or number of a raw row is read by a server as preparation reads it, rule by rule, and crossed alike."""

import functools
import json
import types

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest

from dlrm_jax.data.schema.schema import Dense, Schema, Sparse
from dlrm_jax.data.values import time_parts
from dlrm_jax.data.values.bags import read_bags
from dlrm_jax.data.values.buckets import BUCKETS, among
from dlrm_jax.data.values.columns import read_dense
from dlrm_jax.data.values.sparse_columns import read_sparse
from dlrm_jax.data.values.transforms import TRANSFORMS
from dlrm_jax.data.values.vocabulary import Vocabulary
from dlrm_jax.serving.artifact.errors import BadRequest
from dlrm_jax.serving.artifact.signature import ServedFeature, Signature
from dlrm_jax.serving.artifact.transform import Reader
from dlrm_jax.serving.http.page import example_row
from tests.prepared_helpers import schema


def reader_of(one: Dense | Sparse) -> Reader:
    """A reader of a schema with nothing else in it."""
    dense, sparse = ((one,), (Sparse("c"),)) if isinstance(one, Dense) else ((), (one,))
    values = json.loads(json.dumps(to_plain(schema(dense=dense, sparse=sparse))))
    features = tuple(ServedFeature(s.name, s.name, s.hotness, "sum", s.size or 1000) for s in sparse)
    return Reader(Signature("x", ("x",), features, 4, "float32", values, {}, {"c": EDGES}), {})


def to_plain(of: Schema) -> dict:
    from dlrm_jax.data.schema.schema_io import to_dict

    return to_dict(of)


NUMBERS = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(repr),
    st.sampled_from(["", " 1", "1 ", "+3", "1e5", "1e400", "-1e-400", "nan", "inf", "-inf", "1_0", "0x1", "١٢", "--1"]),
    st.text(max_size=6),
)


@hypothesis.given(NUMBERS, st.sampled_from(list(TRANSFORMS.all())))
@hypothesis.settings(max_examples=150, deadline=None)
def test_any_text_of_a_dense_column_is_read_alike(text, transform):
    hypothesis.assume("\x00" not in text)
    dense = Dense("x", transform=transform)
    values, bad = read_dense(dense, pa.array([text]), ("",))
    try:
        got, _, _ = reader_of_cached(dense).read([{"x": text, "c": None}])
    except BadRequest:
        assert bad, f"preparation takes {text!r} as {values[0]}"
        return
    assert not bad, f"preparation refuses {text!r}: {bad[0].reason}"
    np.testing.assert_array_equal(got[0].view(np.uint32), values.view(np.uint32))


EDGES = (-5.5, 0.0, 1.0, 96.0, 1e18)
RULES = (
    Sparse("c", ids="hash", size=97),
    Sparse("c", ids="hash", size=97, type="int"),
    Sparse("c", ids="hash", size=97, type="hex"),
    Sparse("c", ids="hash", size=97, type="hex", modulo=1000),
    Sparse("c", ids="hash", size=97, type="int", modulo=1000),
    Sparse("c", ids="raw", size=97, type="int"),
    Sparse("c", ids="raw", size=97, type="int", separator=";", hotness=2),
    Sparse("c", ids="hash", size=97, type="hex", separator=";", hotness=2),
    Sparse("c", ids="hash", size=97, separator=";", hotness=2, missing="fill", fill="f"),
    *(Sparse("c", buckets=rule, ids="hash", size=997) for rule in BUCKETS.all()),
    Sparse("c", buckets="log_squared", ids="raw", size=500, separator=";", hotness=2, missing="fill", fill="7"),
    Sparse("c", buckets="quantile", size=len(EDGES) + 1, separator=";", hotness=2),
    *(
        Sparse("c", part=part, time_format=form, ids="raw", size=24)
        for part in time_parts.PARTS
        for form in ("", "seconds", "milliseconds", "%y%m%d%H", "%Y-%m-%d %H:%M:%S")
    ),
)
_READERS: dict = {}


def reader_of_cached(rule):
    if rule not in _READERS:
        _READERS[rule] = reader_of(rule)
    return _READERS[rule]


@hypothesis.given(
    st.one_of(
        NUMBERS,
        st.text("0123456789abcdefABCDEF", max_size=18),
        st.text(";ab", max_size=8),
        st.lists(st.sampled_from(["1", "96", "97", "x", "", "++5", " 2 "]), max_size=4).map(";".join),
        st.sampled_from(["++5", "9223372036854775807", "-9223372036854775808", "9223372036854775808", "0x1F"]),
        st.sampled_from(["14102123", "1410212", "14109923", "2024-02-30", "2024-03-03T23", "2024-W01-1", "-0", "1;-0"]),
        st.datetimes().map(str),
    ),
    st.sampled_from(RULES),
)
@hypothesis.example("1;2;x", Sparse("c", ids="raw", size=97, type="int", separator=";", hotness=2))
@hypothesis.example("9223372036854775807", Sparse("c", ids="hash", size=97, type="int"))
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_text_of_a_sparse_column_is_read_alike(text, rule):
    hypothesis.assume("\x00" not in text)
    bags, bad = read_bags(rule, pa.array([text]), ("",))
    reader = reader_of_cached(rule)
    try:
        _, got, _ = reader.read([{"c": text}])
    except BadRequest:
        assert bad, f"preparation takes {text!r}"
        return
    assert not bad, f"preparation refuses {text!r}: {bad[0].reason}"
    quantile = rule.buckets == "quantile"
    bags.ids_U = among(EDGES, bags.keys_U.view(np.float64)) if quantile else bags.keys_U.astype(np.int32)
    want = np.empty((rule.hotness, 1), np.int32)
    bags.slots(want)
    np.testing.assert_array_equal(got[0], want[:, 0])


OF_NUMBERS = (
    Sparse("c", buckets="log_squared", ids="hash", size=997),
    Sparse("c", buckets="log_squared", ids="hash", size=97, missing="fill", fill="-2.5"),
    Sparse("c", buckets="quantile", size=len(EDGES) + 1),
    Sparse("c", buckets="quantile", size=len(EDGES) + 1, missing="fill", fill="1e18"),
    Sparse("c", part="hour", time_format="seconds", ids="raw", size=24),
    Sparse("c", part="weekend", time_format="%y%m%d%H", ids="raw", size=2, missing="fill", fill="14102123"),
)


@hypothesis.given(
    st.one_of(st.none(), st.floats(allow_nan=False), st.integers(-(2**53), 2**53).map(float), st.just(14102500.0)),
    st.sampled_from(OF_NUMBERS),
)
@hypothesis.settings(max_examples=200, deadline=None)
def test_any_number_of_a_sparse_column_is_read_alike(number, rule):
    bags, bad = read_bags(rule, pa.array([number], pa.float64()), ("",))
    try:
        _, got, _ = reader_of_cached(rule).read([{"c": number}])
    except BadRequest:
        assert bad, f"preparation takes {number!r}"
        return
    assert not bad, f"preparation refuses {number!r}: {bad[0].reason}"
    keys = bags.keys_U.view(np.float64)
    bags.ids_U = among(EDGES, keys) if rule.is_quantile else bags.keys_U.astype(np.int32)
    want = np.empty((1, 1), np.int32)
    bags.slots(want)
    np.testing.assert_array_equal(got, want)


CROSSED = schema(
    dense=(),
    sparse=(
        Sparse("word"),
        Sparse("whole", type="int", modulo=7),
        Sparse("hex", type="hex", missing="fill", fill="ff"),
        Sparse("bucket", column="whole", buckets="log_squared"),
        Sparse("hour", column="word", part="hour"),
        Sparse("three", cross=("word", "whole", "hex"), ids="hash", size=10**6),
        Sparse("filled", cross=("bucket", "hex", "word"), ids="hash", size=10**6, missing="fill", fill="gap"),
        Sparse("timed", cross=("hour", "bucket"), ids="hash", size=10**6),
    ),
)
PARTS_OF_CROSSES = ("word", "whole", "hex")


@functools.cache
def crossed_reader() -> Reader:
    features = tuple(ServedFeature(s.name, s.name, 1, "sum", s.size or 10) for s in CROSSED.sparse)
    no_vocabularies = {s.name: Vocabulary(s.name, s.value_type == "string") for s in CROSSED.sparse}
    return Reader(Signature("x", (), features, 4, "float32", to_plain(CROSSED), {}), no_vocabularies)


@hypothesis.given(
    st.fixed_dictionaries(
        {
            "word": st.sampled_from(["", "a & b", "\\&", "2024-03-03T23", "1"]) | st.text(max_size=8),
            "whole": NUMBERS,
            "hex": st.sampled_from(["", "ffffffffffffffff", "00ff", "x"]),
        }
    )
)
@hypothesis.settings(max_examples=200, deadline=None)
def test_any_texts_are_crossed_alike(row):
    hypothesis.assume("\x00" not in "".join(row.values()))
    read = read_sparse(CROSSED, {name: pa.array([row[name]]) for name in PARTS_OF_CROSSES})
    bad = [reason for _, found in read for reason in found]
    try:
        _, got, _ = crossed_reader().read([row])
    except BadRequest:
        assert bad, f"preparation takes {row}"
        return
    assert not bad, f"preparation refuses {row}: {bad[0].reason}"
    want = [bags.keys_U[index] if (index := bags.index_hxR[0, 0]) >= 0 else -1 for bags, _ in read[5:]]
    assert got[0, 5:].tolist() == want


def test_a_cross_without_a_value_names_its_row():
    log = schema(dense=(), sparse=(*CROSSED.sparse[:3], Sparse("both", cross=("word", "hex"), missing="error")))
    features = tuple(ServedFeature(s.name, s.name, 1, "sum", 10) for s in log.sparse)
    vocabularies = {s.name: Vocabulary(s.name, s.value_type == "string") for s in log.sparse}
    reader = Reader(Signature("x", (), features, 4, "float32", to_plain(log), {}), vocabularies)
    assert reader.columns == PARTS_OF_CROSSES
    with pytest.raises(BadRequest, match="row 1, feature 'both': is missing"):
        reader.read([{"word": "a", "whole": 1, "hex": "f"}, {"word": None, "whole": 1, "hex": "f"}])


@pytest.mark.parametrize("time_format", ["", "seconds", "%y%m%d%H"])
def test_the_example_of_a_page_can_be_scored(time_format):
    hour = Sparse("hour", column="when", part="hour", time_format=time_format, ids="hash", size=9)
    both = Sparse("both", cross=("hour", "word"), ids="hash", size=9, missing="error")
    log = schema(dense=(), sparse=(Sparse("word", ids="hash", size=9), Sparse("else", ids="hash", size=9), hour, both))
    features = tuple(ServedFeature(s.name, s.name, 1, "sum", 9) for s in log.sparse)
    signature = Signature("x", (), features, 4, "float32", to_plain(log), {})
    servable = types.SimpleNamespace(signature=signature, reader=Reader(signature, {}))
    row = example_row(servable)
    assert row["word"] == "0" and row["else"] is None and list(row) == ["word", "else", "when"]
    assert servable.reader.read([row])[1].min(axis=0).tolist()[1] == -1
