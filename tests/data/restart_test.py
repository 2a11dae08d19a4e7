"""Stopping a preparation anywhere: what is finished is kept, and the bytes are those of a run left alone."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats import text_source
from dlrm_jax.data.prepare import preparation, staging
from dlrm_jax.data.prepare.preparation import Options, prepare
from dlrm_jax.data.read.prepared import is_prepared
from dlrm_jax.data.schema.schema import Dense, Sparse, Split
from tests.helpers import ROOT, until
from tests.prepared_helpers import digest, schema

LOG = schema(
    dense=(Dense("x", transform="standardise", missing="mean"),),
    sparse=(
        Sparse("c", min_count=2, oov=True, order="frequency"),
        Sparse("h", ids="hash", size=50),
        Sparse("n", type="int"),
    ),
    split=Split("random", val=0.2, test=0.2),
)


def write_log(path, num_rows: int = 12_000) -> str:
    lines = [f"{i % 2},{i % 97 or ''},value {i * i % 3001},key{i % 77},{i * 7 % 555}" for i in range(num_rows)]
    path.write_text("label,x,c,h,n\n" + "\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Many chunks, staged files and shards from a small log."""
    monkeypatch.setattr(text_source.TextSource.__init__, "__defaults__", (False, 10_000))
    monkeypatch.setattr("dlrm_jax.data.prepare.first_pass.CHUNKS_PER_FILE", 4)
    monkeypatch.setattr("dlrm_jax.data.prepare.runs.BLOCKS_PER_SHARD", 1)


class Killed(BaseException):
    """Stands for kill -9: nothing below may catch it to tidy up."""


def dies_at(monkeypatch, count: int) -> list[str]:
    """From now on the `count`-th file to be put into its place never is; the list receives the names that were."""
    done = []

    def dying(call):
        def put(source, target):
            if len(done) == count:
                raise Killed
            call(source, target)
            done.append(os.path.basename(target))

        return put

    for name in ("replace", "link"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    return done


def test_dying_before_each_file_changes_nothing(tmp_path, monkeypatch):
    """One directory, an attempt that dies before its first file, one before its second, and so on to the end."""
    log = write_log(tmp_path / "log.csv")
    prepare((log,), tmp_path / "whole", LOG)
    output, deaths = tmp_path / "stopped", 0
    while not is_prepared(output):
        with monkeypatch.context() as patch:
            dies_at(patch, deaths)
            try:
                prepare((log,), output, LOG)
            except Killed:
                deaths += 1
                assert not is_prepared(output)
    assert deaths >= 8
    assert digest(output) == digest(tmp_path / "whole")


@pytest.mark.parametrize("count", [0, 1, 2, 5, 9, 11, 14, 17, 20, 22, 24])
@pytest.mark.sample(5)
def test_dying_once_changes_nothing(tmp_path, monkeypatch, count):
    log = write_log(tmp_path / "log.csv")
    prepare((log,), tmp_path / "whole", LOG)
    with monkeypatch.context() as patch:
        dies_at(patch, count)
        with pytest.raises(Killed):
            prepare((log,), tmp_path / "out", LOG)
    prepare((log,), tmp_path / "out", LOG)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize(("count", "among"), [(9, "000001.rows"), (30, "log-train.array_record-00000-of-00002")])
def test_finished_files_are_not_made_again(tmp_path, monkeypatch, count, among):
    log = write_log(tmp_path / "log.csv")
    with monkeypatch.context() as patch:
        made = dies_at(patch, count)
        with pytest.raises(Killed):
            prepare((log,), tmp_path / "out", LOG)
    assert among in made
    with monkeypatch.context() as patch:
        again = dies_at(patch, 10_000)
        prepare((log,), tmp_path / "out", LOG)
    kept = {
        name
        for name in made
        if name.endswith((".rows", ".vocab")) or ("array_record" in name and f"{name}.json" in made)
    }
    assert kept and not kept & set(again), "these were finished already"


SCRIPT = """
import sys
from dlrm_jax.data.formats import text_source
from dlrm_jax.data.prepare import first_pass, runs
text_source.TextSource.__init__.__defaults__ = (False, 10_000)
first_pass.CHUNKS_PER_FILE, runs.BLOCKS_PER_SHARD = 4, 1
from tests.data.restart_test import LOG
from dlrm_jax.data.prepare.preparation import Options, prepare
import pathlib
log, extend, output, called = map(pathlib.Path, sys.argv[1:])
called.touch()
prepare((str(log),), output, LOG, Options(extend=extend))
"""


def test_kill_minus_nine_at_any_time(tmp_path):
    """Of a dataset that grows, which does all that a new one does, and links what was there."""
    log, grows = write_log(tmp_path / "log.csv", 40_000), Options(extend=tmp_path / "first")
    prepare((write_log(tmp_path / "first.csv", 10_000),), tmp_path / "first", LOG)
    before = digest(tmp_path / "first")
    prepare((log,), tmp_path / "whole", LOG, grows)
    output, kills = tmp_path / "killed", 0
    for attempt in range(14):
        # Counted from the call, not from the start of the process: imports take seconds on a busy machine.
        called = tmp_path / f"called_{attempt}"
        paths = map(str, (log, tmp_path / "first", output, called))
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, *paths], cwd=ROOT)
        until(called.exists, process)
        time.sleep(0.1 * 2.2**attempt)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if is_prepared(output) and not (output / "staging").exists():
            break
    assert kills >= 2
    prepare((log,), output, LOG, grows)
    assert digest(output) == digest(tmp_path / "whole") and digest(tmp_path / "first") == before


def test_dying_while_tidying_up_leaves_a_finished_dataset(tmp_path, monkeypatch):
    log = write_log(tmp_path / "log.csv")
    with monkeypatch.context() as patch:
        patch.setattr(preparation.shutil, "rmtree", lambda path: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            prepare((log,), tmp_path / "out", LOG)
    prepare((log,), tmp_path / "out", LOG)
    prepare((log,), tmp_path / "whole", LOG)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_second_run_does_nothing_and_other_settings_are_refused(tmp_path):
    log = write_log(tmp_path / "log.csv")
    first = prepare((log,), tmp_path / "out", LOG)
    before = digest(tmp_path / "out")
    assert prepare((log,), tmp_path / "out", LOG) == first
    assert digest(tmp_path / "out") == before
    with pytest.raises(ConfigError, match=r"prepared from something else .*compression: 'zstd' != 'none'"):
        prepare((log,), tmp_path / "out", LOG, Options(compression="zstd"))


def stop_after_some_files(log: str, output, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        dies_at(patch, 5)
        with pytest.raises(Killed):
            prepare((log,), output, LOG)


def test_another_log_does_not_continue_a_stopped_preparation(tmp_path, monkeypatch):
    stop_after_some_files(write_log(tmp_path / "log.csv"), tmp_path / "out", monkeypatch)
    other = write_log(tmp_path / "other.csv")
    with pytest.raises(ConfigError, match=r"unfinished preparation of something else .*other\.csv.*delete it"):
        prepare((other,), tmp_path / "out", LOG)


def test_a_log_that_was_mended_begins_anew(tmp_path, monkeypatch):
    log = write_log(tmp_path / "log.csv")
    stop_after_some_files(log, tmp_path / "out", monkeypatch)
    write_log(tmp_path / "log.csv", 11_000)
    prepare((log,), tmp_path / "out", LOG)
    prepare((log,), tmp_path / "whole", LOG)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_skipping_after_an_error_goes_on(tmp_path):
    """As the error's text advises: what was staged before the bad row is kept."""
    log = write_log(tmp_path / "log.csv")
    with open(log, "a") as file:
        file.write("7,bad,row\n")
    with pytest.raises(ConfigError, match="--on_bad_row=skip_and_count"):
        prepare((log,), tmp_path / "out", LOG)
    first = tmp_path / "out" / "staging" / "000000.rows"
    written = first.stat().st_mtime_ns
    os.utime(first, ns=(written, 12345))
    kept = []
    prepare(
        (log,),
        tmp_path / "out",
        LOG,
        Options("skip_and_count"),
        lambda _: kept.append(first.exists() and first.stat().st_mtime_ns),
    )
    assert kept[0] == 12345
    prepare((log,), tmp_path / "whole", LOG, Options("skip_and_count"))
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_an_unfinished_or_foreign_directory_is_not_taken_for_a_dataset(tmp_path, monkeypatch):
    log = write_log(tmp_path / "log.csv")
    with monkeypatch.context() as patch:
        dies_at(patch, 12)
        with pytest.raises(Killed):
            prepare((log,), tmp_path / "out", LOG)
    assert not is_prepared(tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"not empty \(it holds thesis\.txt\)"):
        prepare((log,), tmp_path / "mine", LOG)
    with pytest.raises(ConfigError, match="is a file"):
        prepare((log,), tmp_path / "log.csv", LOG)


def test_two_preparations_in_one_directory(tmp_path):
    log = write_log(tmp_path / "log.csv")
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another preparation is running"):
            prepare((log,), tmp_path / "out", LOG)
    prepare((log,), tmp_path / "out", LOG)


@pytest.mark.parametrize("same", [True, False])
def test_a_dataset_that_another_finishes_after_the_first_look_is_left_as_it_is(tmp_path, monkeypatch, same):
    mine, theirs = write_log(tmp_path / "mine.csv", 3000), write_log(tmp_path / "theirs.csv", 4000)
    look, out = preparation._require_usable, tmp_path / "out"

    def look_and_be_overtaken(output):
        look(output)
        monkeypatch.undo()
        prepare((theirs,), output, LOG)

    monkeypatch.setattr(preparation, "_require_usable", look_and_be_overtaken)
    if same:
        assert prepare((theirs,), out, LOG)["splits"]
    else:
        with pytest.raises(ConfigError, match="holds a dataset prepared from something else"):
            prepare((mine,), out, LOG)
    prepare((theirs,), tmp_path / "whole", LOG)
    assert digest(out) == digest(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    log = write_log(tmp_path / "log.csv")
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(staging.pa, "OSFile", full)
        with pytest.raises(ConfigError, match=r"cannot write .*: No space left on device; .* run the same command"):
            prepare((log,), tmp_path / "out", LOG)
    prepare((log,), tmp_path / "out", LOG)
    assert is_prepared(tmp_path / "out")
