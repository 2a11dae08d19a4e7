"""Tests the raw log that a run names (`dlrm_jax/data/read/load.py`): prepared once, found again, never mixed up."""

import os
import pathlib

import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.prepare import staging
from dlrm_jax.data.prepare.bar import Bar
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.data.read.load import DataConfig, load_dataset
from tests.data.movielens_test import write_atomic


@pytest.fixture
def raw(tmp_path) -> pathlib.Path:
    (tmp_path / "raw").mkdir()
    return pathlib.Path(write_atomic(tmp_path / "raw"))


def opened(raw: pathlib.Path, **changes) -> Dataset:
    """The data of a run beside the raw log."""
    return load_dataset(DataConfig("movielens_100k", str(raw), **changes), workdir=raw.parent / "run")


def test_a_raw_log_is_prepared_once_and_found_again_where_the_log_was_moved(raw, monkeypatch):
    first = opened(raw)
    assert first.directory == raw.parent / "run" / "data" and first.schema["name"] == "movielens_100k"
    before = {path: path.stat().st_mtime_ns for path in first.directory.rglob("*")}
    moved = raw.rename(raw.parent / "elsewhere")
    first.directory.chmod(0o555)  # As who evaluates may not write there.
    assert opened(moved).fingerprint() == first.fingerprint()
    assert {path: path.stat().st_mtime_ns for path in first.directory.rglob("*")} == before


def test_a_changed_log_or_another_split_is_refused_until_the_data_is_deleted(raw):
    opened(raw)
    with pytest.raises(ConfigError, match=r"schema\.name: 'movielens_100k_time' != 'movielens_100k'"):
        opened(raw, split="time")
    with (raw / "ml-100k.inter").open("a") as file:
        file.write("1\t2\t5\t880000001\n")
    with pytest.raises(ConfigError, match=r"inputs\[0\]\.bytes: .* \(here: delete .*run/data, or choose another --wor"):
        opened(raw)
    for path in sorted((raw.parent / "run" / "data").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert sum(map(len, opened(raw).splits.values())) == 21


def test_a_command_without_a_workdir_says_that_it_needs_one(raw):
    with pytest.raises(ConfigError, match="is a raw log, which is prepared first: say in which --workdir"):
        load_dataset(DataConfig("movielens_100k", str(raw)))


@pytest.mark.parametrize("name", ["statistics.json", "movielens_100k-train.array_record-00000-of-00001"])
def test_a_damaged_cache_is_named_with_what_to_delete(raw, name):
    path = opened(raw).directory / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"prepare .*anew \(here: delete .*run/data, or choose another --workdir\)"):
        opened(raw)


def test_what_was_interrupted_goes_on(raw, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Bar, "show", interrupt)
        opened(raw)
    assert (raw.parent / "run" / "data" / "staging").is_dir()
    assert len(opened(raw).splits["train"]) == 16


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(raw, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(staging.os, "replace", full)
        with pytest.raises(ConfigError, match=r"cannot write .*: No space left .* the same command to go on$"):
            opened(raw)
    assert len(opened(raw).splits["train"]) == 16


def test_a_directory_that_may_not_be_written_is_said_before_the_log_is_read(raw):
    (raw.parent / "run").write_text("")
    with pytest.raises(ConfigError, match=r"--workdir=.*run must be a directory, but .*run is a file; name another"):
        opened(raw)
