"""An exported model: the same probabilities, in a process without the training code, and never a changed file."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import types
import weakref

import jax
import numpy as np
import pytest

from dlrm_jax.api import exporting
from dlrm_jax.api.trained import open_stored
from dlrm_jax.config import ConfigError, LossConfig
from dlrm_jax.data.read.load import DataConfig
from dlrm_jax.data.read.pipeline import Cut
from dlrm_jax.serving import load
from dlrm_jax.serving.artifact import weights, written
from dlrm_jax.serving.artifact.errors import BadRequest
from dlrm_jax.serving.artifact.export import by_engine, by_the_program, export_model, of_arrays
from dlrm_jax.serving.artifact.placed import engine_maker
from dlrm_jax.serving.artifact.quantise import TABLE_TYPES, stored_table
from dlrm_jax.serving.artifact.store import open_version, versions, write_version
from dlrm_jax.tables import reshard
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.training import checkpoint
from dlrm_jax.training.evaluation import score_rows
from dlrm_jax.training.feed import Feed
from dlrm_jax.training.loop import train_and_evaluate
from dlrm_jax.training.options import ShardingOptions
from dlrm_jax.training.placed import on_one_device
from dlrm_jax.training.state import TrainState
from dlrm_jax.training.step import make_eval_step
from tests.forked import run
from tests.helpers import ROOT, random_batch, tiny_model
from tests.serving_helpers import export_tiny, lively_state, random_dataset
from tests.training.resume_test import CONFIG

MODELS = {
    "dot": {},
    "learned": {"learned_pooling": True},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One model, exported once."""
    model_dir = tmp_path_factory.mktemp("exported")
    export_tiny(model_dir, tiny_model())
    return model_dir


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(exported, tmp_path / "model")


def in_training(model, state: TrainState, batch, loss=None) -> np.ndarray:
    """What evaluation says of a batch."""
    return np.asarray(jax.jit(make_eval_step(model, loss or LossConfig()))(state, batch).prob_B)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_probabilities_are_those_of_training(tmp_path, changes):
    model = tiny_model(**changes)
    export_tiny(tmp_path, model)
    servable, state = load(tmp_path), lively_state(model)
    for size in (1, 16) if not changes else (16,):
        batch = random_batch(model, size, seed=size)
        want = in_training(model, state, batch)
        got = servable.predict(batch.dense_BxN, batch.ids_BxK)
        np.testing.assert_array_equal(got, want)
        part = servable.predict(batch.dense_BxN[:4], batch.ids_BxK[:4])
        np.testing.assert_allclose(part, want[:4], atol=1e-6)


@pytest.mark.exhaustive
def test_batches_larger_than_any_executable_are_cut(tmp_path):
    model = tiny_model()
    loss, state = LossConfig(threshold=0.3), lively_state(model)
    version = export_tiny(tmp_path, model, loss=loss)
    batch = random_batch(model, 50)
    want = in_training(model, state, batch, loss)
    got = load(tmp_path, batch_sizes=(8, 2)).predict(batch.dense_BxN, batch.ids_BxK)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert got.min() == np.float32(0.3) and len(load(tmp_path).predict(batch.dense_BxN[:0], batch.ids_BxK[:0])) == 0
    feed = Feed(random_dataset(model).splits["test"], Cut(200))
    in_evaluation = score_rows(feed, functools.partial(make_eval_step(model, loss), state))
    assert version.read_json("metrics.json")["test"] == pytest.approx(in_evaluation.compute(), rel=1e-6)


@pytest.mark.parametrize(("kind", "atol"), [("bfloat16", 0.02), ("int8", 0.02), ("int4", 0.3)])
@pytest.mark.sample(2)
def test_tables_in_few_bits_come_close(tmp_path, kind, atol):
    model = tiny_model()
    version = export_tiny(tmp_path, model, kind)
    batch = random_batch(model, 64)
    want = in_training(model, lively_state(model), batch)
    got = load(tmp_path).predict(batch.dense_BxN, batch.ids_BxK)
    assert 0 < np.abs(got - want).max() < atol
    on_disk = sum(path.stat().st_size - 128 for path in (version.directory / "tables").iterdir())
    assert on_disk == version.manifest["table_bytes"]


def test_it_loads_where_only_jax_and_numpy_are(exported):
    model = tiny_model()
    batch = random_batch(model, 4)
    blocked = ("flax", "optax", "orbax", "tensorflow_datasets", "tensorflow", "pyarrow", "absl", "yaml", "tqdm")
    script = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
import json
import dlrm_jax.serving
model = dlrm_jax.serving.load({str(exported)!r}, batch_sizes=(4,))
print(json.dumps(model.predict({batch.dense_BxN.tolist()}, {batch.ids_BxK.tolist()}).tolist()))
loaded = {{name.split(".")[0] for name in sys.modules}}
assert not loaded & set({blocked!r}), loaded & set({blocked!r})
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    np.testing.assert_array_equal(
        np.array(json.loads(finished.stdout), np.float32), in_training(model, lively_state(model), batch)
    )


def test_a_changed_a_short_and_a_missing_file_are_named(copied):
    for name in open_version(copied).manifest["files"]:
        path = copied / "1" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(ConfigError, match=f"{path.name} has {len(whole) - 1} bytes, not {len(whole)}"):
            open_version(copied)
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ConfigError, match=f"{path.name} was changed"):
            open_version(copied)
        path.unlink()
        with pytest.raises(ConfigError, match=f"{path.name} is missing"):
            open_version(copied)
        path.write_bytes(whole)
    open_version(copied)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not a whole file of JSON"),
        ("[]", "is not a manifest"),
        ('{"format_version": 9, "files": {}}', "has format version 9; this program reads 1"),
        ('{"format_version": 1, "files": {}}', "names no files"),
        ('{"format_version": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}}', "outside its directory"),
    ],
)
def test_a_wrong_manifest_is_refused(copied, text, words):
    (copied / "1" / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load(copied)


def test_versions_stand_side_by_side(tmp_path):
    model = tiny_model()
    for seed in range(2):
        assert export_tiny(tmp_path, model, seed=seed).number == seed + 1
    batch = random_batch(model, 4)
    for seed in range(2):
        want = in_training(model, lively_state(model, seed), batch)
        np.testing.assert_array_equal(load(tmp_path, seed + 1).predict(batch.dense_BxN, batch.ids_BxK), want)
    assert load(tmp_path).version.number == 2
    with pytest.raises(ConfigError, match="has no version 7; it has 1, 2"):
        load(tmp_path, 7)
    with pytest.raises(ConfigError, match="holds no model version"):
        load(tmp_path / "no")


def test_an_export_that_fails_leaves_nothing(tmp_path):
    def write(directory):
        (directory / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_version(tmp_path, write, {})
    assert versions(tmp_path) == [] and not list(tmp_path.iterdir())


def test_a_self_check_sees_other_weights(copied):
    servable = load(copied)
    assert servable.self_check() <= 1e-6
    noted = dict(np.load(copied / "1" / "self_check.npz"))
    np.savez(copied / "1" / "self_check.npz", **noted | {"probability": noted["probability"] + 0.1})
    with pytest.raises(ConfigError, match=r"probabilities differ by 0\.1"):
        servable.self_check()


@pytest.mark.parametrize(
    ("dense", "ids", "words"),
    [
        ([[0.0] * 2], [[0] * 7], r"dense has shape \[1, 2\]; expected \[rows, 3\]"),
        ([[0.0] * 3], [[0] * 6], r"ids has shape \[1, 6\]; expected \[rows, 7\]"),
        ([[0.0] * 3] * 2, [[0] * 7], "dense has 2 rows, ids 1"),
        ([[0.0] * 3], [[0.0] * 7], "they must be integers"),
        ([[0.0, np.nan, 0]], [[0] * 7], "dense, row 0, feature 'x1': nan is not a finite float32"),
        ([[0.0, 1e39, 0]], [[0] * 7], "dense, row 0, feature 'x1': inf is not a finite"),
        ([[0.0] * 3], [[0, 0, 0, 7, 0, 0, 0]], "row 0, feature 'history': id 7 is outside table 'item'"),
        ([[0.0] * 3], [[0, -2, 0, 0, 0, 0, 0]], "feature 'item': id -2 is outside"),
        ([[0.0] * 3], [[2**40, 0, 0, 0, 0, 0, 0]], "feature 'user': id 1099511627776 is outside"),
    ],
)
def test_bad_numbers_are_named(exported, dense, ids, words):
    with pytest.raises(BadRequest, match=words):
        load(exported).predict(dense, ids)


@pytest.mark.parametrize("kind", TABLE_TYPES)
def test_a_table_is_written_piece_by_piece(tmp_path, kind):
    """No two pieces need be there at once, and the files are those of the whole table."""
    model, alive = tiny_model(learned_pooling=True), []
    state = lively_state(model)
    tables = {name: np.asarray(rows) for name, rows in named_tables(model, state.tables)}

    def pieces(name: str):
        for first in range(0, len(tables[name]), 2):
            assert sum(piece() is not None for piece in alive) <= 1
            piece = tables[name][first : first + 2].copy()
            alive.append(weakref.ref(piece))
            yield piece

    arguments = (model, LossConfig(), state.dense_params)
    whole = export_model(tmp_path / "a", *arguments, of_arrays(tables), random_dataset(model), kind)
    parts = export_model(tmp_path / "b", *arguments, pieces, random_dataset(model), kind)
    assert len(alive) == 2 * (6 + 4 + 1)
    for name, facts in whole.manifest["files"].items():
        if name != "program.stablehlo":
            assert parts.manifest["files"][name] == facts, name
    rows = np.load(parts.directory / "tables/000_user.npy", allow_pickle=False)
    stored = stored_table(tables["user"], kind)
    np.testing.assert_array_equal(rows, stored.view(np.uint16) if kind == "bfloat16" else stored)


def test_large_arrays_reach_the_device_in_pieces_unchanged(tmp_path, monkeypatch):
    model = tiny_model()
    version = export_tiny(tmp_path, model)
    want = weights.read_weights(version)
    for num_bytes in (16, 48, 80):
        monkeypatch.setattr(weights, "_PIECE_BYTES", num_bytes)
        jax.tree.map(np.testing.assert_array_equal, weights.read_weights(version), want)


def test_a_row_that_is_not_finite_is_named_and_nothing_is_left(tmp_path):
    model = tiny_model()
    state = lively_state(model)
    tables = {name: np.array(rows) for name, rows in named_tables(model, state.tables)}
    tables["item"][5, 1] = np.nan
    data = random_dataset(model)
    with pytest.raises(ConfigError, match="table 'item' holds NaN or infinity, first in row 5; export another"):
        export_model(tmp_path, model, LossConfig(), state.dense_params, of_arrays(tables), data)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.sample(1)
def test_what_only_several_devices_hold_is_evaluated_on_them(tmp_path, kind):
    model = tiny_model()
    state, data = lively_state(model), random_dataset(model)
    tables = of_arrays({name: np.asarray(rows) for name, rows in named_tables(model, state.tables)})
    arguments = (model, LossConfig(), state.dense_params, tables, data, kind)
    one = export_model(tmp_path / "one", *arguments)
    make = engine_maker(ShardingOptions(sharding="row_wise", mesh="model:8"), 16384)
    many = export_model(tmp_path / "many", *arguments, make_score=by_engine(make))
    assert one.manifest["evaluated_on"] == "the exported program on one device"
    assert many.manifest["evaluated_on"].startswith("8 devices, which share the tables")
    for split in ("val", "test"):
        got, want = (version.read_json("metrics.json")[split] for version in (many, one))
        assert got["log_loss"] == pytest.approx(want["log_loss"], abs=1e-6) and got["num_samples"] == 200
    assert load(tmp_path / "many").self_check() < 1e-6
    for name in ("tables/000_user.npy", "signature.json", "weights.json"):
        assert many.manifest["files"][name] == one.manifest["files"][name]


def test_the_command_scores_on_several_devices_where_one_is_too_small(monkeypatch):
    gpu = types.SimpleNamespace(platform="gpu", device_kind="H100", memory_stats=lambda: {"bytes_limit": room})
    model = tiny_model()
    needed = 4 * 4 * (11 + 7 + 1)
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    room = needed
    assert exporting._make_score(model, "float32", "table 'user'", False) is by_the_program
    room = needed - 1
    assert exporting._make_score(model, "float32", "table 'user'", False) is not by_the_program
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(
        ConfigError, match=r"evaluating what is exported needs .* most of it is table 'user'; what would"
    ):
        exporting._make_score(model, "float32", "table 'user'", False)


@pytest.mark.parametrize("mesh", ["model:1", "data:2,model:4"])
@pytest.mark.sample(1)
def test_only_tables_are_read_of_a_checkpoint_and_by_pieces(tmp_path, monkeypatch, mesh):
    """Whatever plan it was saved under; of the optimizer's state nothing."""
    options = ShardingOptions(mesh=mesh, sharding="row_wise")
    config = dataclasses.replace(CONFIG, num_steps=5, sharding=options, data=DataConfig(num_examples=2000))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, learned_pooling=True))
    train_and_evaluate(config, tmp_path / "run")
    asked, read = [], reshard.Source.rows

    def rows(self, kind, table, first, step, count):
        asked.append((kind.group, count))
        return read(self, kind, table, first, step, count)

    monkeypatch.setattr(reshard.Source, "rows", rows)
    monkeypatch.setattr(written, "_PIECE_FLOATS", 400)
    run = open_stored(tmp_path / "run", "latest")
    got = {
        name: np.concatenate(list(exporting.pieces(run, name)))
        for table in run.model.tables
        for name in (table.name, table.name + "/pooling_weights")
    }
    assert {group for group, _ in asked} == {"tables"} and max(count for _, count in asked) <= 400
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
        state = checkpoints.restore(checkpoint.LATEST, on_one_device(run.model, config.optimizer))
    for name, want in named_tables(run.model, state.tables):
        np.testing.assert_array_equal(got[name], want)


@pytest.mark.end_to_end
def test_the_command_exports_what_training_evaluated(tmp_path):
    small = ["--num_examples=3000", "--batch_size=100", "--num_epochs=1", f"--workdir={tmp_path / 'run'}"]
    assert run("train", *small).returncode == 0
    finished = run("export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'models'}", "--tables=int8")
    assert finished.returncode == 0, finished.stderr
    facts = json.loads(finished.stdout.strip().splitlines()[-1])
    assert facts["version"] == 1 and facts["name"] == "planted"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    metrics = load(tmp_path / "models").metrics
    assert metrics["test"]["auc"] == pytest.approx(result["test"]["auc"], abs=2e-3)
    wrong = run("export", f"--workdir={tmp_path / 'no'}", f"--out={tmp_path / 'models'}")
    assert wrong.returncode == 1 and "config.json does not exist" in wrong.stderr and "Traceback" not in wrong.stderr


def write_x(directory):
    (directory / "x").write_text("x")


def test_two_exports_at_once_do_not_meet(tmp_path):
    """One begins and ends while the other is writing; what a killed one left goes."""
    killed = tmp_path / ".new-killed"
    killed.mkdir()

    def write(directory):
        write_x(directory)
        if not versions(tmp_path):
            assert write_version(tmp_path, write_x, {}).number == 1
        assert (directory / "x").exists()

    assert write_version(tmp_path, write, {}).number == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    assert [open_version(tmp_path, number).manifest["version"] for number in (1, 2)] == [1, 2]


def test_a_number_that_something_else_has_is_not_taken(tmp_path):
    (tmp_path / "7").write_text("a stray file")
    assert write_version(tmp_path, write_x, {}).number == 8


def test_the_newest_whole_version_is_read_and_others_are_said(copied, caplog):
    shutil.copytree(copied / "1", copied / "2")
    (copied / "2" / "signature.json").write_text("{}")
    (copied / "3").mkdir()
    shutil.copytree(copied / "1", copied / "7")
    (copied / "7" / "manifest.json").unlink()
    with caplog.at_level("WARNING", logger="dlrm_jax"):
        assert load(copied).version.number == 1
    for number, reason in ((7, "manifest.json is missing"), (3, "is missing"), (2, "signature.json has 2 bytes")):
        assert any(f"version {number} is not used, but 1" in text and reason in text for text in caplog.messages)
    with pytest.raises(ConfigError, match=r"7/manifest\.json is missing"):
        load(copied, 7)
    shutil.rmtree(copied / "1")
    with pytest.raises(ConfigError, match=r"none of the 3 versions in .* is whole: 7: .*; 3: .*; 2: "):
        load(copied)
