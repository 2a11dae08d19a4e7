"""Tests `dlrm_jax/data/infer/infer.py`, `describe.py`, `schema_io.py` and `builder.py`."""

import dataclasses
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import yaml

from dlrm_jax.config import ConfigError
from dlrm_jax.data.infer.infer import infer
from dlrm_jax.data.prepare.builder import ClickLog
from dlrm_jax.data.prepare.describe import describe
from dlrm_jax.data.read.prepared import open_prepared, read_schema
from dlrm_jax.data.schema.presets import PRESETS
from dlrm_jax.data.schema.schema import Dense, Label, Sparse, Split
from dlrm_jax.data.schema.schema_io import dump_yaml, from_dict, load, to_dict
from tests.prepared_helpers import csv_rows, digest, prepare_text, schema

NUM_ROWS = 3000


def own_log() -> pa.Table:
    rng = np.random.default_rng(0)
    r = np.arange(NUM_ROWS)
    return pa.table(
        {
            "row_id": r,
            "click": rng.integers(0, 2, NUM_ROWS),
            "event_time": pa.array(1_700_000_000 + r * 60),
            "user_id": [f"u{i}" for i in rng.zipf(1.3, NUM_ROWS) % 500],
            "category": rng.integers(0, 12, NUM_ROWS),
            "title": [f"Long name, with comma {i}" for i in rng.zipf(1.5, NUM_ROWS) % 80],
            "tags": pa.array([[["a", "b"], ["c"], []][i % 3] for i in r]),
            "price": np.exp(rng.normal(2, 3, NUM_ROWS)),
            "age": pa.array(rng.normal(40, 10, NUM_ROWS), mask=rng.random(NUM_ROWS) < 0.1),
            "views": (rng.pareto(1, NUM_ROWS) * 50).astype(int),
            "comment": [f"text number {i} nobody repeats" for i in r],
            "constant": ["same"] * NUM_ROWS,
        }
    )


def test_columns_of_an_unknown_log(tmp_path):
    pq.write_table(own_log(), tmp_path / "log.parquet")
    found = infer((str(tmp_path / "log.parquet"),))
    assert found.label == Label("click") and found.timestamp == "event_time" and found.split == Split("time")
    assert {dense.name: dense.transform for dense in found.dense} == {
        "price": "log1p",
        "age": "standardise",
        "views": "log1p",
    }
    assert [sparse.name for sparse in found.sparse] == ["user_id", "category", "title", "tags"]
    assert next(sparse for sparse in found.sparse if sparse.name == "tags").hotness == 2
    reasons = " ".join(found.reasons)
    for words in ("click is the label by its name", "row_id: left out", "comment: left out", "constant: left out"):
        assert words in reasons


def test_two_logs_get_two_names(tmp_path):
    """And so two default working directories."""
    names = []
    for file in ("clicks.csv", "sales.csv"):
        (tmp_path / file).write_text("click,user\n" + "".join(f"{i % 2},u{i % 7}\n" for i in range(30)))
        names.append(infer((str(tmp_path / file),)).name)
    assert names == ["clicks", "sales"]


def test_the_written_schema_is_the_guessed_one(tmp_path):
    pq.write_table(own_log(), tmp_path / "log.parquet")
    found = infer((str(tmp_path / "log.parquet"),))
    (tmp_path / "schema.yaml").write_text(dump_yaml(found))
    assert load(tmp_path / "schema.yaml") == dataclasses.replace(found, reasons=())
    assert "# user_id: sparse" in (tmp_path / "schema.yaml").read_text()


def test_a_name_with_a_newline_stays_in_its_comment(tmp_path):
    rows = "".join(f"{i % 2},v{i % 3},w{i % 5}\n" for i in range(50))
    (tmp_path / "log.csv").write_text('click,"odd\nlabel: evil",b\n' + rows)
    found = infer((str(tmp_path / "log.csv"),))
    (tmp_path / "schema.yaml").write_text(dump_yaml(dataclasses.replace(found, reasons=("one\ncolour: two",))))
    assert load(tmp_path / "schema.yaml") == dataclasses.replace(found, reasons=())
    assert found.sparse[0].name == "odd\nlabel: evil" and not any("\n" in reason for reason in found.reasons)


def test_a_weight_may_be_anything(tmp_path):
    """Only a name that says whose weight it is makes a column weigh rows; any other stays a number, and is told."""
    for name, is_weight in (("weight", False), ("importance", False), ("sample_weight", True), ("exampleWeight", True)):
        rows = "".join(f"{i % 2},u{i % 7},{50 + i % 70}.5\n" for i in range(300))
        (tmp_path / "log.csv").write_text(f"click,user,{name}\n{rows}")
        found = infer((str(tmp_path / "log.csv"),))
        assert found.weight == (name if is_weight else "")
        assert [dense.name for dense in found.dense] == ([] if is_weight else [name])
        told = f"{name} is taken for a feature; if it is the weight of each row in the loss, say weight: {name}"
        assert any(reason.startswith(told) for reason in found.reasons) != is_weight


def test_a_file_without_header(tmp_path):
    rows = [f"{i % 2}\t{i * 7 % 11}\t{i % 5 * 1234567:08x}\t{i % 3 * 7654321:08x}" for i in range(500)]
    (tmp_path / "log.txt").write_text("\n".join(rows) + "\n")
    found = infer((str(tmp_path / "log.txt"),))
    assert not found.header and found.columns == ("column_1", "column_2", "column_3", "column_4")
    assert found.label == Label("column_1") and [s.name for s in found.sparse][-2:] == ["column_3", "column_4"]


@pytest.mark.parametrize(
    ("header", "row", "words"),
    [
        ("a,b", lambda i: f"{i % 2},{i % 2}", "2 columns hold 0 and 1"),
        ("a,b", lambda i: f"{i},x{i % 3}", "no column is called label"),
        ("y,b", lambda i: f"{i % 2},{i / 3}", "no categorical column among y, b"),
        ("y,y,b", lambda i: f"{i % 2},1,{i % 3}", "the header names 'y' twice"),
    ],
)
def test_what_cannot_be_guessed(tmp_path, header, row, words):
    if words.startswith("2 columns"):
        header, row = "q,a,b", lambda i: f"{i},{i % 2},{i % 2}"
    (tmp_path / "log.csv").write_text(header + "\n" + "\n".join(row(i) for i in range(2000)) + "\n")
    with pytest.raises(ConfigError) as error:
        infer((str(tmp_path / "log.csv"),))
    assert words in str(error.value)


def test_texts_that_mean_missing(tmp_path):
    rows = [
        f"{i % 2},{'NA' if i % 7 == 0 else i / 2},{'NULL' if i % 5 == 0 else 'c' + str(i % 4)}" for i in range(2000)
    ]
    (tmp_path / "log.csv").write_text("click,x,kind\n" + "\n".join(rows) + "\n")
    found = infer((str(tmp_path / "log.csv"),))
    assert found.null_values == ("", "NA", "NULL") and [dense.name for dense in found.dense] == ["x"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_file(tmp_path, name):
    preset = PRESETS[name][1]()
    (tmp_path / "s.yaml").write_text(dump_yaml(preset))
    (tmp_path / "s.json").write_text(json.dumps(to_dict(preset)))
    assert load(tmp_path / "s.yaml") == load(tmp_path / "s.json") == preset


def test_short_forms():
    values = yaml.safe_load("{name: x, label: y, dense: [a, {name: b, transform: log1p}], sparse: [c]}")
    found = from_dict(values)
    assert found.label == Label("y") and found.dense == (Dense("a"), Dense("b", transform="log1p"))
    assert found.sparse == (Sparse("c"),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", "expected names with values"),
        ("name: x\nlabel: y\nsparse: [c]\ncolour: red", "unknown colour; known are name, label"),
        ("name: x\nsparse: [c]", "label is missing"),
        (
            "name: x\nlabel: y\nsparse: [{name: c, hotness: many}]",
            "sparse[0]: hotness is 'many'; expected a whole number",
        ),
        ("name: x\nlabel: y\nsparse: [{name: c, oov: 1}]", "oov is 1; expected true or false"),
        ("name: x\nlabel: y\nsparse: c", "sparse is not a list"),
        ("name: x\nlabel: {column: y, positive: [yes]}\nsparse: [c]", "positive is True; expected text; in YAML yes"),
        ("name: x\nlabel: {column: y, positive: yes}\nsparse: [c]", "positive is True; expected text; in YAML yes"),
        ("name: x\nlabel: {column: y, positive: [1.0]}\nsparse: [c]", "positive is 1.0; expected text; in YAML yes"),
        ("name: x\nlabel: {column: y, threshold: high}\nsparse: [c]", "threshold is 'high'; expected a number"),
        ("name: [x\nlabel", "neither YAML nor JSON"),
        ("name: x\nlabel: y\nsparse: [{name: c, type: number}]", "type is 'number'; choose one of string, int, hex"),
    ],
)
def test_schema_files_that_are_wrong(tmp_path, text, words):
    (tmp_path / "schema.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "schema.yaml")
    assert (words in str(error.value) and "schema.yaml" in str(error.value)) or words.startswith("type is")


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in itertools.pairwise("abcdefghi")
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("aliases.yaml", BOMB, r"has an alias \(\*name\)"),
        ("deep.yaml", "name: " + "[" * 50_000, "nested deeper than 8 levels"),
        ("deeper.yaml", "".join(f"{' ' * i}- \n" for i in range(300)) + "x", "nested deeper than 8 levels"),
        ("deep.json", "[" * 500 + "]" * 500, "nested deeper than 8 levels"),
        ("deeper.json", "[" * 100_000, "nested too deeply"),
        ("large.yaml", "#" * (17 << 20), "more than 16,777,216 characters"),
        ("much.yaml", "#" * (2 << 20), "more than 1,048,576 characters; write it as JSON"),
        ("base60.yaml", f"name: {'1' + ':59' * 60_000}", "a value has more than 1000 characters"),
        ("base60.5.yaml", f"name: {'1' + ':59' * 300}.5", "a value is not of its type: OverflowError"),
        (
            "digits.yaml",
            f"name: x\nlabel: y\nsparse: [c]\ndense: [{{name: d, fill: {'9' * 400}}}]",
            "more than 64 bits",
        ),
        (
            "endless.json",
            '{"name": "x", "label": "y", "sparse": ["c"], "dense": [{"name": "d", "fill": 1e999}]}',
            "fill is inf",
        ),
        ("tag.yaml", "name: !!bool x", "a value is not of its type: KeyError"),
        (
            "many.json",
            json.dumps({"name": "x", "label": "y", "sparse": [f"c{i % 29_999}" for i in range(30_000)]}),
            "c0",
        ),
        ("long.yaml", f"name: x\nlabel: {{column: y, threshold: '{'x' * 10**5}'}}\nsparse: [c]", "expected a number"),
        ("names.yaml", f"name: x\nlabel: y\nsparse: [c]\n{'x' * 1000}: 1", "unknown x"),
    ],
)
def test_a_schema_that_would_fill_the_memory_or_the_stack_is_one_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_describe_shows_tables_and_draws(tmp_path):
    rows = [(i % 3 == 0, 1, f"v{i % 50}") for i in range(900)]
    output = prepare_text(tmp_path, csv_rows([(int(a), b, c) for a, b, c in rows]), schema(split=Split("order")))
    text = describe(output)
    for words in ("train", "720", "33.33%", "v0 (2.00%)", "statistics.png", "seen in train", "empty bags"):
        assert words in text
    assert (output / "statistics.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match="is not a prepared dataset"):
        describe(tmp_path)


class SmallLog(ClickLog):
    """A subclass, as a user writes it."""

    SCHEMA = schema(split=Split("order"))


def test_the_builder_is_a_tfds_builder(tmp_path, monkeypatch):
    (tmp_path / "log.csv").write_text(csv_rows([(i % 2, i, f"v{i % 9}") for i in range(100)]))
    monkeypatch.setattr(SmallLog, "INPUT", str(tmp_path / "*.csv"))
    builder = SmallLog(data_dir=tmp_path / "data")
    assert isinstance(builder, tfds.core.DatasetBuilder) and not builder.is_prepared()
    builder.download_and_prepare()
    assert builder.info.splits["train"].num_examples == 1 and builder.as_data_source("test")[0]["ids"].shape == (10, 1)
    again = SmallLog(data_dir=tmp_path / "data")
    assert again.is_prepared() and again.info.features["ids"].shape == (None, 1)
    assert tfds.builder_from_directory(builder.data_path).as_data_source("val")[0]["label"].shape == (10,)
    assert len(open_prepared(tmp_path / "data" / "small_log" / "1.0.0").splits["train"]) == 80
    assert read_schema(tmp_path / "data" / "small_log" / "1.0.0").name == "small_log"


def test_a_stopped_builder_goes_on(tmp_path, monkeypatch):
    (tmp_path / "log.csv").write_text(csv_rows([(i % 2, i, f"v{i % 9}") for i in range(100)]))
    monkeypatch.setattr(SmallLog, "INPUT", str(tmp_path / "*.csv"))
    with monkeypatch.context() as patch:
        patch.setattr(
            "dlrm_jax.data.prepare.preparation.SecondPass.run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())
        )
        with pytest.raises(KeyboardInterrupt):
            SmallLog(data_dir=tmp_path / "data").download_and_prepare()
    staged = tmp_path / "data" / "small_log" / "preparing-1.0.0" / "staging"
    assert "000000.rows" in digest(staged)
    SmallLog(data_dir=tmp_path / "data").download_and_prepare()
    assert not staged.exists()


def test_a_builder_without_input(tmp_path):
    with pytest.raises(ConfigError, match="SmallLog has no INPUT"):
        SmallLog(data_dir=tmp_path).download_and_prepare()
