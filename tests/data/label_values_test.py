"""A label whose positive texts are not there is refused with the texts that are; a split of one class is told."""

import dataclasses

import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats.text_source import TextSource
from dlrm_jax.data.prepare.preparation import prepare
from dlrm_jax.data.read.dataset import Split as Rows
from dlrm_jax.data.read.prepared import open_prepared, read_json
from dlrm_jax.data.schema.schema import Label, Split
from dlrm_jax.data.values.label_values import describe_one_class, one_class_warnings, only_label, shown_texts
from tests.data.restart_test import Killed, dies_at
from tests.prepared_helpers import digest, prepare_text, rows_of, schema

RICH = schema(label=Label("income", positive=(">50K",)), dense=())


def adult(dot: str = "", num_rows: int = 40) -> str:
    rows = (f"{'<=50K' if i % 4 else '>50K'}{dot}, {'abc'[i % 3]}" for i in range(num_rows))
    return "income,c\n" + "".join(f" {row}\n" for row in rows)


def write(tmp_path, **texts: str) -> tuple[str, ...]:
    for name, text in texts.items():
        (tmp_path / f"{name}.csv").write_text(text)
    return tuple(str(tmp_path / f"{name}.csv") for name in texts)


@pytest.mark.parametrize("positive", [">50K", " >50K", ">50K  "])
def test_spaces_around_a_labels_text_do_not_count(tmp_path, positive):
    output = prepare_text(tmp_path, adult(), schema(label=Label("income", positive=(positive,)), dense=()))
    assert rows_of(output).label_R.tolist() == [float(i % 4 == 0) for i in range(40)]


def test_a_text_of_spaces_is_a_missing_label(tmp_path):
    with pytest.raises(ConfigError, match=r"log\.csv, line 2, column income: is missing"):
        prepare_text(tmp_path, "income,c\n  ,a\n>50K,b\n", RICH)


@pytest.mark.parametrize("positive", [("50K",), (">50k",), (">50K", "rich")])
def test_a_positive_text_that_no_row_has_is_refused(tmp_path, positive):
    with pytest.raises(ConfigError) as error:
        prepare_text(tmp_path, adult(), schema(label=Label("income", positive=positive), dense=()))
    assert f"label income: no row has the positive text {positive[-1]!r}" in str(error.value)
    assert "its texts are '<=50K' (30), '>50K' (10); name the positive ones" in str(error.value)
    prepare((str(tmp_path / "log.csv"),), tmp_path / "out", RICH)  # Into the same output, once the schema is mended.


def test_a_file_that_writes_the_label_in_another_way_is_refused(tmp_path):
    paths = write(tmp_path, train=adult(), test=adult("."))
    with pytest.raises(ConfigError) as error:
        prepare(paths, tmp_path / "out", RICH)
    assert "test.csv: no row of this file has a positive text of label income ('>50K')" in str(error.value)
    assert "but it has '<=50K.' (30), '>50K.' (10); name all positive ones" in str(error.value)
    both = dataclasses.replace(RICH, label=Label("income", positive=(">50K", ">50K.")))
    assert prepare(paths, tmp_path / "out", both)["negative_texts"] == {"<=50K": 30, "<=50K.": 30}


def test_a_file_without_a_positive_row_is_a_file(tmp_path):
    paths = write(tmp_path, one=adult(), two="income,c\n<=50K,a\n", three="income,c\n")
    assert prepare(paths, tmp_path / "out", RICH)["negative_texts"] == {"<=50K": 31}


def test_what_counted_as_negative_is_kept(tmp_path):
    text = adult() + ">50K.,a\n" * 3 + ",b\n"
    output = prepare_text(tmp_path, text, RICH, on_bad_row="skip_and_count")
    statistics = read_json(output / "statistics.json")
    assert statistics["negative_texts"] == {"<=50K": 30, ">50K.": 3}


def test_a_restart_knows_the_texts_that_were_there(tmp_path, monkeypatch):
    """The only positive row lies before the place where the first attempt died."""
    monkeypatch.setattr(TextSource.__init__, "__defaults__", (False, 100))
    monkeypatch.setattr("dlrm_jax.data.prepare.first_pass.CHUNKS_PER_FILE", 2)
    text = "income,c\n>50K,a\n" + "<=50K,b\n" * 300
    whole = prepare_text(tmp_path, text, RICH)
    with monkeypatch.context() as patch:
        dies_at(patch, 7)
        with pytest.raises(Killed):
            prepare((str(tmp_path / "log.csv"),), tmp_path / "stopped", RICH)
    prepare((str(tmp_path / "log.csv"),), tmp_path / "stopped", RICH)
    assert digest(tmp_path / "stopped") == digest(whole)


@pytest.mark.parametrize("texts", ["true,TRUE, True,false,False,FALSE", "1,1.0, 1,0,0.0, 0"])
def test_true_and_false_are_one_and_zero(tmp_path, texts):
    text = "label,c\n" + "".join(f"{cell},a\n" for cell in texts.split(","))
    assert rows_of(prepare_text(tmp_path, text, schema(dense=()))).label_R.tolist() == [1, 1, 1, 0, 0, 0]


def test_many_texts_are_shown_shortly():
    text = shown_texts({f"value {i}": i for i in range(100)})
    assert text.startswith("'value 99' (99), 'value 98' (98)") and text.endswith("and 88 more")
    assert shown_texts({" a": 1}) == "' a' (1)"


@pytest.mark.parametrize(
    ("counts", "only"),
    [
        ((0, 0, None), None),
        ((10, 0, 0.0), 0),
        ((10, 10, 1.0), 1),
        ((10, 3, 0.3), None),
        ((10_000_000, 1, 0.0), None),
        ((10_000_000, None, 0.0), None),  # Of a dataset without counts: the rate is rounded.
        ((1000, None, 0.0), 0),
    ],
)
def test_a_split_of_one_class(counts, only):
    assert only_label(*counts) == only


def test_a_prepared_split_of_one_class_is_told(tmp_path):
    text = "label,x,c\n" + "".join(f"{int(i < 80)},{i},a\n" for i in range(100))
    output = prepare_text(tmp_path, text, schema(split=Split("order")))
    statistics = prepare((str(tmp_path / "log.csv"),), output, schema(split=Split("order")))
    warnings = one_class_warnings(statistics["splits"])
    assert [warning[:40] for warning in warnings] == [
        "split train: all 80 rows have label 1, s",
        "split val: all 10 rows have label 0, so ",
        "split test: all 10 rows have label 0, so",
    ]
    assert {name: rows.only_label for name, rows in open_prepared(output).splits.items()} == {
        "train": 1,
        "val": 0,
        "test": 0,
    }


def test_rows_in_memory_know_their_only_label():
    def rows(labels: list[float]) -> Rows:
        count = len(labels)
        zeros = np.zeros((count, 1), np.int32)
        return Rows(zeros.astype(np.float32), zeros, np.asarray(labels, np.float32), np.arange(count))

    assert [rows(labels).only_label for labels in ([], [0, 0], [1], [0, 1])] == [None, 0, 1, None]
    assert "it has no AUC" in describe_one_class("val", 3, 0) and "nothing to learn" in describe_one_class(
        "train", 3, 1
    )
