"""Tests `dlrm_jax/training/checkpoint.py`."""

import os
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tensorstore

from dlrm_jax.config import ConfigError, FeatureConfig, ModelConfig, TableConfig
from dlrm_jax.tables import layout
from dlrm_jax.training import checkpoint
from dlrm_jax.training.checkpoint import BEST, LATEST, Checkpoints
from dlrm_jax.training.placed import on_one_device
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
    placed = on_one_device(
        ModelConfig(num_dense=13, tables=tables, features=features, bottom_mlp=(16,), top_mlp=(1,)),
        optimizer("rowwise_adagrad"),
    )
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
    config = ModelConfig(num_dense=13, tables=tables, features=features, bottom_mlp=(16,), top_mlp=(1,))
    with monkeypatch.context() as then, Checkpoints(tmp_path) as checkpoints:
        then.setattr(layout, "divisible_rows", lambda rows, pack=1: rows)
        then.setattr(checkpoint, "placement", lambda placed: {"plan": placed.plan.to_dict(), "packed": placed.packed})
        # A table's only slot had no name.
        old = on_one_device(config, optimizer("adagrad"))
        state = old.init_state(0)
        slots = {name: slots["sum"] + 2 for name, slots in state.table_opt_state.items()}
        state = state.replace(table_opt_state={name: {"sum": slot} for name, slot in slots.items()})
        checkpoints.save(LATEST, state.replace(table_opt_state=slots), old, {})
    placed = on_one_device(config, optimizer("adagrad"))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(LATEST, placed)
    slots = (restored.table_opt_state["stack_0"]["sum"], state.table_opt_state["stack_0"]["sum"])
    for now, before in ((restored.tables["stack_0"], state.tables["stack_0"]), slots):
        assert now.shape == (5_004, 16) and before.shape == (5_003, 16)
        np.testing.assert_array_equal(now[:5_003], before)


def test_two_latest_and_one_best_are_kept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(LATEST, at_step(step), PLACED, {})
            checkpoints.save(BEST, at_step(step), PLACED, {})
        checkpoints.wait()
        assert checkpoints.find("2") == (LATEST, 2) and checkpoints.find("best") == (BEST, 3)
        with pytest.raises(ConfigError, match=r"no checkpoint '1' in .* \(latest: 2, 3; best: 3\)"):
            checkpoints.find("1")


def test_a_best_of_a_run_that_went_back_takes_the_place_of_those_beyond_it(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step, value in ((5, 1.0), (3, 2.0), (3, 3.0)):
            state = at_step(step)
            tables = jax.tree.map(lambda x, value=value: 0 * x + value, state.tables)
            checkpoints.save(BEST, state.replace(tables=tables), PLACED, {})
            checkpoints.wait()
            assert checkpoints.find("best") == (BEST, step)
            assert set(np.unique(checkpoints.restore(BEST, PLACED).tables["stack_0"])) == {value}


def test_what_is_not_saved_is_an_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(LATEST, at_step(5), PLACED, {})
        with pytest.raises(ConfigError, match=r"that of step 3 was left out beside those there \(latest: 5;"):
            checkpoints.save(LATEST, at_step(3), PLACED, {})


def test_a_missing_best_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ConfigError, match=r"no best checkpoint in .*best: none"):
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


def test_a_checkpoint_without_checksums_is_read_and_said(tmp_path, monkeypatch, caplog):
    """As the commits before wrote them."""
    with Checkpoints(tmp_path) as checkpoints:
        manager = checkpoints._managers[LATEST]
        save = manager.save

        def without(step, args):
            items = {name: item for name, item in args.items() if name != "checksums"}
            return save(step, args=checkpoint.ocp.args.Composite(**items))

        monkeypatch.setattr(manager, "save", without)
        checkpoints.save(LATEST, at_step(3), PLACED, {})
    with Checkpoints(tmp_path) as checkpoints, caplog.at_level("WARNING", logger="dlrm_jax"):
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(LATEST, PLACED), at_step(3))
    assert "has no checksums" in caplog.text


def test_a_reader_touches_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(LATEST, at_step(5), PLACED, {})
    (tmp_path / "checkpoints" / BEST).rmdir()
    (tmp_path / "checkpoints" / LATEST / "9.orbax-checkpoint-tmp").mkdir()
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert int(checkpoints.restore(*checkpoints.find("latest")[:1], PLACED).step) == 5
        with pytest.raises(ConfigError, match=r"no checkpoint 'best' in .* \(latest: 5; best: none\)"):
            checkpoints.find("best")
    assert {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]} == before


def test_what_to_do_never_deletes_what_is_whole(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(LATEST, at_step(1), PLACED, {})
        checkpoints.save(LATEST, at_step(2), PLACED, {})
        checkpoints.save(BEST, at_step(2), PLACED, {})
    for kind in (LATEST, BEST):
        os.truncate(tmp_path / "checkpoints" / kind / "2" / "record" / "metadata", 3)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        with pytest.raises(ConfigError, match=r"latest/2: .*; move it away to fall back on that of step 1$"):
            checkpoints.restore(LATEST, PLACED)
        with pytest.raises(ConfigError, match=r"best/2: .*; move it away: .* --checkpoint=latest is still there$"):
            checkpoints.restore(BEST, PLACED)
    shutil.rmtree(tmp_path / "checkpoints" / LATEST / "1")
    with Checkpoints(tmp_path, read_only=True) as checkpoints, pytest.raises(ConfigError, match=r"copy .*best/2 into "):
        checkpoints.restore(LATEST, PLACED)


@pytest.mark.parametrize("table", ["adagrad", "sgd"])
def test_slots_without_names_are_read_under_the_plan_they_were_saved_under(tmp_path, monkeypatch, table):
    placed = on_one_device(tiny_model(), optimizer(table))
    state = placed.init_state(0)
    before = {name: slots["sum"] + 2 if slots else () for name, slots in state.table_opt_state.items()}
    with monkeypatch.context() as then, Checkpoints(tmp_path) as checkpoints:
        named = checkpoint.placement
        then.setattr(checkpoint, "placement", lambda placed: {k: v for k, v in named(placed).items() if k != "slots"})
        checkpoints.save(LATEST, state.replace(table_opt_state=before), placed, {})
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(LATEST, placed)
    assert restored.table_opt_state.keys() == state.table_opt_state.keys()
    for name, slots in restored.table_opt_state.items():
        assert slots.keys() == state.table_opt_state[name].keys()
        for slot in slots.values():
            np.testing.assert_array_equal(slot, before[name])


@pytest.mark.parametrize(("value", "fits"), [(0.0, True), (-1e-3, False), (np.nan, False), (np.inf, False)])
def test_a_slot_that_no_optimizer_keeps_is_refused(tmp_path, value, fits):
    placed = on_one_device(tiny_model(), optimizer("adagrad"))
    state = placed.init_state(0)
    slots = {"sum": state.table_opt_state["stack_0"]["sum"].at[3, 1].set(value)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(LATEST, state.replace(table_opt_state={"stack_0": slots}), placed, {})
    with Checkpoints(tmp_path) as checkpoints:
        if fits:
            checkpoints.restore(LATEST, placed)
            return
        with pytest.raises(ConfigError, match=r"table_opt_state\.stack_0\.sum .* holds NaN, infinity or a n"):
            checkpoints.restore(LATEST, placed)
