"""Criteo's log as a run takes it, `--dataset=criteo_kaggle --data_dir=RAW`: the reference's preprocessing, by value."""

import dataclasses
import pathlib

import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.read import load
from dlrm_jax.data.read.dataset import Dataset, Split
from dlrm_jax.data.read.load import DataConfig, load_dataset
from dlrm_jax.data.read.prepared import PreparedSplit
from dlrm_jax.data.schema.presets import CRITEO_DENSE, CRITEO_SPARSE
from dlrm_jax.data.schema.schema import SPLITS
from tests.helpers import SHARED

CATEGORIES = ["68fd1e64", "80e26c9b", "", "fb936136"]


def row(label: str = "0", counts: list[str] | None = None, categories: list[str] | None = None) -> list[str]:
    return [label, *(counts or ["1"] * 13), *(categories or ["68fd1e64"] * 26)]


def write_txt(directory, rows: list[list[str]]):
    (directory / "train.txt").write_text("".join("\t".join(fields) + "\n" for fields in rows))
    return str(directory)


def write_csv(directory, rows: list[list[str]]):
    header = ["Id", "Label", *CRITEO_DENSE, *CRITEO_SPARSE]
    lines = [header, *([str(i), *fields] for i, fields in enumerate(rows))]
    (directory / "train.csv").write_text("".join(",".join(fields) + "\n" for fields in lines))
    return str(directory)


def read(directory, max_rows_per_table: int = 0) -> Dataset:
    """The data of a run on that directory, its rows in memory."""
    data = DataConfig("criteo_kaggle", str(directory), max_rows_per_table=max_rows_per_table)
    return load_dataset(data, workdir=pathlib.Path(directory) / "run")


def plain(path: pathlib.Path) -> tuple[dict[str, Split], list[int]]:
    """(splits, rows of each table) of a log without header, value by value: what preparation is held against."""
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    ids: list[dict[int, int]] = [{} for _ in CRITEO_SPARSE]
    label_R = np.array([int(line[0]) for line in lines], np.float32)
    counts_RxN = np.array([[max(int(text or "0"), 0) for text in line[1:14]] for line in lines])
    texts = [zip(ids, line[14:], strict=True) for line in lines]
    ids_RxK = np.array([[of.setdefault(int(text or "0", 16), len(of)) for of, text in line] for line in texts])
    days = np.array_split(np.arange(len(lines)), 7)
    test, val = np.array_split(days[-1], 2)
    rows_of = {"train": np.concatenate(days[:-1]), "val": val, "test": test}
    dense_RxN = np.log(counts_RxN.astype(np.float32) + 1)
    columns = (dense_RxN, ids_RxK.astype(np.int32), label_R)
    splits = {name: Split(*(column[rows] for column in columns), rows) for name, rows in rows_of.items()}
    return splits, [len(of) for of in ids]


ROWS = [row(str(i % 2), ["", "-3", *(str(i + j) for j in range(11))], [CATEGORIES[i % 4]] * 26) for i in range(21)]


@pytest.mark.parametrize("write", [write_txt, write_csv])
def test_missing_is_zero_negative_is_zero_and_counts_enter_as_log(tmp_path, write):
    data = read(write(tmp_path, ROWS))
    dense = data.splits["train"].dense_RxN
    assert (dense[:, :2] == 0).all()
    np.testing.assert_allclose(dense[5, 2:], np.log1p(5 + np.arange(11)), rtol=1e-6)


@pytest.mark.parametrize("write", [write_txt, write_csv])
def test_ids_count_from_zero_in_order_of_first_appearance(tmp_path, write):
    data = read(write(tmp_path, ROWS))
    np.testing.assert_array_equal(data.splits["train"].ids_RxK[:6, 7], [0, 1, 2, 3, 0, 1])
    assert set(data.table_sizes.values()) == {4}


def test_modulo_is_taken_before_ids_are_given(tmp_path):
    rows = [row(categories=[f"{value:x}"] * 26) for value in (5, 15, 7, 25, 7, 8, 9)]
    data = read(write_txt(tmp_path, rows), max_rows_per_table=10)
    np.testing.assert_array_equal(data.splits["train"].ids_RxK[:, 0], [0, 0, 1, 0, 1, 2])


def test_seven_days_then_halves(tmp_path):
    data = read(write_txt(tmp_path, [row() for _ in range(7 * 4 + 3)]))
    rows = {name: data.splits[name].row_R.tolist() for name in ("train", "test", "val")}
    assert rows == {"train": list(range(27)), "test": [27, 28], "val": [29, 30]}


@pytest.mark.golden
def test_equals_the_reference_on_its_fake_log(tmp_path):
    folder = SHARED / "goldens" / "fake_kaggle"
    if not folder.exists():
        pytest.skip("the reference's fake log is not beside this checkout")
    (tmp_path / "train.txt").symlink_to(folder / "train.txt")
    data = read(tmp_path, 1000)
    rows = [data.splits[name] for name in SPLITS]
    order = np.argsort(np.concatenate([part.row_R for part in rows]))
    with np.load(folder / "kaggleAdDisplayChallenge_processed.npz") as golden:
        dense_RxN = np.log(golden["X_int"].astype(np.float32) + 1)
        wanted = {"label_R": golden["y"], "dense_RxN": dense_RxN, "ids_RxK": golden["X_cat"]}
        for name, want in wanted.items():
            np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in rows])[order], want)
        np.testing.assert_array_equal(list(data.table_sizes.values()), golden["counts"])


def test_a_log_of_more_than_a_window_is_streamed(tmp_path, monkeypatch):
    held = read(write_txt(tmp_path, ROWS))
    monkeypatch.setattr(load, "WINDOW_ROWS", 17)
    streamed = read(tmp_path)
    for name, split in streamed.splits.items():
        assert isinstance(split, PreparedSplit)
        for field in dataclasses.fields(Split)[:4]:
            got = getattr(split.read(np.arange(1)), field.name)
            np.testing.assert_array_equal(got, getattr(held.splits[name], field.name))


def test_reads_the_real_sample(tmp_path):
    path = SHARED / "data" / "criteo_sample" / "train.csv"
    if not path.exists():
        pytest.skip("the Criteo sample is not beside this checkout")
    (tmp_path / "train.csv").symlink_to(path)
    data = read(tmp_path)
    assert [len(data.splits[name]) for name in ("train", "test", "val")] == [1714, 143, 142]
    assert data.fingerprint() == "96567c12"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (row(label="2"), "line 3, column Label: '2' is neither 0 nor 1"),
        (row(label="x"), "line 3, column Label: 'x' is not a number"),
        (row(categories=["zz"] * 26), "line 3, column C1: 'zz' is not a hexadecimal number"),
        (row(counts=["1_0"] * 13), "line 3, column I1: '1_0' is not a finite number"),
        (row()[:-1], "line 3: 39 columns; expected 40"),
    ],
)
def test_bad_row_names_file_line_column_and_value(tmp_path, bad, words):
    with pytest.raises(ConfigError) as error:
        read(write_txt(tmp_path, [row(), row(), bad, row()]))
    assert words in str(error.value) and "train.txt" in str(error.value)


def test_bad_line_of_a_csv_counts_the_header(tmp_path):
    with pytest.raises(ConfigError, match="line 3, column Label: 'x'"):
        read(write_csv(tmp_path, [row(), row(label="x")]))


def test_empty_missing_and_headless_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds none of train\.txt, train\.csv"):
        read(str(tmp_path))
    (tmp_path / "train.txt").touch()
    with pytest.raises(ConfigError, match="no rows in"):
        read(str(tmp_path))
    (tmp_path / "train.txt").unlink()
    (tmp_path / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="line 1: 2 columns; expected 40"):
        read(str(tmp_path))
    write_csv(tmp_path, [])
    with pytest.raises(ConfigError, match="no rows"):
        read(str(tmp_path))
