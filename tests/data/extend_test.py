"""Tests `prepare --extend` (`prepare/extend.py`, `growth.py`): days prepared one after the other, and all at once."""

import itertools
import json
import os
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats import text_source
from dlrm_jax.data.prepare.hashes import write_hashes
from dlrm_jax.data.prepare.preparation import Options, prepare
from dlrm_jax.data.read.prepared import open_prepared, read_json
from dlrm_jax.data.schema.schema import Dense, Label, Sparse, Split
from tests.batches import train_batches
from tests.data.restart_test import Killed, dies_at
from tests.prepared_helpers import digest, in_small_blocks, rows_of, schema

RICH = schema(
    label=Label("label", positive=("yes",)),
    dense=(Dense("x", transform="log1p"), Dense("y", transform="standardise", missing="mean")),
    sparse=(
        Sparse("c"),
        Sparse("o", column="c", oov=True),
        Sparse("n", type="int"),
        Sparse("m", type="int", table="n"),
        Sparse("h", column="c", ids="hash", size=30),
        Sparse("r", type="int", ids="raw"),
        Sparse("l", separator="|", hotness=3),
        Sparse("q", column="x", buckets="quantile", size=4),
        Sparse("k", cross=("c", "n")),
    ),
    weight="w",
    timestamp="t",
    split=Split("random", val=0.2, test=0.1),
)


def write_days(directory: pathlib.Path, num_days: int = 5, rows: int = 230) -> list[str]:
    """A file a day; each brings values that those before have not, one row is bad, numbers drift."""
    rng = np.random.default_rng(0)
    paths = []
    for day in range(num_days):
        lines = ["label,x,y,c,n,m,r,l,w,t"]
        for i in range(rows + day):
            n, m = rng.integers(0, 20 * (day + 1), 2)
            y = "" if i % 9 == 0 else f"{rng.normal(day, 1 + day):.3f}"
            values = "|".join(f"l{v}" for v in rng.integers(0, 5 * (day + 1), rng.integers(0, 5)))
            label = "yes" if rng.random() < 0.3 else "no"
            date = f"2024-01-{day + 1:02d}T{i % 24:02d}:00"
            lines.append(f"{label},{rng.integers(0, 50)},{y},c{n * m % 97},{n},{m},{n + 3 * day},{values},1.5,{date}")
        lines.insert(40, "yes,word,1,c,1,1,1,l,1,2024-01-01")
        path = directory / f"day{day}.csv"
        path.write_text("\n".join(lines) + "\n")
        paths.append(str(path))
    return paths


def grown(paths: list[str], directory: pathlib.Path, of, first: int = 1, **options) -> pathlib.Path:
    """The first files prepared, and each further one as an extension; the last dataset."""
    out = directory / "grown0"
    prepare(tuple(paths[:first]), out, of, Options("skip_and_count"))
    for i, path in enumerate(paths[first:], start=1):
        last, out = out, directory / f"grown{i}"
        prepare((path,), out, of, Options("skip_and_count", extend=last, **options))
    return out


def at_once(paths: list[str], directory: pathlib.Path, of) -> pathlib.Path:
    prepare(tuple(paths), directory / "whole", of, Options("skip_and_count"))
    return directory / "whole"


@pytest.fixture
def small_pieces(monkeypatch):
    in_small_blocks(monkeypatch)
    monkeypatch.setattr("dlrm_jax.data.prepare.runs.BLOCKS_PER_SHARD", 2)
    monkeypatch.setattr(text_source.TextSource.__init__, "__defaults__", (False, 3_000))
    monkeypatch.setattr("dlrm_jax.data.prepare.first_pass.CHUNKS_PER_FILE", 2)


def same_rows(ours: pathlib.Path, theirs: pathlib.Path, slots: slice, dense: slice) -> None:
    for split in ("train", "val", "test"):
        a, b = rows_of(ours, split), rows_of(theirs, split)
        for field in ("label_R", "row_R", "weight_R"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
        np.testing.assert_array_equal(a.ids_RxK[:, slots], b.ids_RxK[:, slots])
        np.testing.assert_array_equal(a.dense_RxN[:, dense], b.dense_RxN[:, dense])


def counted(output: pathlib.Path) -> dict:
    """The statistics, but for how rows lie in files."""
    out = read_json(output / "statistics.json")
    for split in out["splits"].values():
        del split["shards"], split["checksum"]
    return {name: value for name, value in out.items() if name not in ("runs", "notes")}


def test_five_parts_equal_one_preparation(tmp_path, small_pieces):
    paths = write_days(tmp_path)
    ours, theirs = grown(paths, tmp_path, RICH), at_once(paths, tmp_path, RICH)
    quantile = 9  # Edges, and what standardises y, stay those of the first day: the slot, and the column, differ.
    for slots in (slice(0, quantile), slice(quantile + 1, None)):
        same_rows(ours, theirs, slots, slice(0, 1))
    assert (rows_of(ours).ids_RxK[:, quantile] != rows_of(theirs).ids_RxK[:, quantile]).any()
    mine, whole = counted(ours), counted(theirs)
    first = counted(tmp_path / "grown0")
    assert mine["dense"] == first["dense"] != whole["dense"]
    assert mine["tables"]["q"]["edges"] == first["tables"]["q"]["edges"] != whole["tables"]["q"]["edges"]
    for statistics in (mine, whole):
        del statistics["dense"], statistics["tables"]["q"]
    assert mine == whole
    growth, of_whole = read_json(ours / "growth.json"), read_json(theirs / "growth.json")
    del growth["tables"]["q"], of_whole["tables"]["q"]
    assert growth == of_whole  # Also the statistics that --refit would use: to the last bit.
    files, of_whole = digest(ours), digest(theirs)
    tables = [name for name in files if name.endswith(".parquet") and "q." not in name]
    assert len(tables) == 12 and all(files[name] == of_whole[name] for name in tables)


def test_an_epoch_over_a_grown_dataset_is_that_over_a_whole_one(tmp_path, small_pieces):
    log = schema(label=Label("label", positive=("yes",)), sparse=(Sparse("c"),), split=Split("random"))
    paths = write_days(tmp_path)
    ours, theirs = (
        open_prepared(d).splits["train"] for d in (grown(paths, tmp_path, log), at_once(paths, tmp_path, log))
    )
    assert set(range(64, len(ours), 64)) < set(ours.ends.tolist())  # Its blocks are whole records, but at seams.
    for a, b in itertools.islice(zip(train_batches(ours, 50, 1, 3), train_batches(theirs, 50, 1, 3), strict=True), 60):
        np.testing.assert_array_equal(a.ids_BxK, b.ids_BxK)
        np.testing.assert_array_equal(a.dense_BxN, b.dense_BxN)


def test_old_shards_are_links_and_tfds_reads_all(tmp_path, small_pieces, monkeypatch, caplog):
    paths = write_days(tmp_path, 2)
    of = schema(label=RICH.label)
    ours = grown(paths, tmp_path, of)
    old = sorted((tmp_path / "grown0").glob("*.array_record*"))
    assert len(old) == 2 and all(path.stat().st_nlink == 2 for path in old)
    records = tfds.builder_from_directory(ours).as_data_source("train")
    np.testing.assert_array_equal(np.concatenate([record["row"] for record in records]), rows_of(ours).row_R)

    def no_links(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    prepare((paths[1],), tmp_path / "copied", of, Options("skip_and_count", extend=tmp_path / "grown0"))
    assert digest(tmp_path / "copied") == digest(ours)
    assert "2 shards of the days before were copied: they cannot be linked there" in caplog.text
    assert all(path.stat().st_nlink == 2 for path in old)


def test_a_value_that_becomes_frequent_later(tmp_path):
    """a is frequent from the first day; b from the second; c from the third, whose earlier rows stay as they were."""
    of = schema(sparse=(Sparse("c", min_count=2, oov=True), Sparse("d", column="c", min_count=2)))
    for day, column in enumerate(["aabc", "bbad", "cadd"]):
        rows = "".join(f"{i % 2},1,{value}\n" for i, value in enumerate(column))
        (tmp_path / f"{day}.csv").write_text("label,x,c\n" + rows)
    ours = grown([str(tmp_path / f"{day}.csv") for day in range(3)], tmp_path, of)
    assert rows_of(ours).ids_RxK[:, 0].tolist() == [1, 1, 0, 0, 2, 2, 1, 0, 3, 1, 4, 4]
    assert rows_of(ours).ids_RxK[:, 1].tolist() == [0, 0, -1, -1, 1, 1, 0, -1, 2, 0, 3, 3]
    table = pq.read_table(ours / "vocabularies" / "c.parquet").to_pydict()
    assert table == {"id": [1, 2, 3, 4], "value": ["a", "b", "c", "d"], "count": [4, 2, 1, 2]}
    statistics = read_json(ours / "statistics.json")
    assert statistics["notes"] == [
        "c: 2 values of the days before reached min_count 2 and have ids in the new rows; their 2 earlier occurrences "
        "have id 0, where one preparation of all days would have given them ids",
        "d: 2 values of the days before reached min_count 2 and have ids in the new rows; their 2 earlier occurrences "
        "are left out of their bags, where one preparation of all days would have given them ids",
    ]
    assert statistics["tables"]["c"]["coverage"]["train"] == 0.75
    assert statistics["tables"]["c"]["infrequent_values"] == 0 and statistics["tables"]["c"]["rows"] == 5


@pytest.mark.parametrize(("order", "second"), [("frequency", ["d", "c"]), ("value", ["c", "d"])])
def test_other_orders_number_the_new_values_behind_the_known(tmp_path, order, second):
    of = schema(sparse=(Sparse("c", order=order),))
    (tmp_path / "1.csv").write_text("label,x,c\n1,1,b\n0,1,b\n1,1,a\n")
    (tmp_path / "2.csv").write_text("label,x,c\n1,1,a\n0,1,d\n1,1,a\n0,1,d\n0,1,c\n")
    ours = grown([str(tmp_path / "1.csv"), str(tmp_path / "2.csv")], tmp_path, of)
    known = ["b", "a"] if order == "frequency" else ["a", "b"]
    assert pq.read_table(ours / "vocabularies" / "c.parquet")["value"].to_pylist() == known + second
    assert read_json(ours / "statistics.json")["notes"] == [
        f"c: 2 new values have the ids after those known, by {order}; one preparation of all days would number all of "
        "them by it"
    ]


def test_transforms_stay_unless_they_are_refitted(tmp_path):
    of = schema(
        dense=(Dense("x", transform="standardise"),), sparse=(Sparse("q", column="x", buckets="quantile", size=2),)
    )
    for day, numbers in enumerate([[0, 2], [10, 12]]):
        (tmp_path / f"{day}.csv").write_text("label,x\n" + "".join(f"{x % 4 // 2},{x}\n" for x in numbers))
    paths = [str(tmp_path / f"{day}.csv") for day in range(2)]
    kept = grown(paths, tmp_path, of)
    assert rows_of(kept).dense_RxN[:, 0].tolist() == [-1, 1, 9, 11]
    assert rows_of(kept).ids_RxK[:, 0].tolist() == [0, 1, 1, 1]
    assert read_json(kept / "statistics.json")["notes"] == [
        "x: its transform keeps the statistics of the days before (mean 1, deviation 1, least 0; of all days 6, "
        "5.09902, 0)"
    ]
    (tmp_path / "again").mkdir()
    refitted = grown(paths, tmp_path / "again", of, refit=True)
    assert read_json(refitted / "statistics.json")["dense"]["x"]["mean"] == 6
    np.testing.assert_allclose(rows_of(refitted).dense_RxN[:, 0], [-1, 1, 4 / 26**0.5, 6 / 26**0.5], rtol=1e-6)
    assert rows_of(refitted).ids_RxK[:, 0].tolist() == [0, 1, 1, 1]
    table = read_json(refitted / "statistics.json")["tables"]["q"]
    assert table["edges"] == [2] and [top["id"] for top in table["top"]] == [1, 0]
    assert "refitted for the new rows and for serving" in read_json(refitted / "statistics.json")["notes"][0]


def test_day_by_day_grows_as_prepared_at_once(tmp_path, small_pieces):
    """Each new day is the test split, yesterday's the val split; also where a day's rows come late. All bytes agree."""
    days = write_days(tmp_path)
    of = schema(
        label=RICH.label, timestamp="t", split=Split("time", period="1d", val=1, test=1), sparse=RICH.sparse[:7]
    )
    ours, theirs = grown(days, tmp_path, of, first=3), at_once(days, tmp_path, of)
    mine, whole = digest(ours), digest(theirs)
    apart = {name for name in mine if mine[name] != whole.get(name)}
    # The first rows are those of the last day: rows of days before may have ids that values no longer get.
    assert apart == {"job.json", "hashes.json", "statistics.json", "first_rows.json"} and mine.keys() == whole.keys()
    assert counted(ours) == counted(theirs)
    assert [p["split"] for p in counted(ours)["periods"]] == ["train"] * 3 + ["val", "test"]
    assert (
        "split: 2 periods are now in another split, since val and test are the last"
        in read_json(ours / "statistics.json")["notes"][0]
    )
    late = days[1].replace("day1", "late")
    pathlib.Path(late).write_text("\n".join(pathlib.Path(days[1]).read_text().splitlines()[:100]) + "\n")
    prepare((late,), tmp_path / "later", of, Options("skip_and_count", extend=ours))
    for name in ("growth.json", "schema.json"):
        assert (tmp_path / "later" / name).exists()
    prepare((*days, late), tmp_path / "together", of, Options("skip_and_count"))
    assert counted(tmp_path / "later") == counted(tmp_path / "together")
    same_rows(tmp_path / "later", tmp_path / "together", slice(None), slice(None))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (Split("order", val=0.25, test=0.25), ([0, 1, 4, 5], [2, 6], [3, 7])),
        (Split("time", val=0.25, test=0.25), ([2, 3, 6, 7], [1, 5], [0, 4])),
        (Split("last_part", parts=2), ([0, 1, 4, 5], [2, 6], [3, 7])),
        (Split("column", column="p"), ([0, 2, 4, 6], [1, 5], [3, 7])),
        (Split("files", test_files="b*"), ([0, 1, 2, 3], [], [4, 5, 6, 7])),
    ],
)
def test_splits_of_new_rows(tmp_path, split, expected):
    text = "label,x,c,t,p\n" + "".join(
        f"{i % 2},1,a,{9 - i},{p}\n" for i, p in enumerate(("train", "val", "train", "test"))
    )
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(text)
    of = schema(split=split, timestamp="t")
    ours = grown([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")], tmp_path, of)
    found = [rows_of(ours, name).row_R.tolist() for name in ("train", "val", "test")]
    assert tuple(found) == expected
    cut = split.by in ("order", "time", "last_part")
    assert [f"split: by {split.by} cuts the new rows by themselves" in n for n in notes_of(ours)] == [True] * cut


def notes_of(output: pathlib.Path) -> list[str]:
    return read_json(output / "statistics.json")["notes"]


def test_dying_before_each_file_changes_nothing(tmp_path, small_pieces, monkeypatch):
    paths = write_days(tmp_path, 2, 60)
    of = schema(label=RICH.label, dense=RICH.dense, sparse=(Sparse("c", min_count=2, oov=True), *RICH.sparse[6:8]))
    prepare((paths[0],), tmp_path / "first", of, Options("skip_and_count"))
    options = Options("skip_and_count", extend=tmp_path / "first")
    before = digest(tmp_path / "first")
    prepare((paths[1],), tmp_path / "whole", of, options)
    output, deaths, linked = tmp_path / "stopped", 0, set()
    while not (output / "dataset_info.json").exists():
        with monkeypatch.context() as patch:
            dies_at(patch, deaths)
            try:
                prepare((paths[1],), output, of, options)
            except Killed:
                deaths += 1
                linked.add(len([path for path in output.glob("*array_record*") if path.stat().st_nlink > 1]))
    assert deaths > 8 and len(linked) > 1
    assert digest(output) == digest(tmp_path / "whole") and digest(tmp_path / "first") == before
    assert prepare((paths[1],), output, of, options) == read_json(output / "statistics.json")


PLAIN = schema(sparse=(Sparse("c"), Sparse("l", separator="|", hotness=3)), timestamp="t")


def plain_text(rows: int = 150, separator: str = "|", day: str = "2024-01-01", delimiter: str = ",") -> str:
    lines = [f"{i % 2},{i},c{i % 7},a{i % 3}{separator}b,{day}" for i in range(rows)]
    return "\n".join(["label,x,c,l,t", *lines]).replace(",", delimiter) + "\n"


@pytest.fixture
def prepared(tmp_path):
    (tmp_path / "log.csv").write_text(plain_text())
    prepare((str(tmp_path / "log.csv"),), tmp_path / "first", PLAIN)
    return tmp_path / "first"


@pytest.mark.parametrize(
    ("text", "of", "says"),
    [
        (
            plain_text(delimiter=";"),
            PLAIN,
            r"columns are separated by ';', those of --extend=\S+ by ','; write",
        ),
        (
            plain_text(separator=";"),
            PLAIN,
            r"column l: none of the 150 new lists has two values, .* 2\.00 on",
        ),
        (
            plain_text(day="1704067200"),
            PLAIN,
            "column t is a number in 150 rows and a date in 150, which",
        ),
        ("", PLAIN, "is empty"),
        ("label,x,c,l,t\n", PLAIN, "no rows in"),
        (
            plain_text().replace(",2024", ",never"),
            PLAIN,
            r"no rows in .*; all were skipped, the first: .*'never-",
        ),
        (plain_text().replace("x", "y"), PLAIN, "has no column 'x'"),
        (
            plain_text(),
            schema(sparse=(Sparse("c", min_count=5), PLAIN.sparse[1]), timestamp="t"),
            r"--schema differs from that of --extend=\S+ \(now != then\): sparse\[0\]\.min_count: 5 != None; leave",
        ),
        (
            plain_text(),
            schema(sparse=(Sparse("c"), Sparse("l", separator=";", hotness=3)), timestamp="t"),
            r"sparse\[1\]\.separator: ';' != '\|'",
        ),
    ],
)
def test_a_log_that_does_not_fit_is_refused(prepared, tmp_path, text, of, says):
    (tmp_path / "new.csv").write_text(text)
    before = digest(prepared)
    with pytest.raises(ConfigError, match=says):
        prepare((str(tmp_path / "new.csv"),), tmp_path / "out", of, Options("skip_and_count", extend=prepared))
    assert digest(prepared) == before and not (tmp_path / "out" / "dataset_info.json").exists()


def test_a_dataset_that_cannot_grow_is_refused(prepared, tmp_path):
    log = (str(tmp_path / "log.csv"),)
    twice = prepare(log, tmp_path / "twice", PLAIN, Options(extend=prepared))
    assert "log.csv of 3,654 bytes was a file of the days before too; are its rows there twice?" in twice["notes"]

    def refuses(says: str, output: str = "out", extend: str = "first") -> None:
        with pytest.raises(ConfigError, match=says):
            prepare(log, tmp_path / output, PLAIN, Options(extend=tmp_path / extend))

    refuses("is the dataset of --extend, which stays as it is; name a new directory", output="first")
    refuses("lie one in the other; name a directory beside it", output="first/next")
    refuses("lie one in the other", output="")
    refuses("holds no prepared dataset; name the --output of a finished", extend="nowhere")
    (tmp_path / "half" / "staging").mkdir(parents=True)
    refuses("holds an unfinished preparation; run its command again first", extend="half")
    with pytest.raises(ConfigError, match="--refit has no effect without --extend"):
        Options(refit=True)
    shard = next(prepared.glob("*.array_record*"))
    content = shard.read_bytes()
    shard.unlink()
    refuses("is missing; prepare that dataset anew")
    shard.write_bytes(content)
    path = prepared / "counts" / "c.parquet"
    counts = path.read_bytes()
    path.write_bytes(counts[:-1] + b"?")
    refuses(r"counts/c\.parquet was changed: its SHA-256")
    path.write_bytes(counts)
    values = pq.read_table(prepared / "vocabularies" / "c.parquet")
    pq.write_table(values.slice(0, 5), prepared / "vocabularies" / "c.parquet")
    refuses(r"vocabularies/c\.parquet was changed")
    write_hashes(prepared, json.loads((prepared / "hashes.json").read_text())["splits"])
    refuses("the vocabulary of table 'c' has 5 values, where 7 have ids; a vocabulary must not shrink")
    (prepared / "hashes.json").unlink()
    refuses("prepared by an older version, which kept no counts to go on from; prepare it anew")


def test_a_transform_that_new_numbers_do_not_have_is_refused(tmp_path):
    of = schema(dense=(Dense("x", transform="torchrec_log"),))
    for name, least in (("a", 5), ("b", 3)):
        (tmp_path / f"{name}.csv").write_text(f"label,x,c\n0,{least},a\n1,9,b\n")
    paths = [str(tmp_path / f"{name}.csv") for name in "ab"]
    with pytest.raises(ConfigError, match=r"column x: its least number is 3, .* not defined at 3 and below; give"):
        grown(paths, tmp_path, of)
    (tmp_path / "again").mkdir()
    refitted = grown(paths, tmp_path / "again", of, refit=True)
    np.testing.assert_allclose(rows_of(refitted).dense_RxN[2:, 0], np.log([2, 8]), rtol=1e-6)
