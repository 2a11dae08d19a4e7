"""The latest checkpoint is written beside the best one that it names, and counts after it (commit_order.py)."""

import asyncio
import contextlib
import os
import threading
import time

import orbax.checkpoint as ocp
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.training.checkpoint import BEST, LATEST, Checkpoints
from tests.training.checkpoint_test import PLACED, at_step


def held_up(monkeypatch, kind, held):
    """Nothing of that kind gets into its place before `held` is set."""
    write = ocp.JsonCheckpointHandler._save_fn

    async def save(self, values, directory):
        if f"/{kind}/" in str(directory):
            while not held.is_set():
                await asyncio.sleep(0.01)
        await write(self, values, directory)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", save)


def writing(checkpoints, kind):
    return checkpoints._managers[kind].is_saving_in_progress()


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
