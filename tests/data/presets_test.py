"""Tests the schemas of BARS' data sets in `presets.py`: files with the published headers, prepared and read back."""

import pyarrow.parquet as pq
import pytest

from dlrm_jax.data.infer.choose import choose_schema
from dlrm_jax.data.prepare.preparation import prepare
from dlrm_jax.data.read.prepared import open_prepared
from tests.prepared_helpers import rows_of

NUMBERS, CATEGORIES = [f"I{i}" for i in range(1, 14)], [f"C{i}" for i in range(1, 27)]
AVAZU = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip,"
    "device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
)
# preset -> (the header, a row's cells by its number, numbers, sparse columns)
FILES = {
    "frappe_x1": (
        "label,user,item,daytime,weekday,isweekend,homework,cost,weather,country,city",
        lambda i: [i % 3, "evening", "sunday", "weekend", "unknown", "free", "sunny", "Spain", 369, i],
        (0, 10),
    ),
    "criteo_x1": (
        ",".join(["label", *NUMBERS, *CATEGORIES]),
        lambda i: [*(i / 8 for _ in NUMBERS), *(7 * i + k for k in range(26))],
        (13, 26),
    ),
    "criteo_x4": (
        ",".join(["Label", *NUMBERS, *CATEGORIES]),
        lambda i: [
            "" if i % 2 else -1,
            3 * i,
            *(1 + i // 12 for _ in NUMBERS[2:]),
            *("" if i % 12 else "05db9164" for _ in CATEGORIES),
        ],
        (0, 39),
    ),
    "avazu_x1": (
        ",".join(["label", *(f"feat_{i}" for i in range(1, 23))]),
        lambda i: [k + i for k in range(22)],
        (0, 22),
    ),
    "avazu_x4": (
        AVAZU,
        lambda i: [f"1410{21 + i // 12 % 9}{i % 12:02d}", *(f"{k:x}" if i % 12 else f"once {i}" for k in range(21))],
        (0, 24),
    ),
    "movielenslatest_x1": ("label,user_id,item_id,tag_id", lambda i: [i % 5, 100 + i % 7, i], (0, 3)),
}


@pytest.mark.parametrize("name", FILES)
def test_published_files_are_prepared_and_read_back(tmp_path, name):
    header, cells, (num_dense, num_sparse) = FILES[name]
    first = 0
    for part, count in (("train", 36), ("valid", 12), ("test", 12)):
        # Rows of Avazu begin with a number of their own.
        rows = [[*([i] if name == "avazu_x4" else []), i % 2, *cells(i)] for i in range(first, first + count)]
        lines = "".join(",".join(map(str, row)) + "\n" for row in rows)
        (tmp_path / f"{part}.csv").write_text(f"{header}\n{lines}")
        first += count
    paths = tuple(str(tmp_path / f"{part}.csv") for part in ("train", "valid", "test"))
    prepare(paths, tmp_path / "out", choose_schema(name, paths))
    dataset = open_prepared(tmp_path / "out")
    assert {split: len(rows) for split, rows in dataset.splits.items()} == {"train": 36, "val": 12, "test": 12}
    assert (len(dataset.dense_names), len(dataset.features)) == (num_dense, num_sparse)
    train = rows_of(tmp_path / "out")
    assert train.label_R.tolist() == [0.0, 1.0] * 18 and train.ids_RxK.min() >= 0
    check = globals().get(f"check_{name}")
    if check is not None:
        check(tmp_path / "out", train)


def values_of(output, column: str) -> list:
    return pq.read_table(output / "vocabularies" / f"{column}.parquet")["value"].to_pylist()


def check_criteo_x1(output, train):
    assert train.dense_RxN[7].tolist() == [7 / 8] * 13


def check_criteo_x4(output, train):
    assert sorted(values_of(output, "I1")) == [-1, 0]  # A missing count is 0.
    assert values_of(output, "I3") == [1, 2]  # log(3)^2, log(4)^2 and log(5)^2 are 1.2, 1.9 and 2.6.
    assert train.ids_RxK[[0, 12, 24], 2].tolist() == [1, 2, 1] and values_of(output, "C5") == [0]
    assert train.ids_RxK[[0, 1, 2], 13 + 4].tolist() == [0, 1, 1]  # 05db9164 occurs five times, fewer than ten.


def check_avazu_x4(output, train):
    assert values_of(output, "hour") == list(range(12)) and values_of(output, "weekday") == [2, 3, 4, 5, 6]
    assert values_of(output, "weekend") == [0, 1] and values_of(output, "site_id") == ["2"]
    assert train.ids_RxK[[0, 1], 3].tolist() == [0, 1]  # What occurs once shares an id.
