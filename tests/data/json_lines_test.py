"""JSON lines with odd values: a line that says what is wrong, and nothing of it in the rows."""

import json

import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats.text_source import TextSource
from dlrm_jax.data.infer.infer import infer
from dlrm_jax.data.prepare.preparation import prepare
from dlrm_jax.data.schema.schema import Dense, Label, Sparse
from tests.data.restart_test import Killed, dies_at
from tests.prepared_helpers import digest, prepare_text, rows_of, schema

GOOD = {"label": 1, "x": 2.5, "c": "a"}
LOG = schema()


def lines(*objects) -> str:
    return "".join(json.dumps(value) + "\n" for value in objects)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"x": [1.5, 2]}, "column x: '[1.5, 2]' is a list where one value belongs"),
        ({"x": {"a": 1}}, "column x: '{\"a\": 1}' is an object, not a value"),
        ({"label": [1]}, "column label: '[1]' is a list where one value belongs"),
        ({"c": {"id": 3}}, "column c: '{\"id\": 3}' is an object, not a value; name its parts"),
        ({"c": [["a"]]}, "column c: '[[\"a\"]]' is a list of lists or objects, not of values"),
        ({"c": [{"a": 1}]}, "is a list of lists or objects, not of values"),
    ],
)
def test_values_that_are_none_name_their_line_and_column(tmp_path, bad, words):
    text = lines(GOOD, GOOD | bad, GOOD)
    with pytest.raises(ConfigError) as error:
        prepare_text(tmp_path, text, LOG, name="log.jsonl")
    assert "log.jsonl, line 2, column" in str(error.value) and words in str(error.value)
    (tmp_path / "skipping").mkdir()
    output = prepare_text(tmp_path / "skipping", text, LOG, name="log.jsonl", on_bad_row="skip_and_count")
    assert rows_of(output).row_R.tolist() == [0, 2] and rows_of(output).ids_RxK.tolist() == [[0], [0]]


@pytest.mark.parametrize("chunk_bytes", [60, 1 << 20])
def test_a_column_that_no_line_has_is_refused(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(TextSource.__init__, "__defaults__", (False, chunk_bytes))
    text = lines(*[{"label": i % 2, "c": "a"} for i in range(50)])
    with pytest.raises(ConfigError, match=r"no line of .*log\.jsonl has 'x'; the lines have c, label"):
        prepare_text(tmp_path, text, LOG, name="log.jsonl")
    mended = schema(dense=())  # The same output with a mended schema: nothing of the refused run is in the way.
    assert prepare((str(tmp_path / "log.jsonl"),), tmp_path / "out", mended)["splits"]["train"]["rows"] == 50


@pytest.mark.parametrize("chunk_bytes", [60, 1 << 20])
def test_a_column_that_one_line_has_is_missing_in_the_others(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(TextSource.__init__, "__defaults__", (False, chunk_bytes))
    text = lines(*[{"label": i % 2, "c": "a"} | ({"x": 7} if i == 177 else {}) for i in range(200)])
    output = prepare_text(tmp_path, text, schema(dense=(Dense("x", fill=-1),)), name="log.jsonl")
    assert rows_of(output).dense_RxN[:, 0].tolist() == [7 if i == 177 else -1 for i in range(200)]


def test_a_restart_knows_the_columns_that_were_there(tmp_path, monkeypatch):
    """The only line with x lies before the place where the first attempt died."""
    monkeypatch.setattr(TextSource.__init__, "__defaults__", (False, 200))
    monkeypatch.setattr("dlrm_jax.data.prepare.first_pass.CHUNKS_PER_FILE", 2)
    text = lines({"label": 1, "c": "a", "x": 1}, *[{"label": i % 2, "c": f"v{i % 9}"} for i in range(200)])
    whole = prepare_text(tmp_path, text, LOG, name="log.jsonl")
    with monkeypatch.context() as patch:
        dies_at(patch, 7)
        with pytest.raises(Killed):
            prepare((str(tmp_path / "log.jsonl"),), tmp_path / "stopped", LOG)
    prepare((str(tmp_path / "log.jsonl"),), tmp_path / "stopped", LOG)
    assert digest(tmp_path / "stopped") == digest(whole)


@pytest.mark.parametrize("label", [Label("click"), Label("click", positive=("true",)), None])
def test_a_boolean_label(tmp_path, label):
    text = lines(*[{"click": i % 3 == 0, "c": f"v{i % 5}"} for i in range(30)])
    (tmp_path / "log.jsonl").write_text(text)
    of = infer((str(tmp_path / "log.jsonl"),)) if label is None else schema(label=label, dense=())
    statistics = prepare((str(tmp_path / "log.jsonl"),), tmp_path / "out", of)
    assert sum(split["positives"] for split in statistics["splits"].values()) == 10


def test_infer_leaves_out_what_it_cannot_read(tmp_path):
    values = [
        {"click": i % 2, "user": {"id": i}, "c": f"v{i % 5}", "paths": [[1]], "emb": [i / 7, 0.5], "tags": ["a", "b"]}
        for i in range(50)
    ]
    (tmp_path / "log.jsonl").write_text(lines(*values))
    found = infer((str(tmp_path / "log.jsonl"),))
    assert [sparse.name for sparse in found.sparse] == ["c"] and not found.dense
    reasons = " ".join(found.reasons)
    for words in (
        "user: left out, is an object",
        "paths: left out, is a list of lists",
        "emb: left out, lists of numbers with a fraction",
        "tags: left out, has no value or only one",
    ):
        assert words in reasons


def test_numbers_in_lists_are_texts(tmp_path):
    text = lines(*[{"label": 1, "c": [1, 2.0, "x", None, True]}, {"label": 0, "c": "1"}] * 2)
    output = prepare_text(tmp_path, text, schema(dense=(), sparse=(Sparse("c", hotness=9),)), name="log.jsonl")
    assert rows_of(output).ids_RxK[:2].tolist() == [[0, 1, 2, 3, *[-1] * 5], [0, *[-1] * 8]]


def test_one_odd_line_does_not_cost_its_column(tmp_path):
    values = [{"click": i % 2, "c": {"a": 1} if i == 177 else f"v{i % 5}"} for i in range(300)]
    (tmp_path / "log.jsonl").write_text(lines(*values))
    found = infer((str(tmp_path / "log.jsonl"),))
    assert [sparse.name for sparse in found.sparse] == ["c"]
    with pytest.raises(ConfigError, match=r"log\.jsonl, line 178, column c: .* is an object"):
        prepare((str(tmp_path / "log.jsonl"),), tmp_path / "out", found)


@pytest.mark.parametrize("text", ['[{"click": 1}]', '{\n "click": 1\n}'])
def test_other_json_is_told(tmp_path, text):
    (tmp_path / "log.json").write_text(text)
    with pytest.raises(ConfigError, match="no JSON object among its first lines; JSON lines have one in each line"):
        infer((str(tmp_path / "log.json"),))
