"""Decimal commas: prepared and served, a text is the same number; a point there is refused."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm_jax.config import ConfigError
from dlrm_jax.data.infer.infer import infer
from dlrm_jax.data.prepare.preparation import prepare
from dlrm_jax.data.schema.schema import Dense, Label, Schema, Sparse, Split
from dlrm_jax.data.values.columns import read_number
from dlrm_jax.data.values.decimals import as_written, with_points
from dlrm_jax.serving.artifact.raw_values import Refused, dense_of
from dlrm_jax.serving.artifact.raw_values import with_points as served_with_points
from tests.prepared_helpers import prepare_text, rows_of, schema

COMMA = schema(
    decimal=",",
    delimiter=";",
    label=Label("label", threshold=0.5),
    weight="w",
    dense=(Dense("x"), Dense("y", transform="standardise", missing="mean")),
    null_values=("", ",", "n.a."),
)


def test_commas_are_decimal_in_every_number(tmp_path):
    text = "label;w;x;y;c\n0,5;1,25;3,5;-0,5;1,5\n0,4;2;,5;n.a.;2,5\n1;0,5;,;1e-1;1.5\n"
    rows = rows_of(prepare_text(tmp_path, text, COMMA))
    assert rows.label_R.tolist() == [1, 0, 1] and rows.weight_R.tolist() == [1.25, 2, 0.5]
    assert rows.dense_RxN[:, 0].tolist() == [3.5, 0.5, 0.0]
    assert rows.ids_RxK[:, 0].tolist() == [0, 1, 2]  # A category's text stays as it is.


@pytest.mark.parametrize(("cell", "words"), [("1.234", "'1.234' is not"), ("1.234,5", "'1.234,5'"), ("3,5x", "'3,5x'")])
def test_what_is_no_number_is_shown_as_written(tmp_path, cell, words):
    with pytest.raises(ConfigError) as error:
        prepare_text(tmp_path, f"label;w;x;y;c\n1;1;{cell};1;a\n", COMMA)
    assert f"log.csv, line 2, column x: {words}" in str(error.value)


def test_a_decimal_comma_that_nobody_announced_is_explained(tmp_path):
    with pytest.raises(
        ConfigError, match=r"'3,5' is not a finite number; .* commas are decimal, say decimal: \",\" in"
    ):
        prepare_text(tmp_path, "label;x;c\n1;3,5;a\n", schema(delimiter=";"))


def test_a_quoted_comma_may_be_decimal_between_commas(tmp_path):
    output = prepare_text(tmp_path, 'label,x,c\n1,"3,5",a\n', schema(decimal=","))
    assert rows_of(output).dense_RxN.tolist() == [[3.5]]


@given(
    st.lists(
        st.one_of(
            st.text("0123456789,.-+e ", max_size=8),
            st.floats(-1e6, 1e6).map(lambda x: f"{x:.3f}".replace(".", ",")),
            st.sampled_from(["", "n.a.", ",", "1.5", "nan", "inf", "1,5"]),
        ),
        max_size=30,
    )
)
def test_served_texts_are_read_as_prepared_ones(texts):
    nulls = ("", "n.a.", ",")
    array = pa.array(texts, pa.string())
    numbers, bad = read_number("x", with_points(array, ",", nulls), nulls)
    refused = {}
    for item in as_written(bad, array):
        refused |= dict(zip(item.row_M.tolist(), item.values.to_pylist(), strict=True))
    read = served_with_points(dense_of(Dense("x"), frozenset(nulls)), ",", frozenset(nulls))
    for row, text in enumerate(texts):
        try:
            value = read(text)
        except Refused:
            assert refused[row] == text
        else:
            assert row not in refused and (value == numbers[row] or (value != value and numbers[row] != numbers[row]))


@pytest.mark.parametrize("kind", [pa.float64(), pa.int64()])
def test_numbers_are_numbers(kind):
    array = pa.array([1, None, 3], kind)
    assert with_points(array, ",", ("",)) is array
    read = served_with_points(dense_of(Dense("x"), frozenset()), ",", frozenset())
    assert [read(1.5), read(2)] == [1.5, 2.0]
    with pytest.raises(ValueError, match=r"'1\.5' has a point"):
        read("1.5")


def test_dictionaries_are_read_too():
    array = pa.array(["1,5", "2", "1,5", None]).dictionary_encode()
    assert with_points(array, ",", ()).to_pylist() == ["1.5", "2", "1.5", None]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_infer_finds_decimal_commas(tmp_path, delimiter):
    rows = [delimiter.join((str(i % 2), f"u{i % 9}", f"{i % 97},{i % 10}", str(i))) for i in range(500)]
    (tmp_path / "log.csv").write_text(delimiter.join(("click", "user", "price", "row")) + "\n" + "\n".join(rows) + "\n")
    found = infer((str(tmp_path / "log.csv"),))
    assert found.decimal == "," and [dense.name for dense in found.dense][:1] == ["price"]
    assert "decimal commas, as in price, please check" in found.reasons
    prepare((str(tmp_path / "log.csv"),), tmp_path / "out", found)


@pytest.mark.parametrize(
    ("delimiter", "cells"),
    [
        (";", lambda i: (f"{i % 7},{i % 5},{i % 3}", "a")),  # Lists.
        (";", lambda i: (f"{i % 7},{i % 5}", f"{i}.5")),  # Another column has points.
        (",", lambda i: (f'"{i % 7},{i % 5}"', "a")),
    ],
)
def test_infer_leaves_other_commas_alone(tmp_path, delimiter, cells):
    rows = [delimiter.join((str(i % 2), *cells(i))) for i in range(500)]
    (tmp_path / "log.csv").write_text(delimiter.join(("click", "one", "two")) + "\n" + "\n".join(rows) + "\n")
    found = infer((str(tmp_path / "log.csv"),))
    assert found.decimal == "." and next(s for s in found.sparse if s.name == "one").separator == ","


def test_a_decimal_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="decimal is ';'; write"):
        schema(decimal=";")
    of = Schema("log", Label("label"), sparse=(Sparse("c"),), split=Split("order"), decimal=",")
    with pytest.raises(ConfigError, match="has format jsonl; decimal is for texts in delimited files"):
        prepare_text(tmp_path, '{"label": 1, "c": "a"}\n', of, name="log.jsonl")
