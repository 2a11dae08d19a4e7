"""An exported model: the same probabilities, in a process without the training code, and never a changed file."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from dlrm_jax.config import ConfigError, LossConfig
from dlrm_jax.serving import load
from dlrm_jax.serving.errors import BadRequest
from dlrm_jax.serving.store import open_version, versions, write_version
from dlrm_jax.state import TrainState
from dlrm_jax.step import make_eval_step
from tests.commands_test import run
from tests.helpers import ROOT, random_batch, tiny_model
from tests.serving_helpers import export_tiny, lively_state

MODELS = {
    "dot": {},
    "learned": {"learned_pooling": True},
    "cross": {"interaction": "cross", "cross_layers": 2, "cross_rank": 3},
    "cat": {"interaction": "cat"},
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


def test_batches_larger_than_any_executable_are_cut(tmp_path):
    model = tiny_model()
    export_tiny(tmp_path, model, loss=LossConfig(threshold=0.3))
    batch = random_batch(model, 50)
    want = in_training(model, lively_state(model), batch, LossConfig(threshold=0.3))
    got = load(tmp_path, batch_sizes=(8, 2)).predict(batch.dense_BxN, batch.ids_BxK)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert got.min() == np.float32(0.3) and len(load(tmp_path).predict(batch.dense_BxN[:0], batch.ids_BxK[:0])) == 0


@pytest.mark.parametrize(("kind", "atol"), [("bfloat16", 0.02), ("int8", 0.02), ("int4", 0.3)])
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
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment
    )
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
        ("{", "is not a manifest"),
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
