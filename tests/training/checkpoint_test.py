"""Tests `dlrm_jax/training/checkpoint.py`."""

import asyncio
import contextlib
import os
import shutil
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore

from dlrm_jax.config import ConfigError, FeatureConfig, ModelConfig, TableConfig
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.tables import layout
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.tables.reshard import Kind
from dlrm_jax.training import checkpoint
from dlrm_jax.training.checkpoint import BEST, LATEST, Checkpoints
from dlrm_jax.training.placed import Placed, on_one_device
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


def writing(checkpoints, kind):
    return checkpoints._managers[kind].is_saving_in_progress()


def test_no_best_takes_the_place_of_the_one_that_a_latest_names_which_is_not_written_yet(tmp_path, monkeypatch):
    held = threading.Event()
    held_up(monkeypatch, LATEST, held)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(BEST, at_step(4), PLACED, {})
        checkpoints.save(LATEST, at_step(4), PLACED, {"best": 4})
        threading.Timer(0.5, held.set).start()
        checkpoints.save(BEST, at_step(8), PLACED, {})
        assert (tmp_path / "checkpoints" / LATEST / "4").exists()
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.step(LATEST), checkpoints.step(BEST)) == (4, 8)


def held_up(monkeypatch, kind, held):
    """Nothing of that kind gets into its place before `held` is set."""
    write = ocp.JsonCheckpointHandler._save_fn

    async def save(self, values, directory):
        if f"/{kind}/" in str(directory):
            while not held.is_set():
                await asyncio.sleep(0.01)
        await write(self, values, directory)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", save)


def test_the_latest_is_begun_beside_the_best_and_counts_after_it(tmp_path, monkeypatch):
    """A step at which both are due takes a training as long as two copies, not as long as a disk."""
    held, waiting = threading.Event(), threading.Event()
    held_up(monkeypatch, BEST, held)
    with Checkpoints(tmp_path) as checkpoints:
        best, latest = (checkpoints._managers[kind] for kind in (BEST, LATEST))
        checkpoints.save(BEST, at_step(4), PLACED, {})
        wait = best.wait_until_finished
        monkeypatch.setattr(best, "wait_until_finished", lambda: waiting.set() or wait())
        checkpoints.save(LATEST, at_step(4), PLACED, {"best": 4})
        while latest.is_saving_in_progress() and not waiting.is_set():
            time.sleep(0.01)
        in_place = (tmp_path / "checkpoints" / LATEST / "4").exists()
        held.set()
        assert waiting.is_set() and not in_place
        checkpoints.wait()
        assert checkpoints.find("latest") == (LATEST, 4) and checkpoints.record(LATEST)["best"] == 4


def test_without_the_best_there_is_no_latest_that_names_it(tmp_path, monkeypatch):
    async def save(self, values, directory):
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(LATEST, at_step(3), PLACED, {})
        checkpoints.wait()
        with monkeypatch.context() as full:
            full.setattr(ocp.JsonCheckpointHandler, "_save_fn", save)
            checkpoints.save(BEST, at_step(4), PLACED, {})
            for manager in checkpoints._managers.values():
                with contextlib.suppress(OSError):
                    manager.wait_until_finished()
        with pytest.raises(ConfigError, match=r"cannot write a checkpoint in .*No space left on device"):
            checkpoints.save(LATEST, at_step(4), PLACED, {"best": 4})
            checkpoints.wait()
    assert not (tmp_path / "checkpoints" / LATEST / "4").exists()


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
        while not (there := (tmp_path / "checkpoints" / LATEST / "3").exists()) and writing(checkpoints, LATEST):
            time.sleep(0.001)
        assert (tmp_path / "checkpoints" / BEST / "3").exists() or not there
        checkpoints.wait()


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(directory with one best checkpoint, placements that read it, what each reads): tables are most of its bytes."""
    tables = (TableConfig("t", 900, 8), TableConfig("u", 300, 8))
    config = ModelConfig(
        num_dense=3,
        tables=tables,
        features=(FeatureConfig("f", "t"), FeatureConfig("g", "u")),
        bottom_mlp=(8,),
        top_mlp=(1,),
    )
    one = on_one_device(config, optimizer("rowwise_adagrad", "adam"))
    mesh = MeshShape(1, 2)
    two = Placed(config, one.optimizer, make_plan(config, mesh, "row_wise"), make_mesh(mesh))
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(BEST, one.init_state(0), one, {"progress": {"best_value": 0.5}})
    return directory, (one, two), [read(directory, placed) for placed in (one, two)]


def read(directory, placed):
    with Checkpoints(directory, read_only=True) as checkpoints:
        return jax.tree.map(np.asarray, checkpoints.restore(BEST, placed)), checkpoints.record(BEST)


def require_equal_or_refused(directory, placed, good) -> str:
    """Whether a damaged checkpoint gives what the whole one gave, or one clear line."""
    try:
        state, record = read(directory, placed)
    except ConfigError as error:
        assert "\n" not in str(error) and f"cannot read checkpoint {directory}" in str(error)
        assert "move it away" in str(error)
        return "refused"
    jax.tree.map(np.testing.assert_array_equal, state, good[0])
    assert record == good[1]
    return "equal"


def test_a_flipped_byte_is_seen_under_every_plan(saved, tmp_path):
    """Of the bytes of a checkpoint most are weights; Orbax alone gives other weights without a word."""
    directory, placements, good = saved
    files = sorted(path for path in (directory / "checkpoints" / BEST / "0").rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in files])
    rng, found = np.random.default_rng(0), []
    for trial in range(16):
        copy = shutil.copytree(directory, tmp_path / str(trial))
        path = copy / files[rng.choice(len(files), p=sizes / sizes.sum())].relative_to(directory)
        flip(path, int(rng.integers(path.stat().st_size)), int(rng.integers(8)))
        found.append(require_equal_or_refused(copy, placements[trial % 2], good[trial % 2]))
    assert found.count("refused") >= 8


def test_a_zeroed_sector_is_seen_or_changes_nothing(saved, tmp_path):
    directory, placements, good = saved
    files = sorted(path for path in (directory / "checkpoints" / BEST / "0").rglob("*") if path.is_file())
    files = sorted(files, key=lambda path: path.stat().st_size)[-8:]
    found = []
    for trial, file in enumerate(files):
        copy = shutil.copytree(directory, tmp_path / str(trial))
        path = copy / file.relative_to(directory)
        with path.open("r+b") as opened:
            opened.seek(trial % 2 * 512)
            opened.write(bytes(min(512, path.stat().st_size - opened.tell())))
        found.append(require_equal_or_refused(copy, placements[trial % 2], good[trial % 2]))
    assert found.count("refused") >= 5, found


def test_damage_is_said_in_one_line_where_rows_are_read_one_after_the_other(saved, tmp_path):
    """As an export reads them."""
    directory, (one, _), _ = saved
    copy = shutil.copytree(directory, tmp_path / "copy")
    path = max((copy / "checkpoints" / BEST / "0" / "tables").rglob("*"), key=lambda path: path.stat().st_size)
    flip(path, path.stat().st_size // 2, 3)
    with Checkpoints(copy, read_only=True) as checkpoints:
        _, source = checkpoints.read_model(BEST, 0, one)
        with pytest.raises(ConfigError, match=r"cannot read checkpoint .*best/0: .*; move it away"):
            source.rows(Kind("tables", weights=False, per_row=False), "t", 0, 1, 900)


def flip(path, offset: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_any_file_may_be_missing_or_cut(saved, tmp_path, damage):
    directory, placements, good = saved
    files = [path for path in (directory / "checkpoints" / BEST / "0").rglob("*") if path.is_file()]
    found = []
    for i, path in enumerate(files):
        copy = shutil.copytree(directory, tmp_path / str(i))
        spoilt = copy / path.relative_to(directory)
        if damage == "deleted":
            spoilt.unlink()
        else:
            os.truncate(spoilt, spoilt.stat().st_size // 2)
        found.append(require_equal_or_refused(copy, placements[i % 2], good[i % 2]))
        shutil.rmtree(copy)
    assert found.count("refused") >= 5, found  # Most others are what Orbax notes beside the arrays.


@pytest.mark.parametrize("item", ["checksums", "dense", "record", "tables"])
def test_every_part_must_be_there(saved, tmp_path, item):
    directory, placements, good = saved
    copy = shutil.copytree(directory, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / BEST / "0" / item)
    assert require_equal_or_refused(copy, placements[0], good[0]) == "refused"


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
