"""An export whose rules of raw values are not those of the preparation is not made."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from dlrm_jax.config import ConfigError, LossConfig
from dlrm_jax.data.prepare.first_rows import FIRST_ROWS, first_rows
from dlrm_jax.data.read.prepared import open_prepared
from dlrm_jax.data.read.raw_values import read_vocabulary
from dlrm_jax.data.schema.schema import Dense, Sparse
from dlrm_jax.serving import load
from dlrm_jax.serving.artifact import export, written
from dlrm_jax.serving.artifact.raw_check import require_as_prepared
from dlrm_jax.tables.by_name import named_tables
from tests.prepared_helpers import schema
from tests.serving.transform_test import prepared, without_label  # noqa: F401


@pytest.fixture
def again(prepared, tmp_path):  # noqa: F811
    """(copy of the prepared dataset, what exports a model of it)."""
    _, output, _, model, state = prepared
    copied = shutil.copytree(output, tmp_path / "data")
    (copied / "hashes.json").unlink()  # A byte that is changed is seen there first.

    def exported():
        tables = {name: np.asarray(table) for name, table in named_tables(model, state.tables)}
        arrays = (state.dense_params, export.of_arrays(tables))
        where = (tmp_path / "model", model, LossConfig(), *arrays, open_prepared(copied))
        return export.export_model(*where, evaluated=())

    return copied, exported


def test_the_logs_first_rows_are_kept_and_read_alike(prepared):  # noqa: F811
    rows, output, model_dir, *_ = prepared
    kept = json.loads((output / FIRST_ROWS).read_text())
    assert kept == [[i, {name: rows[i][name] for name in kept[0][1]}] for i in range(16)]
    served = load(model_dir)
    assert require_as_prepared(served.reader, served.signature, open_prepared(output)) == 16


def test_another_mean_is_not_exported(again):
    copied, exported = again
    exported()
    text = (copied / "statistics.json").read_text()
    mean = json.loads(text)["dense"]["standard"]["mean"]
    (copied / "statistics.json").write_text(text.replace(f'"mean": {mean!r}', f'"mean": {mean + 10!r}', 1))
    with pytest.raises(ConfigError, match="another value of 'standard' than in"):
        exported()
    assert [path.name for path in (copied.parent / "model").iterdir()] == ["1"]


def test_another_vocabulary_is_not_exported(again, monkeypatch):
    _, exported = again

    def turned(directory, schema, table):
        values = read_vocabulary(directory, schema, table)
        return values[::-1] if table == "filled" else values

    monkeypatch.setattr(written, "read_vocabulary", turned)
    with pytest.raises(ConfigError, match="another bag of 'filled' than in"):
        exported()


def test_rows_that_are_bad_without_types_and_datasets_of_before_are_left_out(prepared, tmp_path):  # noqa: F811
    rows, output, model_dir, *_ = prepared
    served, dataset = load(model_dir), open_prepared(output)
    copied = shutil.copytree(output, tmp_path / "data")
    (copied / "hashes.json").unlink()
    dataset = dataclasses.replace(dataset, directory=copied)
    kept = [[0, without_label(rows)[0]], [1, without_label(rows)[1] | {"slot": 1.5}], [10**6, {}]]
    (copied / FIRST_ROWS).write_text(json.dumps(kept))
    assert require_as_prepared(served.reader, served.signature, dataset) == 1
    (copied / FIRST_ROWS).unlink()
    assert require_as_prepared(served.reader, served.signature, dataset) == 0


@pytest.mark.parametrize(
    ("column", "numbers"),
    [
        (pa.array(["a", "x" * 2000, None, "b"]), [10, 12]),
        (pa.array([[1], [], None, [2]]), [10, 11, 12]),
        (pa.array([1.5, float("nan"), None, 2]), [10, 12]),
        (pa.array([2**30] * 4, pa.int32()).cast(pa.date32()), []),  # Python has no such dates.
        (pa.array([{"a": 1}] * 4), []),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_first_rows_are_kept_where_json_can_hold_them(column, numbers):
    arrays = {"d": pa.array(["1", "2", "3", "4"]), "c": column}
    kept = np.array([True, True, True, False])
    of = schema(dense=(Dense("d"),), sparse=(Sparse("c"),))
    found = first_rows(of, arrays, kept, np.arange(10, 14))
    assert [number for number, _ in found] == numbers
    assert all(row == {"d": arrays["d"][i - 10].as_py(), "c": column[i - 10].as_py()} for i, row in found)
