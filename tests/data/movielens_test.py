"""Tests `dlrm_jax/data/formats/movielens.py` as a run takes it: `--dataset=movielens_100k --data_dir=DIRECTORY`."""

import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats.movielens import GENRES
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.data.read.load import DataConfig, load_dataset
from dlrm_jax.data.schema.schema import SPLITS
from tests.helpers import SHARED

RATINGS = [(i % 3 + 1, i % 2 + 1, i % 5 + 1, 880000000 + 3601 * (i * 7 % 20)) for i in range(20)]
USERS = [(1, 24, "M", "technician", "85711"), (2, 53, "F", "other", "94043"), (3, 50, "M", "technician", "85799")]
ITEMS = [(1, "Toy Story", "01-Jan-1995", ["Animation", "Comedy"]), (2, "Unknown", "", ["Drama"])]


def write_atomic(directory) -> str:
    def write(kind, header, rows):
        lines = [header, *("\t".join(map(str, fields)) for fields in rows)]
        (directory / f"ml-100k.{kind}").write_text("\n".join(lines) + "\n")

    write("inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float", RATINGS)
    write("user", "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token", USERS)
    items = [(i, title, date[-4:], " ".join(genres)) for i, title, date, genres in ITEMS]
    write("item", "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq", items)
    return str(directory)


def write_grouplens(directory) -> str:
    def write(name, delimiter, rows):
        text = "".join(delimiter.join(map(str, fields)) + "\n" for fields in rows)
        (directory / name).write_text(text, encoding="latin-1")

    write("u.data", "\t", RATINGS)
    write("u.user", "|", USERS)
    items = [
        (i, title + " é", date, "", "", *(int(genre in genres) for genre in GENRES)) for i, title, date, genres in ITEMS
    ]
    write("u.item", "|", items)
    return str(directory)


def read(tmp_path, directory, split: str = "random") -> Dataset:
    """The data of a run on that directory, its rows in memory."""
    return load_dataset(DataConfig("movielens_100k", str(directory), split=split), workdir=tmp_path / f"run_{split}")


def test_both_layouts_give_the_same_data(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    a = read(tmp_path / "a", write_atomic(tmp_path / "a"))
    b = read(tmp_path / "b", write_grouplens(tmp_path / "b"))
    assert a.fingerprint() == b.fingerprint()
    assert a.table_sizes == b.table_sizes


def test_values_are_as_documented(tmp_path):
    data = read(tmp_path, write_atomic(tmp_path), "time")
    split = data.splits["train"]
    i = int(np.flatnonzero(split.row_R == 0)[0])  # user 1, item 1, rating 1, time 880000000
    np.testing.assert_allclose(split.dense_RxN[i], [24 / 50, 15 / 20, 0, (880000000 // 3600 % 24) / 24], rtol=1e-6)
    assert split.label_R[i] == 0
    assert [feature.name for feature in data.features] == ["user", "item", "gender", "occupation", "zip", "genres"]
    assert data.table_sizes == {"user": 3, "item": 2, "gender": 2, "occupation": 2, "zip": 2, "genres": 3}
    np.testing.assert_array_equal(split.ids_RxK[i], [0, 0, 1, 1, 0, 0, 1, -1, -1, -1, -1])
    labels = {int(r): label for s in data.splits.values() for r, label in zip(s.row_R, s.label_R, strict=True)}
    assert [labels[row] for row in range(5)] == [0, 0, 0, 1, 1]
    dense = {int(r): d for s in data.splits.values() for r, d in zip(s.row_R, s.dense_RxN, strict=True)}
    assert dense[1][1] == 0  # no release date
    assert max(d[2] for d in dense.values()) == 1


def test_random_split_is_the_stated_permutation(tmp_path):
    data = read(tmp_path, write_atomic(tmp_path))
    order = np.random.default_rng(0).permutation(20)
    np.testing.assert_array_equal(data.splits["train"].row_R, order[:16])
    np.testing.assert_array_equal(data.splits["val"].row_R, order[16:18])
    np.testing.assert_array_equal(data.splits["test"].row_R, order[18:])


def test_time_split_never_looks_ahead(tmp_path):
    data = read(tmp_path, write_atomic(tmp_path), "time")
    times = [np.array([RATINGS[r][3] for r in data.splits[name].row_R]) for name in SPLITS]
    assert times[0].max() <= times[1].min() and times[1].max() <= times[2].min()


@pytest.mark.parametrize(("split", "fingerprint"), [("random", "7bf9083b"), ("time", "ae7ca3d6")])
def test_reads_the_real_files(tmp_path, split, fingerprint):
    """Numbers, ids and the order of rows are those with which the results in experiments/README.md were made."""
    path = SHARED / "data" / "ml-100k"
    if not path.exists():
        pytest.skip("MovieLens 100k is not beside this checkout")
    data = read(tmp_path, path, split)
    assert [len(data.splits[name]) for name in SPLITS] == [80_000, 10_000, 10_000]
    assert list(data.table_sizes.values()) == [943, 1682, 2, 21, 382, 19]
    assert sum(rows.label_R.sum() for rows in data.splits.values()) == 55_375
    assert data.fingerprint() == fingerprint


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="not a directory"):
        read(tmp_path, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds none of ml-100k\.inter"):
        read(tmp_path, tmp_path)
    write_atomic(tmp_path)
    path = tmp_path / "ml-100k.inter"
    path.write_text(path.read_text().replace("1\t1\t1\t", "1\t9\t1\t", 1))
    with pytest.raises(ConfigError, match="rating 0 names item 9"):
        read(tmp_path, tmp_path)
    path.write_text(path.read_text().replace("1\t9\t1\t880000000", "1\t1\t1\tyesterday", 1))
    with pytest.raises(ConfigError, match="line 2, column timestamp: 'yesterday'"):
        read(tmp_path, tmp_path)
