"""Every type that Parquet keeps, in every role: rows, or one line that names the column. Never a traceback."""

import datetime
import decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats.column_types import plain, why_unusable
from dlrm_jax.data.infer.infer import infer
from dlrm_jax.data.prepare.preparation import Options, prepare
from dlrm_jax.data.schema.schema import Dense, Label, Sparse, Split
from tests.prepared_helpers import rows_of, schema

DAY = datetime.datetime(2024, 1, 2, 3, 4, 5)
VALUES = {
    "bool": (pa.bool_(), True),
    "int8": (pa.int8(), 1),
    "uint64": (pa.uint64(), 1),
    "half": (pa.float16(), 1.0),
    "float": (pa.float32(), 1.0),
    "double": (pa.float64(), 1.0),
    "decimal32": (pa.decimal32(5, 2), decimal.Decimal(1)),
    "decimal128": (pa.decimal128(10, 2), decimal.Decimal(1)),
    "decimal256": (pa.decimal256(50, 2), decimal.Decimal(1)),
    "date32": (pa.date32(), DAY.date()),
    "date64": (pa.date64(), DAY.date()),
    "time32": (pa.time32("s"), DAY.time()),
    "time64": (pa.time64("us"), DAY.time()),
    "timestamp": (pa.timestamp("us"), DAY),
    "timestamp_utc": (pa.timestamp("ms", "UTC"), DAY),
    "duration": (pa.duration("s"), datetime.timedelta(1)),
    "string": (pa.string(), "1"),
    "large_string": (pa.large_string(), "1"),
    "string_view": (pa.string_view(), "1"),
    "binary": (pa.binary(), b"1"),
    "large_binary": (pa.large_binary(), b"1"),
    "binary_view": (pa.binary_view(), b"1"),
    "fixed_binary": (pa.binary(1), b"1"),
    "null": (pa.null(), None),
    "dictionary": (pa.dictionary(pa.int8(), pa.string()), "1"),
    "struct": (pa.struct([("a", pa.int64())]), {"a": 1}),
    "map": (pa.map_(pa.string(), pa.int64()), [("a", 1)]),
    "uuid": (pa.uuid(), b"0" * 16),
}
LISTS = {
    f"list of {name}": (pa.list_(kind), [value, value]) for name, (kind, value) in VALUES.items() if name != "uuid"
}
LISTS |= {
    "large list": (pa.large_list(pa.string()), ["1", "2"]),
    "fixed list": (pa.list_(pa.int64(), 2), [1, 2]),
    "list view": (pa.list_view(pa.int64()), [1, 2]),
    "list of lists": (pa.list_(pa.list_(pa.int64())), [[1]]),
}
UNUSABLE = ("duration", "struct", "map", "uuid", "list of duration", "list of struct", "list of map", "list of lists")
UNUSABLE = (*UNUSABLE, "list of time32", "list of time64")
SPARSE = (
    {},
    {"hotness": 3},
    {"type": "int"},
    {"type": "hex"},
    {"type": "int", "ids": "raw"},
    {"ids": "hash", "size": 5},
    {"separator": "|", "hotness": 2},
    {"missing": "fill", "fill": "0"},
)


def roles():
    yield "label", schema(label=Label("v"), dense=())
    yield "label", schema(label=Label("v", positive=("1",)), dense=())
    yield "label", schema(label=Label("v", threshold=1.0), dense=())
    yield "dense", schema(dense=(Dense("v"),))
    yield "dense", schema(dense=(Dense("v", transform="standardise", missing="mean"),))
    yield "weight", schema(weight="v", dense=())
    yield "timestamp", schema(timestamp="v", split=Split("time"), dense=())
    yield "split", schema(split=Split("column", column="v"), dense=())
    for fields in SPARSE:
        yield "sparse", schema(sparse=(Sparse("v", **fields),), dense=())


def write(path, kind: pa.DataType, value) -> str:
    table = {"label": [0, 1, 0, 1], "c": list("abca"), "v": pa.array([value, value, None, value], kind)}
    pq.write_table(pa.table(table), path)
    return str(path)


@pytest.mark.parametrize("name", [*VALUES, *LISTS])
@pytest.mark.sample(10)
def test_any_type_in_any_role(tmp_path, name):
    path = write(tmp_path / "log.parquet", *(VALUES | LISTS)[name])
    for i, (role, of) in enumerate(roles()):
        for policy in ("error", "skip_and_count"):
            try:
                prepare((path,), tmp_path / f"{i}_{policy}", of, Options(on_bad_row=policy))
                error = ""
            except ConfigError as refused:
                error = str(refused)
            assert "\n" not in error
            must_be_refused = name in UNUSABLE or (role != "sparse" and name in (*LISTS, "time32", "time64"))
            assert (
                f"column v: holds {why_unusable(pq.read_schema(path).field('v').type, role)}; as {role}" in error
            ) == (must_be_refused)
            if error:
                assert any(words in error for words in ("column v", "label v", "no rows in"))


@pytest.mark.parametrize("name", [*VALUES, *LISTS])
def test_infer_leaves_out_what_it_cannot_read(tmp_path, name):
    found = infer((write(tmp_path / "log.parquet", *(VALUES | LISTS)[name]),))
    if name.startswith(("date", "timestamp")):
        assert found.timestamp == "v" and any("v is the timestamp" in reason for reason in found.reasons)
        return
    reasons = [reason for reason in found.reasons if reason.startswith("v: ")]
    assert len(reasons) == 1 and ("left out, holds" in reasons[0]) == (name in UNUSABLE)
    assert name not in UNUSABLE or [sparse.name for sparse in found.sparse] == ["c"]


@pytest.mark.parametrize("name", ["fixed list", "list view", "large list", "list of large_string", "list of binary"])
def test_lists_of_any_kind_are_bags(tmp_path, name):
    path = write(tmp_path / "log.parquet", *LISTS[name])
    prepare((path,), tmp_path / "out", schema(sparse=(Sparse("v", hotness=2),), dense=()))
    second = 0 if name in ("list of large_string", "list of binary") else 1
    assert rows_of(tmp_path / "out").ids_RxK.tolist() == [[0, second], [0, second], [-1, -1], [0, second]]


def test_a_boolean_label_is_right_under_infer(tmp_path):
    clicked = [i % 3 == 0 for i in range(60)]
    pq.write_table(pa.table({"click": clicked, "c": [f"v{i % 7}" for i in range(60)]}), tmp_path / "log.parquet")
    found = infer((str(tmp_path / "log.parquet"),))
    statistics = prepare((str(tmp_path / "log.parquet"),), tmp_path / "out", found)
    assert found.label == Label("click")
    assert sum(split["positives"] for split in statistics["splits"].values()) == 20


def test_the_first_column_may_hold_lists(tmp_path):
    tags = pa.array([["a", "b"], ["c"]] * 30)
    pq.write_table(pa.table({"tags": tags, "click": [0, 1] * 30}), tmp_path / "log.parquet")
    assert [s.name for s in infer((str(tmp_path / "log.parquet"),)).sparse] == ["tags"]


def test_two_columns_of_one_name_are_told(tmp_path):
    table = pa.table([pa.array([0, 1]), pa.array(["a", "b"]), pa.array(["a", "b"])], names=["click", "c", "c"])
    pq.write_table(table, tmp_path / "log.parquet")
    with pytest.raises(ConfigError, match="has two columns 'c'"):
        infer((str(tmp_path / "log.parquet"),))
    with pytest.raises(ConfigError, match="has two columns 'c'"):
        prepare((str(tmp_path / "log.parquet"),), tmp_path / "out", schema(label=Label("click"), dense=()))


def test_plain_arrays_are_not_copied():
    for array in (pa.array([1, 2]), pa.array(["a", None]), pa.array([["a"], None])):
        assert plain(array) is array


@pytest.mark.parametrize(("share", "left_out"), [(2, True), (200, False)])
def test_infer_leaves_out_bytes_that_are_no_text(tmp_path, share, left_out):
    """Of some damaged rows preparation names the first."""
    blob = pa.array([b"\xc8" if i % share == 1 else b"a" if i % 3 else b"b" for i in range(400)])
    table = pa.table({"click": [0, 1] * 200, "c": ["a", "b"] * 200, "blob": blob, "bytes": blob})
    pq.write_table(table, tmp_path / "log.parquet")
    found = infer((str(tmp_path / "log.parquet"),))
    assert [s.name for s in found.sparse] == (["c"] if left_out else ["c", "blob", "bytes"])
    assert any("blob: left out, byte 0xc8 is not UTF-8" in reason for reason in found.reasons) == left_out
    if left_out:
        prepare((str(tmp_path / "log.parquet"),), tmp_path / "out", found)
    else:
        with pytest.raises(
            ConfigError, match="row 1, column blob: byte 0xc8 is not UTF-8; mend the row or prepare"
        ) as error:
            prepare((str(tmp_path / "log.parquet"),), tmp_path / "out", found)
        assert "encoding" not in str(error.value)
