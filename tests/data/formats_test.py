"""Every input format gives the rows that it holds: the same log, written in many ways, prepares to the same."""

import bz2
import csv
import dataclasses
import gzip
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats import text_source
from dlrm_jax.data.formats.array_source import ArraySource, fit_hotness
from dlrm_jax.data.formats.source import Position, expand
from dlrm_jax.data.formats.table_source import TableSource
from dlrm_jax.data.prepare.preparation import prepare
from dlrm_jax.data.read.prepared import open_prepared
from dlrm_jax.data.schema.presets import CRITEO_DENSE, PRESETS
from dlrm_jax.data.schema.schema import Dense, Label, Sparse
from tests.helpers import SHARED
from tests.prepared_helpers import rows_of, schema

TEXTS = ["plain", 'quo"ted', "com,ma", "new\nline", "ünï 日本", "tab\there", "x" * 5000, None, "plain", " spaced "]
RECORDS = [
    {
        "label": i % 2,
        "x": None if i == 3 else i / 4,
        "c": TEXTS[i % 10],
        "tags": [None, [], ["a"], ["b", "a", "c"]][i % 4],
    }
    for i in range(120)
]
LOG = schema(dense=(Dense("x", fill=-1),), sparse=(Sparse("c"), Sparse("tags", separator="|", hotness=2)))


def as_csv(delimiter: str = ",", newline: str = "\n") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, lineterminator=newline)
    writer.writerow(RECORDS[0])
    for record in RECORDS:
        cells = {**record, "tags": "|".join(record["tags"] or [])}
        writer.writerow(["" if cell is None else cell for cell in cells.values()])
    return out.getvalue().encode()


def as_json() -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in RECORDS)


def as_parquet(dictionary: bool = False) -> bytes:
    table = pa.Table.from_pylist(RECORDS)
    if dictionary:
        encoded = table["c"].dictionary_encode()
        table = table.set_column(2, "c", encoded)
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=17)
    return out.getvalue()


def zstd_file(path, data: bytes) -> None:
    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(data)


FILES = {
    "log.csv": as_csv,
    "log.tsv": lambda: as_csv("\t"),
    "windows.csv": lambda: as_csv(newline="\r\n"),
    "bom.csv": lambda: b"\xef\xbb\xbf" + as_csv(),
    "no_last_newline.csv": lambda: as_csv().rstrip(b"\n"),
    "log.csv.gz": lambda: gzip.compress(as_csv()),
    "log.csv.bz2": lambda: bz2.compress(as_csv()),
    "log.jsonl": as_json,
    "log.jsonl.gz": lambda: gzip.compress(as_json()),
    "log.parquet": as_parquet,
    "dictionary.parquet": lambda: as_parquet(dictionary=True),
}


def expected():
    names: dict[str, int] = {}
    tags: dict[str, int] = {}
    ids = []
    for record in RECORDS:
        first = -1 if record["c"] is None else names.setdefault(record["c"], len(names))
        bag = [tags.setdefault(tag, len(tags)) for tag in (record["tags"] or [])[:2]]
        ids.append([first, *bag, *[-1] * (2 - len(bag))])
    return np.array(ids), np.array([[-1 if r["x"] is None else r["x"]] for r in RECORDS]), [r["label"] for r in RECORDS]


def assert_holds_the_log(output) -> None:
    rows = rows_of(output)
    ids, dense, labels = expected()
    np.testing.assert_array_equal(rows.ids_RxK, ids)
    np.testing.assert_array_equal(rows.dense_RxN, dense)
    np.testing.assert_array_equal(rows.label_R, labels)


@pytest.mark.parametrize("chunk_bytes", [64, 1 << 20])
@pytest.mark.parametrize("name", FILES)
def test_one_log_in_every_format(tmp_path, monkeypatch, name, chunk_bytes):
    monkeypatch.setattr(text_source.TextSource.__init__, "__defaults__", (False, chunk_bytes))
    (tmp_path / name).write_bytes(FILES[name]())
    prepare((str(tmp_path / name),), tmp_path / "out", LOG)
    assert_holds_the_log(tmp_path / "out")


def test_zstd(tmp_path):
    zstd_file(tmp_path / "log.csv.zst", as_csv())
    prepare((str(tmp_path / "log.csv.zst"),), tmp_path / "out", LOG)
    assert_holds_the_log(tmp_path / "out")


def test_many_files_in_natural_order(tmp_path):
    lines = as_csv().split(b"\n", 1)
    for i, name in ((0, "day_2.csv"), (1, "day_10.csv")):
        (tmp_path / name).write_bytes(lines[0] + b"\n" + (b"" if i else lines[1]))
    paths = expand(str(tmp_path / "day_*.csv"))
    assert [path.rsplit("_", 1)[1] for path in paths] == ["2.csv", "10.csv"]
    prepare(paths, tmp_path / "out", LOG)
    assert_holds_the_log(tmp_path / "out")


def test_glob_without_a_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="matches no file"):
        expand(str(tmp_path / "*.csv"))
    with pytest.raises(ConfigError, match="--input is missing"):
        expand("")


def test_stray_quotes_are_characters(tmp_path):
    text = 'label,x,c\n0,1,5" disk\n1,2,"quoted, ""so"""\n0,3,say "hi"\n1,4,"two\nlines"\n'
    (tmp_path / "log.csv").write_text(text)
    prepare((str(tmp_path / "log.csv"),), tmp_path / "out", schema())
    values = pq.read_table(tmp_path / "out" / "vocabularies" / "c.parquet")["value"].to_pylist()
    assert values == ['5" disk', 'quoted, "so"', 'say "hi"', "two\nlines"]


def test_numbers_in_parquet_are_ids_without_a_point(tmp_path):
    """A column of ids with gaps is stored as float: 3.0 is the id 3."""
    table = pa.table({"label": [0, 1, 1], "x": [1, 2, 3], "c": pa.array([3.0, None, 12345678901.0])})
    pq.write_table(table, tmp_path / "log.parquet")
    prepare((str(tmp_path / "log.parquet"),), tmp_path / "out", schema())
    assert pq.read_table(tmp_path / "out" / "vocabularies" / "c.parquet")["value"].to_pylist() == ["3", "12345678901"]


def test_a_dictionary_says_nothing_of_first_appearance():
    colours = pa.DictionaryArray.from_arrays(pa.array([2, 0, 2]), pa.array(["red", "green", "blue"]))
    table = pa.table({"label": [0, 1, 1], "x": [1, 2, 3], "c": colours})
    chunk = next(iter(TableSource("memory", table, schema()).chunks(Position())))
    assert chunk.parse().arrays["c"].to_pylist() == ["blue", "red", "blue"]
    assert pa.types.is_string(chunk.parse().arrays["c"].type)


def criteo_arrays(num_rows: int = 70, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y, counts = rng.integers(0, 2, num_rows).astype(np.int32), rng.integers(0, 500, (num_rows, 13)).astype(np.int32)
    return y, counts, rng.integers(0, 30, (num_rows, 26)).astype(np.int32)


def all_rows(output) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = [rows_of(output, name) for name in ("train", "val", "test") if len(open_prepared(output).splits[name])]
    order = np.argsort(np.concatenate([part.row_R for part in parts]))
    columns = ("label_R", "dense_RxN", "ids_RxK")
    return tuple(np.concatenate([getattr(part, column) for part in parts])[order] for column in columns)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_references_npz(tmp_path, save):
    y, counts, ids = criteo_arrays()
    save(tmp_path / "day.npz", X_int=counts, X_cat=ids, y=y, counts=np.full(26, 30))
    prepare((str(tmp_path / "day.npz"),), tmp_path / "out", PRESETS["dlrm_npz"][1]())
    labels, dense, read = all_rows(tmp_path / "out")
    np.testing.assert_array_equal(labels, y)
    np.testing.assert_array_equal(dense, np.log(counts.astype(np.float32) + 1))
    np.testing.assert_array_equal(read, ids)
    assert [len(open_prepared(tmp_path / "out").splits[name]) for name in ("train", "test", "val")] == [60, 5, 5]


@pytest.mark.golden
def test_the_references_own_npz(tmp_path):
    path = SHARED / "goldens" / "fake_kaggle" / "kaggleAdDisplayChallenge_processed.npz"
    if not path.exists():
        pytest.skip("the reference's fake log is not beside this checkout")
    prepare((str(path),), tmp_path / "out", PRESETS["dlrm_npz"][1]())
    with np.load(path) as golden:
        np.testing.assert_array_equal(all_rows(tmp_path / "out")[2], golden["X_cat"])


def test_mlperf_binary_rows(tmp_path):
    paths = []
    for day in range(2):
        y, counts, ids = criteo_arrays(seed=day)
        paths.append(tmp_path / f"day_{day}.bin")
        np.concatenate([y[:, None], counts, ids], axis=1).astype("<i4").tofile(paths[-1])
    prepare(tuple(map(str, paths)), tmp_path / "out", PRESETS["mlperf_bin"][1]())
    labels, dense, read = all_rows(tmp_path / "out")
    for day in range(2):
        y, counts, ids = criteo_arrays(seed=day)
        rows = slice(70 * day, 70 * (day + 1))
        np.testing.assert_array_equal(labels[rows], y)
        np.testing.assert_array_equal(dense[rows], np.log(counts.astype(np.float32) + 1))
        np.testing.assert_array_equal(read[rows], ids)
    assert len(open_prepared(tmp_path / "out").splits["train"]) == 70


def torchrec_files(folder, sparse_name: str | None = "sparse") -> np.ndarray:
    y, counts, ids = criteo_arrays()
    np.save(folder / "day_0_dense.npy", np.log(counts + 3).astype(np.float32))
    np.save(folder / "day_0_labels.npy", y[:, None])
    if sparse_name:
        np.save(folder / "day_0_sparse.npy", ids)
    return ids


def test_torchrec_npy(tmp_path):
    ids = torchrec_files(tmp_path)
    prepare((str(tmp_path / "day_0_dense.npy"),), tmp_path / "out", split_in_parts("torchrec_npy"))
    labels, dense, read = all_rows(tmp_path / "out")
    y, counts, _ = criteo_arrays()
    np.testing.assert_array_equal(labels, y)
    np.testing.assert_array_equal(dense, np.log(counts + 3).astype(np.float32))
    np.testing.assert_array_equal(read, ids)
    (tmp_path / "day_0_labels.npy").unlink()
    with pytest.raises(ConfigError, match=r"day_0_labels\.npy is missing"):
        prepare((str(tmp_path / "day_0_dense.npy"),), tmp_path / "out2", split_in_parts("torchrec_npy"))


def split_in_parts(preset: str):
    found = PRESETS[preset][1]()
    return dataclasses.replace(found, split=dataclasses.replace(found.split, parts=7))


def test_mlperf_multi_hot(tmp_path):
    torchrec_files(tmp_path, None)
    rng = np.random.default_rng(3)
    bags = {str(i): rng.integers(0, 50, (70, 1 + i % 4)).astype(np.int32) for i in range(26)}
    path = tmp_path / "day_0_sparse_multi_hot.npz"
    np.savez(path, **bags)
    prepare((str(path),), tmp_path / "out", fit_hotness(split_in_parts("mlperf_multi_hot"), str(path)))
    np.testing.assert_array_equal(all_rows(tmp_path / "out")[2], np.concatenate(list(bags.values()), axis=1))
    features = open_prepared(tmp_path / "out").features
    assert [feature.hotness for feature in features] == [1 + i % 4 for i in range(26)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b"x" * 100), "not"),
        (lambda path: np.savez(path, X_int=np.zeros((5, 13)), y=np.zeros(5)), "has no array 'X_cat'"),
        (lambda path: np.savez(path, X_int=np.zeros((5, 12)), X_cat=np.zeros((5, 26)), y=np.zeros(5)), "13 columns"),
        (lambda path: np.savez(path, X_int=np.zeros((4, 13)), X_cat=np.zeros((5, 26)), y=np.zeros(5)), "4 rows"),
        (lambda path: np.savez(path, X_int=np.array([["a"] * 13]), X_cat=np.zeros((1, 26)), y=[0]), "rows of numbers"),
    ],
)
def test_bad_npz_is_named(tmp_path, make, words):
    path = tmp_path / "day.npz"
    make(path)
    with pytest.raises(ConfigError, match=words) as error:
        prepare((str(path),), tmp_path / "out", PRESETS["dlrm_npz"][1]())
    assert "day.npz" in str(error.value)


def test_binary_rows_of_another_width_are_refused(tmp_path):
    (tmp_path / "day.bin").write_bytes(b"x" * 161)
    with pytest.raises(ConfigError, match="161 bytes; expected a multiple of 160"):
        prepare((str(tmp_path / "day.bin"),), tmp_path / "out", PRESETS["mlperf_bin"][1]())


def test_32_bit_ids_in_signed_arrays_are_unsigned(tmp_path):
    """TorchRec keeps Criteo's 32-bit categories in int32: the upper half turns negative there."""
    ids = torchrec_files(tmp_path)
    ids[0, 0] = -1
    np.save(tmp_path / "day_0_sparse.npy", ids)
    raw = split_in_parts("torchrec_npy")
    counted = dataclasses.replace(raw, sparse=tuple(Sparse(s.name, type="int") for s in raw.sparse))
    prepare((str(tmp_path / "day_0_dense.npy"),), tmp_path / "out", counted)
    assert pq.read_table(tmp_path / "out" / "vocabularies" / "C1.parquet")["value"][0].as_py() == 2**32 - 1


@pytest.mark.parametrize("first", [0, 1, 40, 69])
@pytest.mark.parametrize("kind", ["dlrm_npz", "mlperf_bin"])
def test_arrays_are_read_from_any_row_on(tmp_path, monkeypatch, kind, first):
    monkeypatch.setattr("dlrm_jax.data.formats.array_source._CHUNK_ROWS", 7)
    y, counts, ids = criteo_arrays()
    path = tmp_path / "day"
    if kind == "dlrm_npz":
        path = tmp_path / "day.npz"
        np.savez_compressed(path, X_int=counts, X_cat=ids, y=y)
    else:
        np.concatenate([y[:, None], counts, ids], axis=1).astype("<i4").tofile(path)
    source = ArraySource((str(path),), PRESETS[kind][1](), kind)
    read = [chunk.parse().arrays["C7"].to_numpy() for chunk in source.chunks(Position(0, first))]
    np.testing.assert_array_equal(np.concatenate(read), ids[first:, 6])


def test_a_byte_order_mark_without_a_header(tmp_path):
    (tmp_path / "log.csv").write_bytes(b"\xef\xbb\xbf1,2,a\n0,3,b\n")
    prepare((str(tmp_path / "log.csv"),), tmp_path / "out", schema(header=False, columns=("label", "x", "c")))
    assert rows_of(tmp_path / "out").label_R.tolist() == [1, 0]


def test_movielens_1m(tmp_path):
    """In the form of its README: `::` between fields, latin-1, genres after the title's year."""
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072-1\n", "latin-1")
    (tmp_path / "movies.dat").write_text(
        "7::Amélie (2001)::Comedy|Romance\n9::Toy Story (1995)::Animation\n", "latin-1"
    )
    ratings = [f"{1 + i % 2}::{7 + 2 * (i // 2 % 2)}::{1 + i % 5}::{978300760 + i}" for i in range(20)]
    (tmp_path / "ratings.dat").write_text("\n".join(ratings) + "\n")
    prepare((str(tmp_path),), tmp_path / "out", PRESETS["movielens_1m"][1]())
    labels, dense, ids = all_rows(tmp_path / "out")
    np.testing.assert_array_equal(labels, [float(1 + i % 5 >= 4) for i in range(20)])
    years = [2001 if i // 2 % 2 == 0 else 1995 for i in range(20)]
    np.testing.assert_allclose(dense[:, 1], (np.array(years) - 1980) / 20, rtol=1e-6)
    assert ids[0].tolist()[-6:] == [1, 2, -1, -1, -1, -1]


def test_every_preset_is_whole():
    for name, (text, make) in PRESETS.items():
        preset = make()
        assert preset.name == name and text and preset.label == Label(preset.label.column)
    assert [dense.name for dense in PRESETS["criteo_terabyte"][1]().dense] == list(CRITEO_DENSE)
