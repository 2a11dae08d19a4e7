"""Tests `dlrm_jax/data/formats/criteo.py`: the reference's preprocessing, value by value."""

import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats import criteo
from tests.helpers import SHARED

CATEGORIES = ["68fd1e64", "80e26c9b", "", "fb936136"]


def row(label: str = "0", counts: list[str] | None = None, categories: list[str] | None = None) -> list[str]:
    return [label, *(counts or ["1"] * 13), *(categories or ["68fd1e64"] * 26)]


def write_txt(directory, rows: list[list[str]]):
    (directory / "train.txt").write_text("".join("\t".join(fields) + "\n" for fields in rows))
    return str(directory)


def write_csv(directory, rows: list[list[str]]):
    header = ["Id", "Label", *criteo.DENSE_NAMES, *criteo.SPARSE_NAMES]
    lines = [header, *([str(i), *fields] for i, fields in enumerate(rows))]
    (directory / "train.csv").write_text("".join(",".join(fields) + "\n" for fields in lines))
    return str(directory)


ROWS = [row(str(i % 2), ["", "-3", *(str(i + j) for j in range(11))], [CATEGORIES[i % 4]] * 26) for i in range(21)]


@pytest.mark.parametrize("write", [write_txt, write_csv])
def test_missing_is_zero_negative_is_zero_and_counts_enter_as_log(tmp_path, write):
    data = criteo.read(write(tmp_path, ROWS))
    dense = data.splits["train"].dense_RxN
    assert (dense[:, :2] == 0).all()
    np.testing.assert_allclose(dense[5, 2:], np.log1p(5 + np.arange(11)), rtol=1e-6)


@pytest.mark.parametrize("write", [write_txt, write_csv])
def test_ids_count_from_zero_in_order_of_first_appearance(tmp_path, write):
    data = criteo.read(write(tmp_path, ROWS))
    np.testing.assert_array_equal(data.splits["train"].ids_RxK[:6, 7], [0, 1, 2, 3, 0, 1])
    assert set(data.table_sizes.values()) == {4}


def test_modulo_is_taken_before_ids_are_given(tmp_path):
    rows = [row(categories=[f"{value:x}"] * 26) for value in (5, 15, 7, 25, 7, 8, 9)]
    data = criteo.read(write_txt(tmp_path, rows), max_rows_per_table=10)
    np.testing.assert_array_equal(data.splits["train"].ids_RxK[:, 0], [0, 0, 1, 0, 1, 2])


def test_seven_days_then_halves(tmp_path):
    data = criteo.read(write_txt(tmp_path, [row() for _ in range(7 * 4 + 3)]))
    rows = {name: data.splits[name].row_R.tolist() for name in ("train", "test", "val")}
    assert rows == {"train": list(range(27)), "test": [27, 28], "val": [29, 30]}


@pytest.mark.golden
def test_equals_the_reference_on_its_fake_log():
    folder = SHARED / "goldens" / "fake_kaggle"
    if not folder.exists():
        pytest.skip("the reference's fake log is not beside this checkout")
    labels, counts, ids, sizes = criteo.read_columns(folder / "train.txt", 1000)
    with np.load(folder / "kaggleAdDisplayChallenge_processed.npz") as golden:
        np.testing.assert_array_equal(labels, golden["y"])
        np.testing.assert_array_equal(counts, golden["X_int"])
        np.testing.assert_array_equal(ids, golden["X_cat"])
        np.testing.assert_array_equal(sizes, golden["counts"])


def test_reads_the_real_sample():
    path = SHARED / "data" / "criteo_sample"
    if not path.exists():
        pytest.skip("the Criteo sample is not beside this checkout")
    data = criteo.read(str(path))
    assert [len(data.splits[name]) for name in ("train", "test", "val")] == [1714, 143, 142]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (row(label="2"), "line 3, column Label: 2 is neither 0 nor 1"),
        (row(label="x"), "line 3, column Label: 'x' is not a number"),
        (row(counts=["1"] * 12 + ["1.5"]), "line 3, column I13: '1.5' is not a number"),
        (row(categories=["zz"] * 26), "line 3, column C1: 'zz' is not a hexadecimal number"),
        (row(counts=["9" * 20] * 13), f"line 3, column I1: '{'9' * 20}' is not a number of 64 bits"),
        (row(counts=["1_0"] * 13), "line 3, column I1: '1_0' is not a number"),
        (row()[:-1], "line 3 has 39 columns; expected 40"),
    ],
)
def test_bad_row_names_file_line_column_and_value(tmp_path, bad, words):
    with pytest.raises(ConfigError) as error:
        criteo.read(write_txt(tmp_path, [row(), row(), bad, row()]))
    assert words in str(error.value) and "train.txt" in str(error.value)


def test_bad_line_of_a_csv_counts_the_header(tmp_path):
    with pytest.raises(ConfigError, match="line 3, column Label: 'x'"):
        criteo.read(write_csv(tmp_path, [row(), row(label="x")]))


def test_empty_missing_and_headless_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds none of train\.txt, train\.csv"):
        criteo.read(str(tmp_path))
    (tmp_path / "train.txt").touch()
    with pytest.raises(ConfigError, match="is empty"):
        criteo.read(str(tmp_path))
    (tmp_path / "train.txt").unlink()
    (tmp_path / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="no column Label in the header"):
        criteo.read(str(tmp_path))
    write_csv(tmp_path, [])
    with pytest.raises(ConfigError, match="no rows"):
        criteo.read(str(tmp_path))
