"""Tests `dlrm_jax/checkpoint.py`."""

import os
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tensorstore

from dlrm_jax import checkpoint
from dlrm_jax.checkpoint import BEST, LATEST, Checkpoints
from dlrm_jax.config import ConfigError, FeatureConfig, ModelConfig, TableConfig
from dlrm_jax.sharding import storage
from dlrm_jax.sharding.placed import on_one_device
from tests.helpers import optimizer, tiny_model

PLACED = on_one_device(tiny_model(learned_pooling=True), optimizer("adagrad", "adam"))


def at_step(step: int):
    return PLACED.init_state(0).replace(step=jax.numpy.int32(step))


def test_everything_comes_back_bit_by_bit(tmp_path):
    state = at_step(7)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(LATEST, state, PLACED, {"progress": {"best_value": 0.5}})
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(LATEST, PLACED)
        assert checkpoints.record(LATEST)["progress"] == {"best_value": 0.5}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    state = at_step(1)
    expected = {name: np.array(table) for name, table in state.tables.items()}
    double = jax.jit(lambda s: s.replace(tables=jax.tree.map(lambda x: 2 * x, s.tables)), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(LATEST, state, PLACED, {})
        jax.block_until_ready(double(state))
        checkpoints.wait()
        restored = checkpoints.restore(LATEST, PLACED)
    for name in expected:
        np.testing.assert_array_equal(restored.tables[name], expected[name])


def test_a_table_of_a_prime_number_of_rows_is_stored_in_large_pieces(tmp_path):
    """Orbax's pieces divide an array evenly; a piece a row would take hours and all of the memory."""
    tables, features = (TableConfig("t", 300_007, 16),), (FeatureConfig("f", "t"),)
    placed = on_one_device(ModelConfig(13, tables, features, (16,), (1,)), optimizer("rowwise_adagrad"))
    state = placed.init_state(0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(LATEST, state, placed, {})
        checkpoints.wait()
        restored = checkpoints.restore(LATEST, placed)
    np.testing.assert_array_equal(restored.tables["stack_0"], state.tables["stack_0"])
    base = f"file://{tmp_path}/checkpoints/{LATEST}/0/tables/"
    stored = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": "tables.stack_0/"}}
    rows, columns = tensorstore.open(stored, read=True, open=True).result().chunk_layout.read_chunk.shape
    assert rows > 100_000 and columns == 16


def test_a_checkpoint_of_before_rows_had_divisors_comes_back(tmp_path, monkeypatch):
    tables, features = (TableConfig("t", 5_003, 16),), (FeatureConfig("f", "t"),)
    config = ModelConfig(13, tables, features, (16,), (1,))
    with monkeypatch.context() as then, Checkpoints(tmp_path) as checkpoints:
        then.setattr(storage, "divisible_rows", lambda rows, pack=1: rows)
        then.setattr(checkpoint, "placement", lambda placed: {"plan": placed.plan.to_dict(), "packed": placed.packed})
        old = on_one_device(config, optimizer("adagrad"))
        state = old.init_state(0)
        checkpoints.save(LATEST, state, old, {})
    placed = on_one_device(config, optimizer("adagrad"))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(LATEST, placed)
    for now, before in ((restored.tables, state.tables), (restored.table_opt_state, state.table_opt_state)):
        assert now["stack_0"].shape == (5_004, 16) and before["stack_0"].shape == (5_003, 16)
        np.testing.assert_array_equal(now["stack_0"][:5_003], before["stack_0"])


def test_two_latest_and_one_best_are_kept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(LATEST, at_step(step), PLACED, {})
            checkpoints.save(BEST, at_step(step), PLACED, {})
        checkpoints.wait()
        assert checkpoints.find("2") == (LATEST, 2) and checkpoints.find("best") == (BEST, 3)
        with pytest.raises(ConfigError, match=r"no checkpoint '1' in .* \(latest: 2, 3; best: 3\)"):
            checkpoints.find("1")


def test_the_latest_checkpoint_never_names_a_best_one_that_is_not_written(tmp_path, monkeypatch):
    """Whoever is killed right after LATEST appeared must find the BEST that its record speaks of."""
    rename = os.rename

    def slow_for_best(source, target):
        if BEST in str(target):
            time.sleep(1.0)
        rename(source, target)

    monkeypatch.setattr(os, "rename", slow_for_best)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(BEST, at_step(3), PLACED, {})
        checkpoints.save(LATEST, at_step(3), PLACED, {"progress": {"best_step": 3}})
        assert (tmp_path / "checkpoints" / BEST / "3").exists()


def test_a_missing_best_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ConfigError, match=r"no best checkpoint in .*best"):
        checkpoints.restore(BEST, PLACED)


def test_none_yet(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.step(LATEST) is None
        with pytest.raises(ConfigError, match="latest: none; best: none"):
            checkpoints.find("best")


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(LATEST, at_step(5), PLACED, {})
    leftover = tmp_path / "checkpoints" / LATEST / "9.orbax-checkpoint-tmp"
    leftover.mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.step(LATEST) == 5
    assert not leftover.exists()


@pytest.mark.parametrize("part", ["dense", "tables"])
def test_a_damaged_checkpoint_is_named(tmp_path, part):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(LATEST, at_step(5), PLACED, {})
    for path in (tmp_path / "checkpoints" / LATEST / "5" / part).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ConfigError, match=r"cannot read checkpoint .*latest/5"):
        checkpoints.restore(LATEST, PLACED)


def test_a_full_disk_is_one_clear_error_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(LATEST, at_step(1), PLACED, {})
        checkpoints.wait()
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
        with pytest.raises(ConfigError, match=r"no space for a checkpoint of 0\.0 MB in .*0\.0 MB free"):
            checkpoints.save(LATEST, at_step(2), PLACED, {})
        assert checkpoints.step(LATEST) == 1


def test_a_write_that_fails_is_one_clear_error(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: no space\nand a stack trace")

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._managers[LATEST], "save", fail)
        with pytest.raises(ConfigError, match=r"cannot write a checkpoint in .*RESOURCE_EXHAUSTED: no space; the last"):
            checkpoints.save(LATEST, at_step(2), PLACED, {})
