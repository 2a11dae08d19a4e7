"""Tests the preparation of a log (`dlrm_jax/data/prepare/preparation.py` and what it calls) against plain oracles."""

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats import records, text_source
from dlrm_jax.data.prepare import blocks, second_pass
from dlrm_jax.data.prepare.final_ids import counting_groups
from dlrm_jax.data.prepare.preparation import prepare
from dlrm_jax.data.read.prepared import open_prepared, read_json
from dlrm_jax.data.schema.presets import PRESETS
from dlrm_jax.data.schema.schema import Dense, Label, Sparse, Split
from dlrm_jax.data.values.hashing import hash_integers, hash_strings
from tests.data.criteo_test import plain
from tests.prepared_helpers import csv_rows, digest, prepare_text, rows_of, schema

COLOURS = ["red", "green", "", "blue", "red", "red", "green", "black"]
ROWS = [(i % 2, i, colour) for i, colour in enumerate(COLOURS)]


def ids(tmp_path, sparse: Sparse, column: list[str]) -> list[int]:
    rows = [(0, 1, value) for value in column]
    return rows_of(prepare_text(tmp_path, csv_rows(rows), schema(sparse=(sparse,)))).ids_RxK.tolist()


def flat(nested: list[list[int]]) -> list[int]:
    return [inner for outer in nested for inner in outer]


def test_vocabulary_by_first_appearance(tmp_path):
    assert flat(ids(tmp_path, Sparse("c"), COLOURS)) == [0, 1, -1, 2, 0, 0, 1, 3]
    table = pq.read_table(tmp_path / "out" / "vocabularies" / "c.parquet").to_pydict()
    assert table == {"id": [0, 1, 2, 3], "value": ["red", "green", "blue", "black"], "count": [3, 2, 1, 1]}


def test_vocabulary_by_frequency_with_a_threshold_and_an_unknown_id(tmp_path):
    sparse = Sparse("c", order="frequency", min_count=2, oov=True)
    assert flat(ids(tmp_path, sparse, ["b", "a", "a", "", "a", "b", "c"])) == [2, 1, 1, -1, 1, 2, 0]
    statistics = read_json(tmp_path / "out" / "statistics.json")["tables"]["c"]
    assert statistics["rows"] == 3 and statistics["infrequent_values"] == 1
    assert statistics["coverage"]["train"] == pytest.approx(5 / 6, abs=1e-5)
    table = pq.read_table(tmp_path / "out" / "vocabularies" / "c.parquet").to_pydict()
    assert table == {"id": [1, 2], "value": ["a", "b"], "count": [3, 2]}


def test_infrequent_values_without_an_unknown_id_leave_the_bag(tmp_path):
    assert flat(ids(tmp_path, Sparse("c", min_count=2), ["b", "a", "a", "c"])) == [-1, 0, 0, -1]


def test_a_missing_value_can_be_a_value(tmp_path):
    assert flat(ids(tmp_path, Sparse("c", missing="fill", fill="red"), COLOURS)) == [0, 1, 0, 2, 0, 0, 1, 3]
    other = tmp_path / "other"
    other.mkdir()
    assert flat(ids(other, Sparse("c", missing="fill", fill="none"), ["", "a", "none"])) == [0, 1, 0]


def test_hash_is_the_documented_one(tmp_path):
    values = ["red", "green", "ünïcode"]
    expected = (hash_strings(pa.array(values)) % np.uint64(97)).tolist()
    assert flat(ids(tmp_path, Sparse("c", ids="hash", size=97), values)) == expected
    other = tmp_path / "other"
    other.mkdir()
    expected = (hash_integers(np.array([7, 255])) % np.uint64(97)).tolist()
    assert flat(ids(other, Sparse("c", ids="hash", size=97, type="hex"), ["7", "00FF"])) == expected


def test_raw_and_modulo_ids(tmp_path):
    assert flat(ids(tmp_path, Sparse("c", ids="raw", type="int"), ["7", "0", "", "3"])) == [7, 0, -1, 3]
    assert open_prepared(tmp_path / "out").table_sizes == {"c": 8}
    other = tmp_path / "other"
    other.mkdir()
    big = ["ffffffffffffffff", "00000010", "5"]
    assert flat(ids(other, Sparse("c", ids="raw", type="hex", modulo=10), big)) == [(2**64 - 1) % 10, 6, 5]
    assert open_prepared(other / "out").table_sizes == {"c": 10}


def test_leading_zeros_and_case_of_hex_are_no_difference(tmp_path):
    assert flat(ids(tmp_path, Sparse("c", type="hex"), ["00ab", "AB", "ab", "0", "000"])) == [0, 0, 0, 1, 1]


def test_lists_keep_their_first_ids_and_count_the_rest(tmp_path):
    sparse = Sparse("c", separator="|", hotness=2)
    assert ids(tmp_path, sparse, ["a|b", "b", "", "|a|", "c|a|b"]) == [[0, 1], [1, -1], [-1, -1], [0, -1], [2, 0]]
    feature = read_json(tmp_path / "out" / "statistics.json")["features"]["c"]
    assert feature["truncated_ids"] == 1 and feature["empty_share"] == 0.2 and feature["mean_hotness"] == 1.2


def test_features_of_one_table_are_numbered_row_by_row(tmp_path):
    sparse = (Sparse("item", table="items"), Sparse("seen", table="items", separator=" ", hotness=2))
    text = "label,x,item,seen\n0,1,b,a b\n1,1,c,d\n0,1,a,\n"
    output = prepare_text(tmp_path, text, schema(sparse=sparse))
    assert rows_of(output).ids_RxK.tolist() == [[0, 1, 0], [2, 3, -1], [1, -1, -1]]
    assert open_prepared(output).table_sizes == {"items": 4}


@pytest.mark.parametrize(
    ("dense", "expected"),
    [
        (Dense("x"), lambda x: x),
        (Dense("x", transform="log1p"), lambda x: math.log(max(x, 0) + 1)),
        (Dense("x", transform="nvidia_log"), lambda x: math.log(x + 3)),
        (Dense("x", transform="torchrec_log"), lambda x: math.log(x - (-2) + 2)),
        (Dense("x", transform="standardise"), lambda x: (x - 2.25) / np.std([-2, 0, 1, 10])),
    ],
)
def test_dense_transforms(tmp_path, dense, expected):
    values = [-2, 0, 1, 10]
    output = prepare_text(tmp_path, csv_rows([(0, x, "a") for x in values]), schema(dense=(dense,)))
    np.testing.assert_allclose(rows_of(output).dense_RxN[:, 0], [expected(x) for x in values], rtol=1e-6)


def test_statistics_of_many_chunks_are_those_of_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(text_source.TextSource.__init__, "__defaults__", (False, 64))
    x = np.random.default_rng(0).normal(50, 3, 300).round(3)
    log = schema(dense=(Dense("x", transform="standardise"),))
    output = prepare_text(tmp_path, csv_rows([(0, value, "a") for value in x]), log)
    np.testing.assert_allclose(rows_of(output).dense_RxN[:, 0], (x - x.mean()) / x.std(), rtol=1e-5, atol=1e-6)


def test_random_splits_follow_their_seed(tmp_path):
    rows = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(rows))
        folder.mkdir()
        output = prepare_text(folder, csv_rows([(0, 1, "a")] * 500), schema(split=Split("random", seed=seed)))
        rows.append(split_rows(output)["test"])
    assert rows[0] == rows[1] != rows[2]


def test_torchrec_log_takes_the_least_of_all_its_columns(tmp_path):
    dense = (Dense("x", transform="torchrec_log"), Dense("y", transform="torchrec_log"))
    output = prepare_text(tmp_path, "label,x,y,c\n0,5,-7,a\n1,1,3,a\n", schema(dense=dense))
    np.testing.assert_allclose(rows_of(output).dense_RxN, np.log([[14, 2], [10, 12]]), rtol=1e-6)


def test_missing_dense_values(tmp_path):
    rows = [(0, "", "a"), (0, 2, "a"), (1, 4, "b"), (1, "NaN", "b")]
    for i, (dense, expected) in enumerate(
        [(Dense("x", fill=-1), [-1, 2, 4, -1]), (Dense("x", missing="mean"), [3, 2, 4, 3])]
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        output = prepare_text(folder, csv_rows(rows), schema(dense=(dense,)))
        assert rows_of(output).dense_RxN[:, 0].tolist() == expected
    with pytest.raises(ConfigError, match="line 2, column x: is missing"):
        prepare_text(tmp_path, csv_rows(rows), schema(dense=(Dense("x", missing="error"),)))


def test_labels_by_text_and_by_threshold(tmp_path):
    text = "label,x,c\nyes,1,a\nno,1,a\nmaybe,1,b\n"
    assert rows_of(
        prepare_text(tmp_path, text, schema(label=Label("label", positive=("yes", "maybe"))))
    ).label_R.tolist() == [
        1,
        0,
        1,
    ]
    other = tmp_path / "other"
    other.mkdir()
    rated = schema(label=Label("label", threshold=3.5))
    assert rows_of(prepare_text(other, csv_rows([(3, 1, "a"), (4, 1, "a")]), rated)).label_R.tolist() == [0, 1]


def test_weights_and_row_numbers_travel(tmp_path):
    text = "label,x,c,w\n1,1,a,0.5\n0,bad,a,1\n0,1,b,0\n"
    output = prepare_text(tmp_path, text, schema(weight="w"), on_bad_row="skip_and_count")
    rows = rows_of(output)
    assert rows.weight_R.tolist() == [0.5, 0] and rows.row_R.tolist() == [0, 2]


def test_a_log_without_numbers_has_none(tmp_path):
    output = prepare_text(tmp_path, csv_rows(ROWS), schema(dense=()))
    assert rows_of(output).dense_RxN.shape == (len(ROWS), 0) and open_prepared(output).dense_names == ()
    spec = tfds.builder_from_directory(output).info.features
    assert not any(b"dense" in path.read_bytes() for path in output.glob("*.array_record*"))
    assert set(spec) == {"ids", "label", "row"} and spec.to_json() == blocks.features(0, 1, False).to_json()


def test_what_older_versions_prepared_without_numbers_keeps_its_column_of_ones(tmp_path, monkeypatch):
    """So that what was trained on it goes on."""
    columns, finish = blocks._columns, second_pass.SecondPass._finish
    monkeypatch.setattr(blocks, "_columns", lambda dense, *others: columns(max(dense, 1), *others))
    ones = lambda self, staged, rows: {"dense": staged["dense"][rows]} | finish(self, staged, rows)  # noqa: E731
    monkeypatch.setattr(second_pass.SecondPass, "_finish", ones)
    output = prepare_text(tmp_path, csv_rows(ROWS), schema(dense=()))
    monkeypatch.undo()
    assert (rows_of(output).dense_RxN == 1).all() and open_prepared(output).dense_names == ("constant",)


def split_rows(output) -> dict[str, list[int]]:
    return {
        name: rows_of(output, name).row_R.tolist() if len(open_prepared(output).splits[name]) else []
        for name in ("train", "val", "test")
    }


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (Split("order", val=0.25, test=0.25), ([0, 1, 2, 3], [4, 5], [6, 7])),
        (Split("last_part", parts=2, first_half="val"), ([0, 1, 2, 3], [4, 5], [6, 7])),
        (Split("last_part", parts=3, first_half="test"), ([0, 1, 2, 3, 4, 5], [7], [6])),
        (Split("last_part", parts=0), ([], None, None)),
        (Split("time", val=0.25, test=0.25), ([4, 5, 6, 7], [2, 3], [0, 1])),
    ],
)
def test_splits(tmp_path, split, expected):
    text = "label,x,c,t\n" + "".join(f"{i % 2},{i},a,{100 - i}\n" for i in range(8))
    log = schema(split=split, timestamp="t")
    if expected[1] is None:
        with pytest.raises(ConfigError, match="none of the 8 rows is for training"):
            prepare_text(tmp_path, text, log)
        return
    assert tuple(split_rows(prepare_text(tmp_path, text, log)).values()) == expected


def test_split_by_column_by_files_and_at_random(tmp_path):
    text = "label,x,c,part\n0,1,a,test\n1,1,a,train\n0,1,a,val\n"
    by_column = prepare_text(tmp_path, text, schema(split=Split("column", column="part")))
    assert split_rows(by_column) == {"train": [1], "val": [2], "test": [0]}
    for name in ("a.csv", "b_test.csv"):
        (tmp_path / name).write_text(csv_rows(ROWS))
    output = tmp_path / "files"
    prepare(
        (str(tmp_path / "a.csv"), str(tmp_path / "b_test.csv")),
        output,
        schema(split=Split("files", test_files="*_test.csv")),
    )
    assert split_rows(output) == {"train": list(range(8)), "val": [], "test": list(range(8, 16))}
    output = tmp_path / "random"
    (tmp_path / "many.csv").write_text(csv_rows([(0, 1, "a")] * 20_000))
    prepare((str(tmp_path / "many.csv"),), output, schema(split=Split("random", val=0.2, test=0.1)))
    sizes = {name: len(rows) for name, rows in split_rows(output).items()}
    assert sum(sizes.values()) == 20_000
    assert sizes["val"] == pytest.approx(4_000, rel=0.05) and sizes["test"] == pytest.approx(2_000, rel=0.08)


def kaggle_text(num_rows: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(num_rows):
        counts = [str(v) if rng.random() > 0.2 else "" for v in rng.integers(-3, 100, 13)]
        categories = [f"{int(v) * 2654435761 % 2**32:08x}" if rng.random() > 0.1 else "" for v in rng.zipf(1.3, 26)]
        lines.append("\t".join([str(rng.integers(0, 2)), *counts, *categories]))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("chunk_bytes", [700, 5_000, 1 << 20])
def test_criteo_equals_a_plain_reader_at_any_chunk_size(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(text_source.TextSource.__init__, "__defaults__", (False, chunk_bytes))
    (tmp_path / "train.txt").write_text(kaggle_text(400))
    output = tmp_path / "out"
    prepare((str(tmp_path / "train.txt"),), output, PRESETS["criteo_kaggle"][1]())
    splits, sizes = plain(tmp_path / "train.txt")
    assert sizes == list(open_prepared(output).table_sizes.values())
    for name, split in splits.items():
        for field in dataclasses.fields(split)[:4]:
            expected, got = getattr(split, field.name), getattr(rows_of(output, name), field.name)
            np.testing.assert_array_equal(got, expected, err_msg=f"{name} {field.name}")


def test_tfds_reads_it(tmp_path):
    output = prepare_text(tmp_path, csv_rows(ROWS), schema())
    source = tfds.builder_from_directory(output).as_data_source("train")
    assert len(source) == 1
    assert source[0]["ids"][:, 0].tolist() == [0, 1, -1, 2, 0, 0, 1, 3]
    assert source[0]["dense"].dtype == np.float32 and source[0]["label"].tolist() == [0, 1] * 4


@pytest.mark.parametrize("lengths", [{"train": [3, 2], "val": [1], "test": []}, {"train": [1]}])
@pytest.mark.parametrize(("name", "weighted"), [("log", False), ("größe", True)])
def test_metadata_are_the_bytes_that_tfds_writes(tmp_path, name, weighted, lengths):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    template = tfds.core.ShardedFileTemplate(ours, "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", name, None, "x")
    ours.mkdir()
    for split, counts in lengths.items():
        for i, rows in enumerate(counts):
            (ours / blocks.shard_name(name, split, i, len(counts))).write_bytes(b"x" * rows)
    blocks.write_metadata(ours, name, (3, 5), weighted, lengths)
    identity = tfds.core.DatasetIdentity(name, tfds.core.Version(blocks.VERSION), data_dir="", module_name="")
    features = blocks.features(3, 5, weighted)
    info = tfds.core.DatasetInfo(builder=identity, features=features, description=blocks._DESCRIPTION)
    info.set_file_format("array_record")
    splits = [
        tfds.core.SplitInfo(name=split, shard_lengths=counts, num_bytes=sum(counts), filename_template=template)
        for split, counts in lengths.items()
    ]
    info.set_splits(tfds.core.SplitDict(splits))
    theirs.mkdir()
    info.write_to_directory(theirs)
    for file in ("features.json", "dataset_info.json"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_many_blocks_and_shards(tmp_path, monkeypatch, compression):
    monkeypatch.setattr("dlrm_jax.data.prepare.runs.BLOCKS_PER_SHARD", 2)
    num_rows = 4096 * 5 + 17
    rows = [(i % 2, i, f"v{i % 1000}") for i in range(num_rows)]
    output = prepare_text(tmp_path, csv_rows(rows), schema(), compression=compression)
    assert len(list(output.glob("log-train.array_record-*"))) == 3
    read = rows_of(output)
    np.testing.assert_array_equal(read.row_R, np.arange(num_rows))
    np.testing.assert_array_equal(read.ids_RxK[:, 0], np.arange(num_rows) % 1000)


@pytest.mark.parametrize("num_cores", [1, 2, 3, 64])
@pytest.mark.parametrize("limit", [0, 9, 10, 1000])
def test_every_table_is_counted_once_within_the_limit(num_cores, limit):
    num_bytes = [5, 3, 0, 9, 1, 1, 1, 7, 30, 2, 2]
    groups = counting_groups(num_bytes, num_cores, limit)
    assert sorted(i for group in groups for i in group) == list(range(len(num_bytes)))
    assert all(len(group) == 1 or sum(num_bytes[i] for i in group) <= limit for group in groups)
    assert len(groups) >= min(num_cores, len(num_bytes))
    if limit == 1000:
        assert len(groups) == min(num_cores, len(num_bytes))


def test_counting_in_many_readings_changes_nothing(tmp_path, monkeypatch):
    sparse = tuple(Sparse(name, column="c", table=f"t{i // 2}") for i, name in enumerate("abcdefghijklmn"))
    for name, limit in (("one", 1 << 30), ("many", 1)):
        monkeypatch.setattr("dlrm_jax.data.prepare.second_pass._MAX_COUNT_BYTES", limit)
        (tmp_path / name).mkdir()
        prepare_text(tmp_path / name, csv_rows(ROWS), schema(sparse=sparse))
    assert digest(tmp_path / "one" / "out") == digest(tmp_path / "many" / "out")


def test_statistics(tmp_path):
    rows = [(int(i % 4 == 0), 1, f"v{min(i % 100, 40)}") for i in range(1000)]
    output = prepare_text(tmp_path, csv_rows(rows), schema(split=Split("order", val=0.1, test=0.1)))
    statistics = read_json(output / "statistics.json")
    assert statistics["splits"]["train"]["rows"] == 800 and statistics["splits"]["train"]["positive_rate"] == 0.25
    table = statistics["tables"]["c"]
    assert table["rows"] == table["distinct"] == 41 and table["lookups"] == 1000
    assert table["top"][0] == {"id": 40, "value": "v40", "share": 0.6}
    assert table["seen_in_train"] == {"val": 1.0, "test": 1.0}
    assert table["frequency_curve"][0] == [1, 600] and table["frequency_curve"][-1] == [41, 10]
    assert sum(rows for _, rows, _ in statistics["positives_over_time"]) == 1000


def test_seen_in_train_is_counted_by_lookups(tmp_path):
    rows = [(0, 1, "a")] * 8 + [(1, 1, "b"), (1, 1, "a")]
    output = prepare_text(tmp_path, csv_rows(rows), schema(split=Split("order", val=0.1, test=0.1)))
    assert read_json(output / "statistics.json")["tables"]["c"]["seen_in_train"] == {"val": 0.0, "test": 1.0}


def test_memory_limit_names_the_largest_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr("dlrm_jax.data.prepare.first_pass.CHUNKS_PER_FILE", 1)
    monkeypatch.setattr("dlrm_jax.data.prepare.preparation._FIXED_BYTES", 1000)
    text = csv_rows([(0, 1, f"value {i}") for i in range(5000)])
    with pytest.raises(ConfigError, match=r"vocabularies need .*--max_memory leaves .* c: 5,000 values"):
        prepare_text(tmp_path, text, schema(), max_memory=20_000)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="--max_memory is below the least of 875 MB"):
        prepare_text(tmp_path, text, schema(), max_memory=20_000)


def test_lines_are_cut_where_records_end():
    data = b'a,b\n"x\ny",1\n5" disk,2\nlast'
    assert records.record_end(data, b"") == data.rindex(b"\n") + 1
    assert records.record_ends(data, b'"').tolist() == [4, 12, 22]
    assert records.record_ends(b'a,"b""c"\n"\n', b'"').tolist() == [9]


def test_a_chunk_of_a_file_without_quotes_ends_with_a_line(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(b"one\ntwo\n" + b"x" * 100_000 + b"\nrest")
    with open(path, "rb", buffering=0) as file:
        file.seek(2)
        assert records.to_line_end(file, 1) == 2
        assert records.to_line_end(file, 2) == 6
        assert records.to_line_end(file, 50_000) == 50_000 + 100_009 - 50_002
        assert records.to_line_end(file, 10) == 10, "a long line is not searched to its end"
        assert records.to_line_end(file, 200_000) == 200_000
        assert file.tell() == 2
