"""Random corruption of input files: always a clear error or a counted skip, never a traceback or a wrong number."""

import csv
import gzip
import io
import pathlib
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats import text_source
from dlrm_jax.data.infer.infer import infer
from dlrm_jax.data.prepare.preparation import Options, prepare
from dlrm_jax.data.read.prepared import open_prepared, read_json
from dlrm_jax.data.schema.schema import Dense, Sparse
from tests.data.formats_test import as_csv, as_json, as_parquet
from tests.prepared_helpers import rows_of, schema

pytestmark = pytest.mark.slow

LOG = schema(dense=(Dense("x", fill=-1),), sparse=(Sparse("c"), Sparse("tags", separator="|", hotness=2)))
BASES = {
    "log.csv": as_csv(),
    "log.jsonl": as_json(),
    "log.parquet": as_parquet(),
    "log.csv.gz": gzip.compress(as_csv()),
}
EDIT = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "double", "end"]), st.floats(0, 1), st.binary(min_size=1, max_size=12)
)


def corrupt(data: bytes, edits: list) -> bytes:
    for kind, where, what in edits:
        at = int(where * len(data))
        if kind == "flip":
            data = (
                data[:at]
                + bytes(byte ^ other for byte, other in zip(data[at:], what, strict=False))
                + data[at + len(what) :]
            )
        elif kind == "cut":
            data = data[:at] + data[at + len(what) * 5 :]
        elif kind == "insert":
            data = data[:at] + what + data[at:]
        elif kind == "double":
            data = data[:at] + data[at : at + 40] + data[at:]
        else:
            data = data[:at]
    return data


def attempt(name: str, data: bytes, policy: str, chunk_bytes: int, of=LOG) -> tuple[str, dict | None]:
    """(error text or "", statistics): prepared in a folder of its own."""
    defaults = text_source.TextSource.__init__.__defaults__
    text_source.TextSource.__init__.__defaults__ = (False, chunk_bytes)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / name
            path.write_bytes(data)
            try:
                found = infer((str(path),)) if of is None else of
                prepare((str(path),), pathlib.Path(folder) / "out", found, Options(on_bad_row=policy))
            except ConfigError as error:
                return str(error), None
            output = pathlib.Path(folder) / "out"
            statistics = read_json(output / "statistics.json")
            dataset = open_prepared(output)
            for split, source in dataset.splits.items():
                if len(source):
                    rows = rows_of(output, split)  # Checks that every id is inside its table.
                    assert set(rows.label_R.tolist()) <= {0.0, 1.0}
            return "", statistics
    finally:
        text_source.TextSource.__init__.__defaults__ = defaults


@pytest.mark.parametrize("name", BASES)
@given(edits=st.lists(EDIT, min_size=1, max_size=4), chunk_bytes=st.sampled_from([100, 1 << 20]))
@settings(max_examples=50, deadline=5000, suppress_health_check=list(HealthCheck))
@pytest.mark.sample(2)
def test_corrupted_files(name, edits, chunk_bytes):
    data = corrupt(BASES[name], edits)
    error, strict = attempt(name, data, "error", chunk_bytes)
    assert "\n" not in error and (not error or name.split(".")[0] in error)
    lenient_error, lenient = attempt(name, data, "skip_and_count", chunk_bytes)
    if strict is not None:
        assert lenient is not None and lenient["skipped"]["rows"] == 0
        assert lenient["splits"] == strict["splits"]
    elif lenient is not None:
        assert lenient["skipped"]["rows"] > 0 and lenient["skipped"]["examples"]
    else:
        assert "\n" not in lenient_error


@given(edits=st.lists(EDIT, max_size=3), name=st.sampled_from(sorted(BASES)))
@settings(max_examples=50, deadline=5000, suppress_health_check=list(HealthCheck))
def test_guessing_a_corrupted_file(edits, name):
    error, _ = attempt(name, corrupt(BASES[name], edits), "skip_and_count", 1 << 20, of=None)
    assert "\n" not in error


@given(st.binary(max_size=400))
@settings(max_examples=60, deadline=5000, suppress_health_check=list(HealthCheck))
def test_any_bytes(data):
    for of in (LOG, None):
        error, statistics = attempt("log.csv", b"label,x,c,tags\n" + data, "skip_and_count", 64, of)
        assert error or statistics


CELL = st.text(st.characters(codec="utf8", exclude_characters="\r\x00"), max_size=12)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(-5, 99), CELL), min_size=1, max_size=40), st.integers(16, 300))
@settings(max_examples=80, deadline=5000, suppress_health_check=list(HealthCheck))
def test_any_text_survives(rows, chunk_bytes):
    """Python's csv writes and is the oracle; cells may hold delimiters, quotes and line breaks."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("label", "x", "c"))
    writer.writerows(rows)
    defaults = text_source.TextSource.__init__.__defaults__
    text_source.TextSource.__init__.__defaults__ = (False, chunk_bytes)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path, output = pathlib.Path(folder) / "log.csv", pathlib.Path(folder) / "out"
            path.write_bytes(out.getvalue().encode())
            prepare((str(path),), output, schema())
            read = rows_of(output)
    finally:
        text_source.TextSource.__init__.__defaults__ = defaults
    plain: dict[str, int] = {}
    assert read.ids_RxK[:, 0].tolist() == [
        -1 if cell == "" else plain.setdefault(cell, len(plain)) for _, _, cell in rows
    ]
    assert read.label_R.tolist() == [label for label, _, _ in rows]
    assert read.dense_RxN[:, 0].tolist() == [x for _, x, _ in rows]
