"""Training, judging, predicting and exporting from Python: equal to what the commands do, whatever the table's kind."""

import dataclasses
import json
import signal
import threading

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from absl import flags

import dlrm_jax
from dlrm_jax.api.frames import as_arrow, columns_of
from dlrm_jax.config import ConfigError
from dlrm_jax.data.read.prepared import open_prepared
from dlrm_jax.tables.plan import read_overrides
from tests.api.conftest import ROWS, SMALL
from tests.in_process import call, defined


def test_it_is_the_command_to_the_bit(run, tmp_path):
    texts = [f"--{name}={','.join(map(str, v)) if isinstance(v, list | tuple) else v}" for name, v in SMALL.items()]
    call("train", f"--data_dir={run.workdir}/data", f"--workdir={tmp_path}", "--log_every=4", *texts)
    result = json.loads((tmp_path / "result.json").read_text())
    for split in ("val", "test"):
        assert result[split] == run.result[split]
    again = dlrm_jax.Run(tmp_path)
    assert again.settings == run.settings and again.config.model == run.config.model
    for name in run.tables:
        np.testing.assert_array_equal(run.last.tables[name].rows(), again.last.tables[name].rows())


def test_curves_are_arrays(run):
    assert run.metrics["train"]["step"].tolist() == [4, 8] and run.metrics["val"]["auc"].dtype == np.float64
    assert run.metrics["val"]["auc"][-1] == run.result["val"]["auc"]
    assert len(run.plot(run.workdir / "c.svg").axes) == 2 and (run.workdir / "c.svg").stat().st_size > 1000


def test_the_same_call_again_is_done_at_once_and_other_settings_are_refused(run, frame):
    again = dlrm_jax.train(run.workdir / "data", run.workdir, progress=False, log_every=4, **SMALL)
    assert again.result["test"] == run.result["test"] and again.step == run.last.step
    with pytest.raises(ConfigError, match="holds another run"):
        dlrm_jax.train(run.workdir / "data", run.workdir, progress=False, **SMALL | {"seed": 3})
    with pytest.raises(ConfigError, match="holds a dataset prepared from something else"):
        dlrm_jax.train(frame[:400], run.workdir, progress=False, **SMALL)


def test_nothing_is_left_in_the_process_and_another_thread_may_train(run, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), set(flags.FLAGS)
    found = []
    settings = SMALL | {"num_steps": 4}
    thread = threading.Thread(
        target=lambda: found.append(dlrm_jax.train(run.workdir / "data", tmp_path / "a", progress=False, **settings))
    )
    thread.start()
    thread.join()
    here = dlrm_jax.train(run.workdir / "data", tmp_path / "b", progress=False, **settings)
    assert found[0].result["test"] == here.result["test"] != run.result["test"]
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), set(flags.FLAGS))


def test_raw_rows_are_scored_as_the_split_is_however_they_are_given(run, held_out):
    want = run.predict("test")
    forms = [held_out, as_arrow(held_out), held_out.to_dict("records")]
    forms.append({name: held_out[name].tolist() for name in held_out})
    for row in forms[2]:
        row["price"] = None if row["price"] != row["price"] else row["price"]
    for form in forms:
        np.testing.assert_allclose(run.predict(form), want, atol=1e-6)
    assert run.predict(held_out[:0]).shape == (0,) and run.predict(held_out[:1]).shape == (1,)


def test_an_export_predicts_the_same(run, held_out, tmp_path):
    model = run.export(tmp_path / "model")
    np.testing.assert_allclose(model.predict(held_out), run.predict(held_out), atol=1e-6)
    assert model.metrics["test"]["auc"] == pytest.approx(run.result["test"]["auc"], abs=1e-6)
    assert dlrm_jax.load(tmp_path / "model").version == 1 and set(model.columns) == {"price", "user", "item", "tags"}


def test_raw_rows_with_labels_are_judged_as_the_split_is(run, held_out):
    asked = {"slice_by": ["item", "price"], "group_by": "user", "max_slices": 4}
    split, table = run.evaluate("test", **asked), run.evaluate(held_out, **asked)
    assert split["auc"] == run.result["test"]["auc"] and "by item" in split.text
    assert repr({**split, "split": ""}) == repr({**table, "split": ""}), "NaN is not equal to itself"
    assert run.evaluate(held_out, compare=run)["comparison"]["auc"]["value"] == 0


@pytest.mark.parametrize("of", ["arrow", "numpy", "polars", "batch"])
def test_tables_of_every_kind_are_one_log(frame, run, tmp_path, of):
    frame = frame.drop(columns="tags")
    if of == "polars":
        given = pytest.importorskip("polars").from_pandas(frame)
    elif of == "numpy":
        given = {name: np.asarray(frame[name]) for name in frame}
    else:
        given = pa.Table.from_pandas(frame)
        given = given.to_batches()[0] if of == "batch" else given
    got = [dlrm_jax.prepare(table, tmp_path / str(i), progress=False) for i, table in enumerate((frame, given))]
    first, second = (open_prepared(one.directory).fingerprint() for one in got)
    assert first == second and got[0].tables == got[1].tables and len(got[1]) == ROWS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"], "nothing of the table is left"
    assert got[1].schema.name == dataclasses.replace(got[1].schema).name and "split" not in got[1].to_numpy()


def test_what_is_prepared_comes_out_as_tables(run, frame):
    prepared = dlrm_jax.load(run.workdir / "data")
    table = prepared.to_arrow("val")
    assert (
        table.column_names == ["row", "click", "price", "user", "item", "tags"] and len(table) == prepared.splits["val"]
    )
    here = prepared.to_pandas("val")
    assert (here["click"].to_numpy() == frame["click"].to_numpy()[here["row"]]).all()
    assert [len(bag) for bag in here["tags"]] == [len(bag) for bag in frame["tags"].iloc[here["row"]]]
    assert prepared.to_numpy("val")["user"].dtype == np.int32
    with pytest.raises(ConfigError, match="split is 'all'; choose one of train, val, test"):
        prepared.to_arrow("all")


def test_rows_of_tables_by_the_values_of_the_log(run, tmp_path):
    table = run.tables["user"]
    rows = table.rows()
    number = table.id_of("u7")
    np.testing.assert_array_equal(table["u7"], rows[number])
    assert table.values[number] == "u7" and "u7" in table and "u99" not in table and 3 in run.tables["item"]
    np.testing.assert_allclose(table.norms(), np.sqrt((rows**2).sum(axis=1)), rtol=1e-6)
    cosines = rows @ rows[number] / np.maximum(np.linalg.norm(rows, axis=1) * np.linalg.norm(rows[number]), 1e-30)
    order = [i for i in np.argsort(-cosines, kind="stable") if i != number and np.linalg.norm(rows[i]) > 0][:3]
    near = table.nearest("u7", 3)
    assert [value for value, _ in near] == [table.values[i] for i in order]
    np.testing.assert_allclose([cosine for _, cosine in near], cosines[order], atol=1e-6)
    assert table.nearest(rows[number], 1)[0][0] == "u7"
    saved = run.tables.save(tmp_path)
    assert [path.name for path in saved] == ["user.parquet", "item.parquet", "tags.parquet"]
    read = pd.read_parquet(saved[0])
    np.testing.assert_array_equal(np.stack(read["vector"]), rows)
    np.testing.assert_array_equal(np.load(table.save(tmp_path / "u.npy")), rows)
    for wrong, error in (("u99", KeyError), (10**6, KeyError)):
        with pytest.raises(error, match="training did not have it"):
            table[wrong]
    with pytest.raises(KeyError, match="there is no table 'users'; there are user, item, tags"):
        run.tables["users"]


WRONG = {
    "embeding_dim": (3, "Unknown command line flag 'embeding_dim'. Did you mean: embedding_dim ?"),
    "embedding_dim": ("x", "flag --embedding_dim=x: invalid literal for int() with base 10: 'x'"),
    "interaction": ("sum", "flag --interaction=sum: value should be one of <cat|cross|dot|"),
    "batch_size": (0, "batch_size is 0; it must be at least 1"),
    "class_weights": ([1, 3], "--class_weights=1.0,3.0 has no effect here: it is for --loss=wbce; leave it out"),
    "top_mlp": ({"a": 1}, "--top_mlp is {'a': 1}, which is no flag's value"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_the_line_of_the_command(run, tmp_path, name):
    value, words = WRONG[name]
    with pytest.raises(ConfigError) as ours:
        dlrm_jax.train(run.workdir / "data", tmp_path / "run", progress=False, **{name: value})
    assert str(ours.value).startswith(words) and "\n" not in str(ours.value) and not list(tmp_path.iterdir())
    if not isinstance(value, dict):
        text = ",".join(map(str, value)) if isinstance(value, list) else value
        with defined("train"), pytest.raises((ConfigError, flags.Error)) as theirs:
            call("train", f"--data_dir={run.workdir}/data", f"--workdir={tmp_path / 'run'}", f"--{name}={text}")
        assert str(theirs.value) == str(ours.value)


def test_what_cannot_be_is_one_line(run, held_out, tmp_path):
    data = run.workdir / "data"
    wrong = [
        (lambda: dlrm_jax.train(held_out), "workdir is missing; it says where the table is prepared"),
        (lambda: dlrm_jax.train(data, tmp_path, data_dir="x"), "data and data_dir both name the data"),
        (lambda: dlrm_jax.train(5, tmp_path), "data is int; give a prepared dataset"),
        (lambda: dlrm_jax.train(data, tmp_path, flagfile=tmp_path / "no"), "--flagfile: No such file or directory"),
        (
            lambda: dlrm_jax.prepare(held_out[:0], tmp_path / "d"),
            "the table has no rows; its columns are click, price",
        ),
        (lambda: dlrm_jax.prepare({"a": [1], "b": [1, 2]}, tmp_path / "d"), "the table cannot be read: "),
        (
            lambda: dlrm_jax.prepare(3, tmp_path / "d"),
            "input is int; give a table in memory, a file, or a list of files",
        ),
        (lambda: run.predict(held_out.drop(columns="price")), "the table has no column 'price'; it has click, user"),
        (lambda: run.predict([{"user": "u1"}]), "row 0: feature 'item' is missing"),
        (lambda: run.predict(held_out.assign(price="dear")), "row 0, feature 'price': 'dear' is not a number"),
        (lambda: run.predict(7), "rows are given as int; give a table in memory"),
        (lambda: run.predict("all"), "split is 'all'; choose one of"),
        (lambda: run.evaluate(held_out.drop(columns="click")), "the table has no column 'click'"),
        (lambda: run.evaluate(held_out.assign(click=3)), "row 0, column click: '3' is neither 0 nor 1"),
        (lambda: run.evaluate(held_out[:0]), "the table has no rows to evaluate"),
        (lambda: run.evaluate(slice_by="colour"), "--slice_by=colour: shop has no column 'colour'"),
        (lambda: run.evaluate(max_slices=4), "--max_slices=4 has no effect without --slice_by"),
        (lambda: dlrm_jax.load(tmp_path / "no"), f"{tmp_path / 'no'} is no directory"),
        (lambda: dlrm_jax.load(tmp_path), f"{tmp_path} holds no model version"),
        (lambda: dlrm_jax.Run(tmp_path), f"{tmp_path}/config.json does not exist"),
        (lambda: run.tables["user"].save("x.csv"), "x.csv: tables are saved as .parquet or .npy"),
    ]
    for ask, words in wrong:
        with pytest.raises(ValueError) as error:
            ask()
        assert str(error.value).startswith(words), (str(error.value), words)
        assert "\n" not in str(error.value)


def test_moments_decimals_and_lists_are_read_as_text_is():
    table = pa.table(
        {
            "when": pa.array([0, None], pa.timestamp("s")),
            "bag": pa.array([["a", "b"], None]),
            "number": pa.array([1.5, float("nan")]),
        }
    )
    assert columns_of(table, ("bag", "when", "number")) == [
        {"bag": ["a", "b"], "when": "1970-01-01 00:00:00", "number": 1.5},
        {"bag": None, "when": None, "number": None},
    ]


def test_a_plan_is_what_the_command_writes(run, tmp_path):
    asked = {"sharding": "row_wise", "batch_size": 64}
    plan = dlrm_jax.plan(run.workdir / "data", devices=4, hardware="h100", **asked)
    said = call(
        *("plan", f"--data_dir={run.workdir}/data", "--devices=4", "--hardware=h100", "--sharding=row_wise"),
        *("--batch_size=64", f"--json={tmp_path}/plan.json"),
    )
    assert said == f"{plan}\n" and json.loads((tmp_path / "plan.json").read_text()) == json.loads(plan.to_json())
    assert plan.fits and 0 < plan.step_seconds < 1 and plan.bytes_held > 0
    plan.to_json(tmp_path / "ours.json")
    assert dict(read_overrides(tmp_path / "ours.json"))["user"].sharding == "row_wise"
