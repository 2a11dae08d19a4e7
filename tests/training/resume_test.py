"""Promise 5: a run that stops, for whatever reason, ends in the same bits as one that never did."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from dlrm_jax.config import ConfigError, LossConfig
from dlrm_jax.data.read.load import DataConfig, load_dataset
from dlrm_jax.training import checkpoint, loop
from dlrm_jax.training.options import ShardingOptions
from dlrm_jax.training.placed import on_one_device
from dlrm_jax.training.profiling import TRACE, StepsTrace
from dlrm_jax.training.reporting import read_metrics
from dlrm_jax.training.run_config import ModelOptions, RunConfig
from tests.helpers import ROOT, has_logged, optimizer, until

CONFIG = RunConfig(
    data=DataConfig(num_examples=2000),
    model=ModelOptions(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1)),
    loss=LossConfig(),
    optimizer=optimizer("rowwise_adagrad", "adam", rate=0.01),
    batch_size=64,
    num_steps=60,
    eval_every=20,
    checkpoint_every=10,
    log_every=10,
    sharding=ShardingOptions(mesh="model:1"),
)


def final_state(workdir: pathlib.Path, config: RunConfig = CONFIG):
    model = config.model.build(load_dataset(config.data))
    with checkpoint.Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(checkpoint.LATEST, on_one_device(model, config.optimizer))


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    result = loop.train_and_evaluate(CONFIG, workdir)
    return workdir, final_state(workdir), result


@pytest.mark.parametrize("stop_at", [1, 30, 37])
@pytest.mark.sample(1)
def test_stopping_and_going_on_equals_going_through(tmp_path, undisturbed, stop_at):
    loop.train_and_evaluate(dataclasses.replace(CONFIG, num_steps=stop_at), tmp_path)
    assert int(final_state(tmp_path).step) == stop_at
    result = loop.train_and_evaluate(CONFIG, tmp_path)
    assert_same_bits(final_state(tmp_path), undisturbed[1])
    assert result["test"]["num_samples"] == 200
    losses = [
        [(line["step"], line["loss"]) for line in read_metrics(workdir) if line["split"] == "train"]
        for workdir in (tmp_path, undisturbed[0])
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_traced_steps_change_no_bit_and_are_told_by_part_and_operation(tmp_path, undisturbed, caplog):
    caplog.set_level("INFO", "dlrm_jax")
    loop.train_and_evaluate(dataclasses.replace(CONFIG, profile_steps="5:9"), tmp_path)
    assert_same_bits(final_state(tmp_path), undisturbed[1])
    assert len(list((tmp_path / TRACE).rglob("*.xplane.pb"))) == 1
    (told,) = (record.message for record in caplog.records if "steps 5 to 9, traced in" in record.message)
    shares, head, *operations = told.splitlines()[1:]
    assert {"lookup", "MLPs", "sparse update"} <= set(re.findall(r"(?:^|  )([a-zA-Z ]+?) [\d.]+%", shares))
    assert head.split()[:3] == ["ms", "a", "step"] and len(operations) == 12
    times = [float(line.split()[0]) for line in operations]
    assert times == sorted(times, reverse=True) and times[0] > 0


def test_steps_that_a_run_never_reaches_are_not_traced(tmp_path, undisturbed, caplog):
    with StepsTrace("3:9", tmp_path, traces=True) as trace:
        trace.before(2, undisturbed[1])
        trace.after(2, undisturbed[1], None)
    assert "the run ended before step 3: nothing was traced" in caplog.text and not (tmp_path / TRACE).exists()
    for text in ("9:3", "5", "3:3", "-1:2"):
        with pytest.raises(ConfigError, match=f"profile_steps is '{text}'; give two numbers of steps"):
            dataclasses.replace(CONFIG, profile_steps=text)


def test_a_finished_run_trains_no_further_and_says_the_same(tmp_path, undisturbed):
    _, state, result = undisturbed
    again = loop.train_and_evaluate(CONFIG, undisturbed[0])
    assert_same_bits(final_state(undisturbed[0]), state)
    assert again["test"] == result["test"] and again["step"] == result["step"]


def test_other_settings_in_the_same_workdir_are_refused_with_both_values(undisturbed):
    workdir = undisturbed[0]
    other = dataclasses.replace(CONFIG, batch_size=32, model=dataclasses.replace(CONFIG.model, top_mlp=(9, 1)))
    with pytest.raises(ConfigError, match=r"batch_size: 32 != 64; model\.top_mlp\[0\]: 9 != 8"):
        loop.train_and_evaluate(other, workdir)
    with pytest.raises(ConfigError, match=r"data\.fingerprint"):
        loop.train_and_evaluate(dataclasses.replace(CONFIG, data=DataConfig(num_examples=2000, seed=1)), workdir)


def test_metrics_lines_are_written_once_after_a_resume(tmp_path, undisturbed):
    loop.train_and_evaluate(dataclasses.replace(CONFIG, num_steps=30), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 39, "split": "train", "loss": 1.0}\n{"step": 39, "spl'
        )  # beyond the checkpoint; half a line
    loop.train_and_evaluate(CONFIG, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [10, 20, 30, 40, 50, 60]
    assert [line["step"] for line in lines if line["split"] == "val"] == [20, 30, 40, 60]


def command(workdir: pathlib.Path) -> list[str]:
    flags = {
        **{"num_examples": 2000, "embedding_dim": 4, "bottom_mlp": "8,4", "top_mlp": "8,1", "batch_size": 64},
        **{"table_optimizer": "rowwise_adagrad", "dense_optimizer": "adam", "learning_rate": 0.01, "num_steps": 3000},
        **{"eval_every": 500, "checkpoint_every": 100, "log_every": 10, "patience": 0, "workdir": workdir},
    }
    return [sys.executable, "-m", "dlrm_jax.train", *(f"--{name}={value}" for name, value in flags.items())]


LONG = dataclasses.replace(CONFIG, num_steps=3000, eval_every=500, checkpoint_every=100)


@pytest.fixture(scope="module")
def long_state(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("long")
    loop.train_and_evaluate(LONG, workdir)
    return final_state(workdir)


def run_until_step(workdir: pathlib.Path, step: int, signum: int) -> tuple[int, str]:
    """Start the command, send `signum` once metrics.jsonl has reached `step`; (exit status, stderr)."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command(workdir), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    until(lambda: has_logged(workdir, step), process)
    process.send_signal(signum)
    _, stderr = process.communicate()
    return process.returncode, stderr


@pytest.mark.slow
@pytest.mark.end_to_end
@pytest.mark.usefixtures("compiled_anew")
def test_killed_and_then_interrupted_it_goes_on_to_the_same_bits(tmp_path, long_state):
    status, _ = run_until_step(tmp_path, 720, signal.SIGKILL)
    assert status == -signal.SIGKILL
    signum = signal.SIGINT  # processes_test.py sends SIGTERM.
    status, stderr = run_until_step(tmp_path, 1500, signum)
    assert status == 128 + signum
    assert f"stopped by {signum.name} at step" in stderr and "Traceback" not in stderr
    stopped_at = int(final_state(tmp_path).step)
    assert stopped_at >= 1500
    finished = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert f"resumed at step {stopped_at} of 3000" in finished.stderr
    assert_same_bits(final_state(tmp_path, LONG), long_state)


@pytest.mark.slow
@pytest.mark.end_to_end
def test_ctrl_c_before_training_leaves_no_traceback(tmp_path):
    starting = [*command(tmp_path / "run"), "--num_examples=20000000"]
    # Who starts the tests in the background has the signal ignored, which a process inherits.
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    starting = [sys.executable, "-c", heed, *starting]
    process = subprocess.Popen(starting, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "loading planted\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130 and stderr == "interrupted\n"


def test_where_nothing_is_traced_nobody_asks_what_was_compiled(tmp_path, undisturbed):
    asked = []

    class Stepping:
        executable = property(lambda self: asked.append("executable"))

    with StepsTrace("", tmp_path, traces=True) as trace:
        trace.before(2, undisturbed[1])
        trace.after(2, undisturbed[1], Stepping())
    assert asked == [] and not (tmp_path / TRACE).exists()
