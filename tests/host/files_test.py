"""Tests `dlrm_jax/host/files.py`."""

import errno
import fcntl
import os
import pathlib
import subprocess
import sys

import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.host import files
from tests.helpers import ROOT

HOLD = """
import pathlib, sys
from dlrm_jax.host import files
with files.alone(pathlib.Path(sys.argv[1]), "another is at work"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_the_lock_goes_with_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LOCK_SECONDS", 0.0)
    path = tmp_path / files.LOCK
    assert not files.is_held(path) and not path.exists()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert files.is_held(path)
    with (
        pytest.raises(ConfigError, match=rf"another is at work \(process {holder.pid} on "),
        files.alone(path, "another is at work"),
    ):
        pass
    holder.kill()
    holder.wait()
    assert not files.is_held(path)
    with files.alone(path, "another is at work"):
        assert files.is_held(path)
    assert not files.is_held(path)


def test_a_lock_file_that_is_deleted_while_one_waits_for_it_holds_nobody(tmp_path, monkeypatch):
    path, lock, taken = tmp_path / files.LOCK, files._lock, []

    def after_the_holder_tidied_up(descriptor, seconds):
        if not taken:
            path.unlink()
        taken.append(descriptor)
        return lock(descriptor, seconds)

    monkeypatch.setattr(files, "_lock", after_the_holder_tidied_up)
    with files.alone(path, "another"):
        monkeypatch.undo()
        assert len(taken) == 2 and files.is_held(path)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level("WARNING", logger="dlrm_jax"), files.alone(tmp_path / "lock", "another"):
        assert "has no locks" in caplog.text
    assert files.try_lock_directory(tmp_path) is None
    with files.one_at_a_time(tmp_path):
        pass


BAD_FILES = {
    "dir": "is a directory",
    "missing/x.json": r"there is no directory .*missing; make it",
    "missing/deeper/x.json": r"there is no directory .*deeper; make it",
    "file/x.json": r"file is not a directory",
    "file/deeper/x.json": r"file is not a directory",
    "x" * 300: "cannot be written",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_an_output_file_that_cannot_be_is_named_with_its_flag(tmp_path, name):
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=BAD_FILES[name]) as raised:
        files.require_output_file("json", str(tmp_path / name))
    assert str(raised.value).startswith(f"--json={tmp_path / name}") and "Errno" not in str(raised.value)


def test_output_files_that_can_be(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("", None, "new.json", "./new.json", "file", str(tmp_path / "new"), "/dev/null"):
        files.require_output_file("json", name)
    assert not (tmp_path / "new.json").exists()


def test_an_output_directory_is_checked_without_being_made(tmp_path):
    (tmp_path / "file").touch()
    files.require_output_directory("out", tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    for name in ("file", "file/below", "file/below/deeper"):
        with pytest.raises(ConfigError, match=r"--out=.* must be a directory, but .*file is a file"):
            files.require_output_directory("out", tmp_path / name)


def test_no_permission_is_said(tmp_path, monkeypatch):
    """As somebody else: root may write everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"--json=.* may not be"):
        files.require_output_file("json", str(tmp_path / "x.json"))
    with pytest.raises(ConfigError, match=r"--out=.* may not be written"):
        files.require_output_directory("out", tmp_path / "x")
    (tmp_path / "token").touch()
    with pytest.raises(ConfigError, match=r"--token_file=.* may not be read"):
        files.require_input_file("token_file", str(tmp_path / "token"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_of_somebody_else(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match=r"--json=.*closed may not be written"):
        files.require_output_file("json", str(tmp_path / "closed" / "x.json"))


def test_input_files(tmp_path):
    files.require_input_file("token_file", "")
    with pytest.raises(ConfigError, match=r"--token_file=.*none does not exist"):
        files.require_input_file("token_file", str(pathlib.Path(tmp_path) / "none"))
    with pytest.raises(ConfigError, match=r"--token_file=.* is a directory"):
        files.require_input_file("token_file", str(tmp_path))


@pytest.mark.parametrize("alone", [True, False])
def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path, alone):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="half"), files.whole(path, alone) as temporary:
        temporary.write_text("ne")
        raise ValueError("half-way")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with files.whole(path, alone) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
