"""Several processes as one run: equal results, written once; one that stops, stops all."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.schema.presets import PRESETS
from dlrm_jax.host.processes import join
from tests.data.preparation_test import kaggle_text
from tests.helpers import ROOT, has_logged, until
from tests.prepared_helpers import prepare_text
from tests.serving.publish_onto_test import assert_newest_is_an_export, parents

FLAGS = {
    **{"num_examples": 2000, "embedding_dim": 4, "bottom_mlp": "8,4", "top_mlp": "8,1", "batch_size": 64},
    **{"table_optimizer": "rowwise_adagrad", "dense_optimizer": "adam", "learning_rate": 0.01},
    **{"checkpoint_every": 10, "log_every": 10, "sharding": "row_wise", "patience": 0},
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(command: list[str], devices: int) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def train(workdir, num_processes: int, devices: int, differing: tuple = ((), ()), **flags) -> list[subprocess.Popen]:
    """Processes that train together, each with its own flags of `differing` besides."""
    flags = {**FLAGS, "num_steps": 60, "eval_every": 20, "workdir": workdir, **flags}
    command = [sys.executable, "-m", "dlrm_jax.train", *(f"--{name}={value}" for name, value in flags.items())]
    together = [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={num_processes}"]
    each = [[*together, f"--process_id={i}", *differing[i]] for i in range(num_processes)]
    return [start([*command, *flags_of_one], devices) for flags_of_one in each]


def outputs(running: list[subprocess.Popen]) -> list[str]:
    try:
        return [process.communicate()[0] for process in running]
    finally:
        for process in running:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    "shardings",
    [
        ("mix",),
        pytest.param(("row_wise", "data_parallel", "table_wise"), marks=pytest.mark.exhaustive),
        pytest.param(("table_row_wise", "column_wise"), marks=pytest.mark.exhaustive),
    ],
)
def test_every_placement_on_two_processes_equals_one_device(shardings):
    devices = 2
    port = str(free_port())
    command = [sys.executable, "-m", "tests.one_of_several", port]
    running = [start([*command, str(i), "2", str(devices), *shardings], devices) for i in range(2)]
    texts = outputs(running)
    assert [process.returncode for process in running] == [0, 0], texts
    assert all(text.count("equals one device") == len(shardings) + 1 for text in texts)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("together")
    running = train(workdir, 2, 2, publish=workdir / "live", publish_every=9, publish_tables="bfloat16")
    texts = outputs(running)
    assert [process.returncode for process in running] == [0, 0], texts
    return workdir, texts


@pytest.mark.slow
@pytest.mark.end_to_end
def test_two_processes_write_once_and_equal_one(tmp_path, together):
    workdir, texts = together
    assert "results, curves and checkpoints are in" in texts[0]
    assert "val auc" in texts[0] and "val auc" not in texts[1] and "results" not in texts[1]
    (alone,) = train(tmp_path, 1, 4)
    assert alone.communicate() and alone.returncode == 0
    ours, theirs = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (workdir, tmp_path)
    )
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    losses = [np.array([line["loss"] for line in lines]) for lines in (ours, theirs)]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.end_to_end
def test_two_processes_publish_what_both_of_them_have(tmp_path, together):
    """Each holds half of the rows of every table, and marks what its half of each batch names."""
    workdir, texts = together
    published = [line for line in texts[0].splitlines() if "published version" in line]
    assert "version 1, step 9: whole" in published[0] and "published" not in texts[1]
    assert parents(workdir / "live") == [None, *range(1, 7)] and len(published) == 7
    assert all("rows that changed" in line for line in published[1:])
    assert_newest_is_an_export(workdir / "live", workdir, tmp_path, tables="bfloat16")


@pytest.mark.slow
@pytest.mark.end_to_end
def test_a_signal_to_one_stops_all_at_one_step_and_the_same_command_goes_on(tmp_path, together):
    running = train(tmp_path, 2, 2, num_steps=100_000, eval_every=100_000)
    until(lambda: has_logged(tmp_path, 50), *running)
    running[1].send_signal(signal.SIGTERM)
    texts = outputs(running)
    assert [process.returncode for process in running] == [143, 143], texts
    stops = {line for text in texts for line in text.splitlines() if line.startswith("stopped by SIGTERM at step")}
    assert len(stops) == 1
    step = int(stops.pop().split("step ")[1].split(";")[0])
    running = train(tmp_path, 2, 2, num_steps=step + 10, eval_every=100_000)
    texts = outputs(running)
    assert [process.returncode for process in running] == [0, 0], texts
    assert f"resumed at step {step}" in texts[0]


@pytest.mark.slow
@pytest.mark.end_to_end
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.sample(1)
@pytest.mark.exhaustive
def test_one_that_dies_ends_the_other_with_a_message_and_the_run_goes_on_later(tmp_path, victim):
    running = train(tmp_path, 2, 2, num_steps=100_000, eval_every=100_000)
    until(lambda: has_logged(tmp_path, 50), *running)
    running[victim].kill()
    text = running[1 - victim].communicate()[0]
    assert running[1 - victim].returncode not in (0, None)
    assert "another task died" in text or "UNAVAILABLE" in text or "error: process" in text
    if victim == 0:
        return  # What is on disk is the same, whoever died: going on is shown once.
    # It may have gone on a while: fewer steps than it has done would be refused.
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    running = train(tmp_path, 2, 2, num_steps=json.loads(lines[-2])["step"] + 30)
    texts = outputs(running)
    assert [process.returncode for process in running] == [0, 0], texts
    assert "resumed at step" in texts[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("host:1", 2, -1), "go together"), (("", 2, 0), "go together"), (("host:1", 2, 2), "process_id=2 is not below")],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(ConfigError, match=message):
        join(*flags)


JOIN = """
import sys
from dlrm_jax.host import processes
processes.JOIN_SECONDS = int(sys.argv[4])
try:
    processes.join(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), {"batch_size": 64})
    processes.agree("data", {"fingerprint": sys.argv[5]})
    print("agreed")
except processes.Disagreement as error:
    print(error)
"""


def joining(*of_each: tuple[int, int, str], seconds: int = 600) -> list[str]:
    """What processes print that join by (number of processes, number, fingerprint of data), all at one address."""
    command = [sys.executable, "-c", JOIN, f"127.0.0.1:{free_port()}"]
    return outputs([start([*command, str(n), str(i), str(seconds), data], 1) for n, i, data in of_each])


def test_processes_with_equal_settings_go_on():
    assert joining((2, 0, "a"), (2, 1, "a")) == ["agreed\n", "agreed\n"]


@pytest.mark.parametrize(
    ("second", "says"),
    [((3, 1, "a"), "flags .* num_processes: 2 != 3"), ((2, 1, "b"), "data .* fingerprint: 'a' != 'b'")],
)
def test_processes_with_other_settings_say_so_each_in_one_line(second, says):
    texts = joining((2, 0, "a"), second)
    assert texts[0] == texts[1] and texts[0].count("\n") == 1
    assert re.match(f"the processes have different {says}; start all with the same", texts[0])


RAW = """
import logging, pathlib, sys
from dlrm_jax.data.read.load import DataConfig, load_dataset
from dlrm_jax.host import processes

logging.basicConfig(format="%(message)s", level=logging.INFO)
processes.join(sys.argv[1], 2, int(sys.argv[2]))
try:
    print(load_dataset(DataConfig("criteo_kaggle", sys.argv[3]), workdir=pathlib.Path(sys.argv[4])).fingerprint())
except processes.Disagreement as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("bad_row", "place", "says"),
    [
        ("", "no", "[0-9a-f]{8}"),
        ("x\n", "no", r".*train\.txt, line 301: 1 columns; .*"),
        ("", "out", "the processes have different data_dir .*: prepared: False != True; start all with the same"),
    ],
)
@pytest.mark.sample(1)
def test_the_first_process_prepares_a_raw_log_and_the_others_wait_for_how_it_ends(tmp_path, bad_row, place, says):
    """The second has no log of its own to look at; one that has prepared data would wait in vain."""
    if place == "out":
        prepare_text(tmp_path, kaggle_text(50), PRESETS["criteo_kaggle"][1]())
    (tmp_path / "train.txt").write_text(kaggle_text(300) + bad_row)
    command = [sys.executable, "-c", RAW, f"127.0.0.1:{free_port()}"]
    running = [
        start([*command, str(i), str(where), f"{tmp_path}/run"], 1)
        for i, where in enumerate((tmp_path, tmp_path / place))
    ]
    first, second = outputs(running)
    assert (f"preparing {tmp_path} in {tmp_path}/run/data\n" in first) == (place == "no") and "preparing" not in second
    assert first.splitlines()[-1] == second.splitlines()[-1] and re.fullmatch(says, second.splitlines()[-1])
    assert [process.returncode for process in running] == [0, 0]


@pytest.mark.parametrize("number", [0, 1])
def test_one_that_waits_in_vain_for_another_ends_in_one_line(number):
    """JAX aborts when its own wait is over, with a stack of C++ and no word of what was missing."""
    (text,) = joining((2, number, ""), seconds=1)
    assert text.startswith("error: the processes did not find each other (--coordinator_address=127.0.0.1:")
    assert f"--num_processes=2 --process_id={number}): not all came within 1 s; start each" in text
    assert text.count("\n") == 1


@pytest.mark.slow
@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("flag", "says"), [("batch_size", "flags .* batch_size: '64' != '128'"), ("data_dir", "data .* fingerprint: ")]
)
@pytest.mark.sample(1)
def test_trainings_with_other_settings_end_in_one_line_each(tmp_path, flag, says):
    values: tuple = (64, 128)
    flags = {}
    if flag == "data_dir":
        values, flags = (tmp_path / "a", tmp_path / "b"), {"dataset": "criteo_kaggle", "num_examples": 0}
        for path, rows in zip(values, (300, 310), strict=True):
            path.mkdir()
            prepare_text(path, kaggle_text(rows), PRESETS["criteo_kaggle"][1]())
        values = tuple(path / "out" for path in values)
    running = train(tmp_path / "run", 2, 1, tuple([f"--{flag}={value}"] for value in values), **flags)
    for process, text in zip(running, outputs(running), strict=True):
        (line,) = [line for line in text.splitlines() if "error: " in line]
        assert process.returncode == 1 and re.match(f"error: the processes have different {says}", line), text
        assert "Check failure" not in text and "Traceback" not in text


LEAVE = """
import sys, time
from jax._src import distributed
from dlrm_jax.cli import commands
from dlrm_jax.host import processes
processes.join(sys.argv[1], 2, int(sys.argv[2]))
if sys.argv[2] == "1":
    time.sleep(2)
    print(len(distributed.global_state.client.key_value_dir_get("flags/digest/")), "read")
commands._end_at_once()
"""


def test_a_process_that_ends_answers_the_others_until_they_end_too():
    """Process 0 serves the store: gone at once, it fails what the others still read there, and JAX aborts them."""
    address = f"127.0.0.1:{free_port()}"
    running = [start([sys.executable, "-c", LEAVE, address, str(number)], 1) for number in range(2)]
    assert outputs(running) == ["", "2 read\n"]
    assert [process.returncode for process in running] == [1, 1]
