"""What is wrong with a log is said in one line: file, line, column, value; or skipped and counted. Never guessed."""

import gzip
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats import text_source
from dlrm_jax.data.infer.infer import infer
from dlrm_jax.data.prepare.preparation import Options, prepare
from dlrm_jax.data.read.prepared import read_json
from dlrm_jax.data.schema.presets import PRESETS
from dlrm_jax.data.schema.schema import Dense, Label, Sparse, Split
from tests.data.preparation_test import kaggle_text
from tests.prepared_helpers import prepare_text, rows_of, schema

GOOD = ["0,1,a", "1,2,b", "0,3,c"]
LOG = schema(sparse=(Sparse("c"),))
HEX = schema(sparse=(Sparse("c", type="hex"),))
RAW = schema(sparse=(Sparse("c", type="int", ids="raw", size=10),))

CASES = [
    (LOG, "0,1", "line 4: 2 columns; expected 3"),
    (LOG, "0,1,a,b", "line 4: 4 columns; expected 3"),
    (LOG, "2,1,a", "line 4, column label: '2' is neither 0 nor 1"),
    (LOG, "x,1,a", "line 4, column label: 'x' is not a number"),
    (LOG, ",1,a", "line 4, column label: is missing"),
    (LOG, "0,one,a", "line 4, column x: 'one' is not a finite number"),
    (LOG, "0,1_0,a", "line 4, column x: '1_0' is not a finite number"),
    (LOG, "0,inf,a", "line 4, column x: 'inf' is not a finite number"),
    (LOG, "0,1e999,a", "line 4, column x: '1e999' is not a finite number"),
    (LOG, "0,1e39,a", "line 4, column x: '1e39' has no finite float32 under none"),
    (schema(dense=(Dense("x", transform="nvidia_log"),)), "0,-3,a", "'-3' has no finite float32 under nvidia_log"),
    (schema(dense=(Dense("x", transform="standardise"),)), "0,1e200,a", "line 4, column x: '1e200' is beyond 1e+30"),
    (schema(sparse=(Sparse("c", missing="error"),)), "0,1,", "line 4, column c: is missing"),
    (HEX, "0,1,zz", "line 4, column c: 'zz' is not a hexadecimal number"),
    (HEX, "0,1,12345678901234567", "line 4, column c: '12345678901234567' is not a hexadecimal number"),
    (RAW, "0,1,1.5", "line 4, column c: '1.5' is not a whole number"),
    (RAW, "0,1,99999999999999999999", "is not a whole number"),
    (RAW, "0,1,-1", "line 4, column c: '-1' is outside the table's ids 0 to 9"),
    (RAW, "0,1,10", "line 4, column c: '10' is outside the table's ids 0 to 9"),
    (schema(split=Split("column", column="c")), "0,1,exam", "'exam' is none of train, val, test"),
    (schema(timestamp="c", split=Split("time")), "0,1,someday", "'someday' is neither a number nor a date"),
    (schema(weight="c"), "0,1,-2", "column c: '-2' is not a weight of at least 0"),
    (schema(weight="c"), "0,1,", "is not a weight of at least 0"),
    (LOG, b"0,1,\xff", "line 4: byte 0xff is not UTF-8"),
    (LOG, f"0,{'y' * 500},a", f"column x: '{'y' * 80}' is not"),
]


def log_with(bad: str | bytes, position: int = 2) -> bytes:
    good = {"exam": "train", "someday": "5", "-2": "1"}
    text = bad if isinstance(bad, bytes) else bad.encode()
    lines = [line.encode() for line in GOOD]
    value = bad.rsplit(",", 1)[-1] if isinstance(bad, str) else ""
    if value in good or (value in ("",) and bad == "0,1,"):
        lines = [line[:-1] + good.get(value, "1").encode() for line in lines]
    elif value[-1:].isdigit() or value in ("zz", "1.5"):
        lines = [line.replace(b"a", b"1").replace(b"b", b"2").replace(b"c", b"3") for line in lines]
    lines.insert(position, text)
    return b"label,x,c\n" + b"\n".join(lines) + b"\n"


@pytest.mark.parametrize("chunk_bytes", [20, 1 << 20])
@pytest.mark.parametrize(("log", "bad", "words"), CASES)
def test_bad_row_names_file_line_column_and_value(tmp_path, monkeypatch, log, bad, words, chunk_bytes):
    monkeypatch.setattr(text_source.TextSource.__init__, "__defaults__", (False, chunk_bytes))
    with pytest.raises(ConfigError) as error:
        prepare_text(tmp_path, log_with(bad), log)
    assert words in str(error.value) and "log.csv, line 4" in str(error.value)
    assert "--on_bad_row=skip_and_count" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("chunk_bytes", [20, 1 << 20])
@pytest.mark.parametrize(("log", "bad", "words"), CASES)
def test_bad_row_is_skipped_and_counted(tmp_path, monkeypatch, log, bad, words, chunk_bytes):
    monkeypatch.setattr(text_source.TextSource.__init__, "__defaults__", (False, chunk_bytes))
    output = prepare_text(tmp_path, log_with(bad), log, on_bad_row="skip_and_count")
    skipped = read_json(output / "statistics.json")["skipped"]
    assert skipped["rows"] == 1 and list(skipped["reasons"].values()) == [1]
    assert words in skipped["examples"][0]
    if log.split.by == "files":
        rows = rows_of(output)
        assert rows.row_R.tolist() == [0, 1, 3] and rows.dense_RxN[:, 0].shape == (3,)
        assert ((rows.ids_RxK != -1).all() and "vocabularies" in "".join(map(str, output.iterdir()))) or log is RAW


def test_what_only_skipped_rows_hold_enters_no_vocabulary(tmp_path):
    text = "label,x,c\n0,1,a\n7,1,poison\n1,1,b\n0,nope,a|poison\n"
    log = schema(sparse=(Sparse("c", separator="|", hotness=2),))
    output = prepare_text(tmp_path, text, log, on_bad_row="skip_and_count")
    assert pq.read_table(output / "vocabularies" / "c.parquet")["value"].to_pylist() == ["a", "b"]


def test_skipped_rows_do_not_count_as_first_appearance(tmp_path):
    output = prepare_text(tmp_path, "label,x,c\n9,1,a\n0,1,b\n1,1,a\n", LOG, on_bad_row="skip_and_count")
    assert rows_of(output).ids_RxK[:, 0].tolist() == [0, 1]
    assert pq.read_table(output / "vocabularies" / "c.parquet")["value"].to_pylist() == ["b", "a"]


@pytest.mark.parametrize("value", ["zz", "0g", "-1"])
def test_hex_digits_are_looked_at_where_all_have_one_length(tmp_path, value):
    with pytest.raises(ConfigError, match=f"line 3, column c: '{value}' is not a hexadecimal number"):
        prepare_text(tmp_path, f"label,x,c\n0,1,ab\n0,1,{value}\n0,1,cd\n", HEX)


def test_line_numbers_count_headers_blank_lines_and_quoted_breaks(tmp_path):
    text = 'label,x,c\n0,1,"two\nlines"\n\n1,1,b\n0,bad,c\n'
    with pytest.raises(ConfigError, match="line 6, column x: 'bad'"):
        prepare_text(tmp_path, text, LOG)


def test_the_first_bad_row_of_the_log_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(text_source.TextSource.__init__, "__defaults__", (False, 200))
    lines = [f"0,{'bad' if i in (311, 500) else i},c{i % 9}" for i in range(600)]
    with pytest.raises(ConfigError, match="line 313, column x: 'bad'"):
        prepare_text(tmp_path, "label,x,c\n" + "\n".join(lines) + "\n", LOG)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("a,b\n1,2\n", "has no column 'label'; it has a, b"),
        ("label,x,c\n", "no rows in"),
        ("label,x,c\nbad,1,a\n", "'bad' is not a number"),
    ],
)
def test_useless_files(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        prepare_text(tmp_path, text, LOG)
    assert words in str(error.value) and "log.csv" in str(error.value)


def test_nothing_left_after_skipping(tmp_path):
    with pytest.raises(ConfigError, match="no rows in"):
        prepare_text(tmp_path, "label,x,c\nbad,1,a\n", LOG, on_bad_row="skip_and_count")


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["gz", "zst", "bz2"])
def test_a_truncated_archive_is_an_error_even_when_skipping(tmp_path, kind, keep):
    path = tmp_path / f"log.csv.{kind}"
    text = ("label,x,c\n" + "\n".join(f"0,{i * i % 1009},value{i * 31 % 977}" for i in range(20_000)) + "\n").encode()
    if kind == "gz":
        path.write_bytes(gzip.compress(text))
    else:
        with pa.output_stream(str(path), compression={"zst": "zstd", "bz2": "bz2"}[kind]) as stream:
            stream.write(text)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    for policy in ("error", "skip_and_count"):
        with pytest.raises(ConfigError, match=f"log.csv.{kind}"):
            prepare_text_file(path, tmp_path / f"out_{policy}", policy)


def prepare_text_file(path, output, policy: str) -> None:
    from dlrm_jax.data.prepare.preparation import Options

    prepare((str(path),), output, LOG, Options(on_bad_row=policy))


def test_damaged_parquet_and_json(tmp_path):
    pq.write_table(pa.table({"label": [0, 1], "x": [1, 2], "c": ["a", "b"]}), tmp_path / "log.parquet")
    data = (tmp_path / "log.parquet").read_bytes()
    (tmp_path / "log.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=r"log\.parquet"):
        prepare((str(tmp_path / "log.parquet"),), tmp_path / "out", LOG)
    shutil.rmtree(tmp_path / "out")
    lines = [json.dumps({"label": 0, "x": 1, "c": "a"}), "[1]", "{", json.dumps({"label": 1, "c": "\ud800"})]
    for i in range(1, 4):
        with pytest.raises(ConfigError, match=r"log\.jsonl, line 2: not a JSON object"):
            prepare_text(tmp_path, lines[0] + "\n" + lines[i] + "\n", LOG, name="log.jsonl")
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("type_", ["string", "large_string", "binary", "large_binary", "list"])
def test_text_in_parquet_that_is_no_utf8_names_its_row(tmp_path, type_):
    raw = pa.array([b"a", b"b", b"\xf8q", None, b"c"], pa.binary())
    texts = raw.view(pa.string())
    column = {
        "string": texts,
        "large_string": pa.array([b"a", b"b", b"\xf8q", None, b"c"], pa.large_binary()).view(pa.large_string()),
        "binary": raw,
        "large_binary": pa.array([b"a", b"b", b"\xf8q", None, b"c"], pa.large_binary()),
        "list": pa.ListArray.from_arrays(pa.array([0, 1, 2, 3, 4, 5]), texts),
    }[type_]
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"label": [0, 1, 0, 1, 0], "x": [1, 2, 3, 4, 5], "c": column}), path)
    log = schema(sparse=(Sparse("c", hotness=2 if type_ == "list" else 1),))
    with pytest.raises(ConfigError, match=r"log\.parquet, row 2, column c: byte 0xf8 is not UTF-8"):
        prepare((str(path),), tmp_path / "out", log)
    prepare((str(path),), tmp_path / "out", log, Options(on_bad_row="skip_and_count"))
    statistics = read_json(tmp_path / "out" / "statistics.json")
    assert statistics["skipped"]["rows"] == 1 and statistics["splits"]["train"]["rows"] == 4
    infer((str(path),))


def test_a_bad_value_in_parquet_names_its_row(tmp_path):
    pq.write_table(pa.table({"label": [0, 1, 5], "x": [1, 2, 3], "c": ["a", "b", "c"]}), tmp_path / "log.parquet")
    with pytest.raises(ConfigError, match=r"log\.parquet, row 2, column label: '5' is neither 0 nor 1"):
        prepare((str(tmp_path / "log.parquet"),), tmp_path / "out", LOG)


def test_a_record_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dlrm_jax.data.formats.text_source.MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(text_source.TextSource.__init__, "__defaults__", (False, 500))
    with pytest.raises(ConfigError, match="a record does not end within"):
        prepare_text(tmp_path, 'label,x,c\n0,1,"' + "endless\n" * 1000, LOG)


def test_criteo_rows_with_missing_and_broken_columns(tmp_path):
    text = kaggle_text(30).splitlines()
    text[11] = text[11].replace("\t", " ", 1)
    with pytest.raises(ConfigError, match="line 12: 39 columns; expected 40"):
        prepare_text(tmp_path, "\n".join(text), PRESETS["criteo_kaggle"][1](), name="train.txt")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Dense("x", transform="sqrt"), "transform is 'sqrt'; choose one of"),
        (lambda: Sparse("c", ids="hash"), "needs size"),
        (lambda: Sparse("c", ids="raw"), "needs type: int or hex"),
        (lambda: Sparse("c", size=5), "leave size out"),
        (lambda: Sparse("c", min_count=2, ids="hash", size=5), "min_count needs ids: vocabulary"),
        (lambda: Sparse("c", fill="0"), "fill needs missing: fill"),
        (lambda: Sparse("c", type="int", missing="fill", fill="x"), "fill 'x' is not of type int"),
        (lambda: Sparse("c", hotness=0), "hotness is 0; at least 1"),
        (lambda: Dense("x", transform="nvidia_log", missing="mean"), "does not go with"),
        (lambda: schema(sparse=()), "no sparse column"),
        (lambda: schema(sparse=(Sparse("x"),)), "repeated: x"),
        (lambda: schema(split=Split("time")), "needs the schema's timestamp"),
        (lambda: Split("random", val=0.5, test=0.5), "something for train"),
        (lambda: schema(sparse=(Sparse("a", table="t"), Sparse("b", table="t", oov=True))), "share table 't'"),
        (lambda: schema(name="My Log"), "lower_case"),
        (lambda: Label("y", positive=("1",), threshold=3.0), "not both"),
        (lambda: schema(header=False), "columns must name"),
    ],
)
def test_schemas_that_cannot_be(make, words):
    with pytest.raises(ConfigError) as error:
        make()
    assert words in str(error.value)
