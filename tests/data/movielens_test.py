"""Tests `dlrm_jax/data/formats/movielens.py`."""

import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats import movielens
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
        (i, title + " é", date, "", "", *(int(genre in genres) for genre in movielens._GENRES))
        for i, title, date, genres in ITEMS
    ]
    write("u.item", "|", items)
    return str(directory)


def test_both_layouts_give_the_same_data(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a, b = (
        movielens.read(write_atomic(tmp_path / "a"), "random"),
        movielens.read(write_grouplens(tmp_path / "b"), "random"),
    )
    assert a.fingerprint() == b.fingerprint()
    assert a.table_sizes == b.table_sizes


def test_values_are_as_documented(tmp_path):
    data = movielens.read(write_atomic(tmp_path), "time")
    split = data.splits["train"]
    i = int(np.flatnonzero(split.row_R == 0)[0])  # user 1, item 1, rating 1, time 880000000
    np.testing.assert_allclose(split.dense_RxN[i], [24 / 50, 15 / 20, 0, (880000000 // 3600 % 24) / 24], rtol=1e-6)
    assert split.label_R[i] == 0
    assert [feature.name for feature in data.features] == ["user", "item", "gender", "occupation", "zip", "genres"]
    assert data.table_sizes == {"user": 3, "item": 2, "gender": 2, "occupation": 2, "zip": 2, "genres": 3}
    np.testing.assert_array_equal(split.ids_RxK[i], [0, 0, 1, 1, 0, 0, 1])
    labels = {int(r): label for s in data.splits.values() for r, label in zip(s.row_R, s.label_R, strict=True)}
    assert [labels[row] for row in range(5)] == [0, 0, 0, 1, 1]
    dense = {int(r): d for s in data.splits.values() for r, d in zip(s.row_R, s.dense_RxN, strict=True)}
    assert dense[1][1] == 0  # no release date
    assert max(d[2] for d in dense.values()) == 1


def test_random_split_is_the_stated_permutation(tmp_path):
    data = movielens.read(write_atomic(tmp_path), "random")
    order = np.random.default_rng(0).permutation(20)
    np.testing.assert_array_equal(data.splits["train"].row_R, order[:16])
    np.testing.assert_array_equal(data.splits["val"].row_R, order[16:18])
    np.testing.assert_array_equal(data.splits["test"].row_R, order[18:])


def test_time_split_never_looks_ahead(tmp_path):
    data = movielens.read(write_atomic(tmp_path), "time")
    times = [np.array([RATINGS[r][3] for r in data.splits[name].row_R]) for name in ("train", "val", "test")]
    assert times[0].max() <= times[1].min() and times[1].max() <= times[2].min()


def test_reads_the_real_files():
    path = SHARED / "data" / "ml-100k"
    if not path.exists():
        pytest.skip("MovieLens 100k is not beside this checkout")
    data = movielens.read(str(path), "random")
    assert sum(len(split) for split in data.splits.values()) == 100_000
    assert (data.table_sizes["user"], data.table_sizes["item"]) == (943, 1682)
    positive = sum(split.label_R.sum() for split in data.splits.values())
    assert positive == 55_375


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="not a directory"):
        movielens.read(str(tmp_path / "nowhere"), "random")
    with pytest.raises(ConfigError, match=r"holds none of ml-100k\.inter"):
        movielens.read(str(tmp_path), "random")
    write_atomic(tmp_path)
    path = tmp_path / "ml-100k.inter"
    path.write_text(path.read_text().replace("1\t1\t1\t", "1\t9\t1\t", 1))
    with pytest.raises(ConfigError, match="rating 0 names item 9"):
        movielens.read(str(tmp_path), "random")
    path.write_text(path.read_text().replace("880000000", "yesterday", 1))
    with pytest.raises(ConfigError, match="line 2, column timestamp: 'yesterday'"):
        movielens.read(str(tmp_path), "random")
