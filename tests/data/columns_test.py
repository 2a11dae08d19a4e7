"""Distinct values of a column against a dict, also where texts of one width take the short way."""

import pyarrow as pa
import pytest

from dlrm_jax.data.values.columns import Distinct

TEXTS = {
    "eight bytes": ["68fd1e64", "05db9164", "68fd1e64", "68FD1E64", "05db9164"],
    "eight bytes or none": ["", "68fd1e64", "", "05db9164", "68fd1e64"],
    "none": ["", "", ""],
    "eight zero bytes": ["\0" * 8, "abcdefgh", "\0" * 8],
    "eight zero bytes or none": ["\0" * 8, "", "abcdefgh", "", "\0" * 8],
    "sixteen bytes as two of eight": ["a" * 16, "bbbbbbbb", "", "a" * 16],
    "eight bytes of other letters": ["äöüé", "éüöä", "äöüé"],
    "other widths": ["1", "22", "", "1"],
    "no rows": [],
}


@pytest.mark.parametrize("null_values", [("",), ("NULL",), ("05db9164", "")], ids=repr)
@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
def test_distinct_values_stand_in_order_of_first_appearance(texts, null_values):
    missing = [text in null_values for text in texts]

    distinct = Distinct.of(pa.array(texts, pa.string()), null_values)

    values = distinct.values.to_pylist()
    found = [None if i < 0 else values[i] for i in distinct.index_R.tolist()]
    assert found == [None if gone else text for text, gone in zip(texts, missing, strict=True)]
    used = [value for value in values if value is not None]
    assert used == list(dict.fromkeys(text for text, gone in zip(texts, missing, strict=True) if not gone))


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("text", ["cccccccc", None])
def test_nulls_and_parts_of_an_array_are_read_as_they_are(start, text):
    texts = ["aaaaaaaa", "bbbbbbbb", text, "bbbbbbbb"]

    distinct = Distinct.of(pa.array(texts)[start:], ())

    values = distinct.values.to_pylist()
    assert [None if i < 0 else values[i] for i in distinct.index_R.tolist()] == texts[start:]
    assert values == [value for value in dict.fromkeys(texts[start:]) if value]
