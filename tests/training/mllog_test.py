"""`--mllog`: what a run writes passes MLPerf's own checker (mlcommons/logging), and says no more than what was run."""

import dataclasses
import json
import os
import pathlib
import signal

import numpy as np
import pytest
from mlperf_logging.compliance_checker import mlp_compliance

from dlrm_jax.config import ConfigError, InteractionConfig
from dlrm_jax.data.generate import planted
from dlrm_jax.training import loop, reporting
from dlrm_jax.training.monitor import Interrupted
from dlrm_jax.training.progress import Progress
from dlrm_jax.training.record_options import RecordOptions, Submission, parse_submission
from dlrm_jax.training.run import Run
from tests import forked
from tests.helpers import optimizer
from tests.training.resume_test import CONFIG

RULES = "6.0.0"
"""The last ones that have dlrm_dcnv2."""
CROSS = InteractionConfig("cross", {"cross_layers": 1, "cross_rank": 4})
ADAGRAD = dataclasses.replace(optimizer("adagrad", "adagrad", rate=0.005), eps=1e-8)
DCNV2 = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, interaction=CROSS),
    optimizer=ADAGRAD,
    num_steps=40,
    records=RecordOptions("org:Example,platform:box"),
)


def complaints(path: pathlib.Path) -> list[str]:
    """What the checker says of a log, warnings included."""
    checker = mlp_compliance.make_checker("training", RULES, quiet=False, werror=True)
    mlp_compliance.main(str(path), f"training_{RULES}/common.yaml", checker)
    return [*checker.overwritable.values(), *checker.not_overwritable]


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in path.read_text().splitlines()]


def values(path: pathlib.Path) -> dict:
    return {line["key"]: line["value"] for line in lines(path) if line["event_type"] == "POINT_IN_TIME"}


def last(path: pathlib.Path) -> tuple[str, dict]:
    line = lines(path)[-1]
    return line["key"], line["metadata"]


def test_a_run_passes_the_checker_and_lacks_but_criteos_data_for_the_closed_division(tmp_path):
    closed = dataclasses.replace(DCNV2, records=RecordOptions("org:Example,division:closed,status:onprem"))
    loop.train_and_evaluate(closed, tmp_path)
    path = tmp_path / "mllog.txt"
    lacking = complaints(path)
    assert len(lacking) == 2, lacking
    assert "89137319" in lacking[0] and "v['value'] >= 0.80275" in lacking[1]
    path.write_text(path.read_text().replace('"closed"', '"open"'))
    assert complaints(path) == []
    said = values(path)
    assert said["submission_benchmark"] == "dlrm_dcnv2" and said["submission_status"] == "onprem"
    assert said["submission_platform"].endswith("x cpu") and said["cache_clear"] is False
    assert (said["train_samples"], said["eval_samples"], said["global_batch_size"]) == (1600, 200, 64)
    assert (said["opt_name"], said["opt_adagrad_epsilon"], said["opt_base_learning_rate"]) == ("adagrad", 1e-8, 0.005)
    times = [line["time_ms"] for line in lines(path)]
    assert times == sorted(times)


@pytest.mark.exhaustive
def test_epochs_blocks_and_evaluations_are_where_they_were(tmp_path):
    """25 steps an epoch, evaluated behind steps 20 and 40."""
    loop.train_and_evaluate(DCNV2, tmp_path)
    after = [line for line in lines(tmp_path / "mllog.txt") if "samples_count" in line["metadata"]]
    assert [(line["key"], line["metadata"]["samples_count"]) for line in after] == [
        *(("run_start", 0), ("epoch_start", 0), ("block_start", 0)),
        *((key, 20 * 64) for key in ("block_stop", "eval_start", "eval_accuracy", "eval_stop", "block_start")),
        *(("epoch_stop", 1600), ("epoch_start", 1600)),
        *((key, 1600 + 15 * 64) for key in ("block_stop", "eval_start", "eval_accuracy", "eval_stop", "run_stop")),
    ]
    measured = [line["auc"] for line in reporting.read_metrics(tmp_path) if line["split"] == "val"]
    told = [line for line in after if line["key"] == "eval_accuracy"]
    assert [line["value"] for line in told] == measured and [x["metadata"]["epoch_num"] for x in told] == [0.8, 1.6]
    assert last(tmp_path / "mllog.txt")[1]["status"] == "success"


@pytest.mark.exhaustive
def test_what_goes_on_has_a_file_of_its_own_that_says_from_where(tmp_path):
    """A target that is not reached is no success; a finished run writes nothing more."""
    config = dataclasses.replace(DCNV2, target_value=0.999)
    loop.train_and_evaluate(dataclasses.replace(config, num_steps=20), tmp_path)
    first = (tmp_path / "mllog.txt").read_text()
    for _ in range(2):
        loop.train_and_evaluate(config, tmp_path)
    path = tmp_path / "mllog-from-step-20.txt"
    assert sorted(one.name for one in tmp_path.glob("mllog*")) == [path.name, "mllog.txt"]
    assert (tmp_path / "mllog.txt").read_text() == first
    assert complaints(path) == [] and values(path)["init_checkpoint_step"] == 20
    starts = [line["metadata"] for line in lines(path) if line["key"] in ("run_start", "block_start", "epoch_start")]
    assert {start["samples_count"] for start in starts} == {20 * 64, 1600}
    assert last(path) == ("run_stop", {"status": "aborted", "epoch_num": 1.6, "samples_count": 1600 + 15 * 64})


def test_a_signal_aborts_it(tmp_path, monkeypatch):
    write = reporting.MetricsLog.write

    def stopped_behind_the_first_evaluation(self, step, split, found):
        write(self, step, split, found)
        if (step, split) == (20, "val"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(reporting.MetricsLog, "write", stopped_behind_the_first_evaluation)
    with pytest.raises(Interrupted):
        loop.train_and_evaluate(DCNV2, tmp_path)
    assert complaints(tmp_path / "mllog.txt") == []
    key, metadata = last(tmp_path / "mllog.txt")
    assert key == "run_stop" and metadata["status"] == "aborted" and 20 * 64 <= metadata["samples_count"] < 40 * 64


@pytest.mark.exhaustive
def test_no_number_aborts_it(tmp_path, monkeypatch):
    honest = planted.generate(0, 2000)
    labels = honest.splits["train"].label_R.copy()
    labels[64 * 22] = np.nan
    train = dataclasses.replace(honest.splits["train"], label_R=labels)
    data = dataclasses.replace(honest, splits={**honest.splits, "train": train})
    monkeypatch.setattr(planted, "generate", lambda seed, num_examples: data)
    with pytest.raises(ConfigError, match="not finite at step 23"):
        loop.train_and_evaluate(dataclasses.replace(DCNV2, shuffle=False), tmp_path)
    assert complaints(tmp_path / "mllog.txt") == []
    key, metadata = last(tmp_path / "mllog.txt")
    assert key == "run_stop" and metadata["status"] == "aborted"


def test_only_the_first_of_several_processes_writes_it(tmp_path):
    run = Run(DCNV2, tmp_path, progress=False)
    for writes in (False, True):
        run.writes = writes
        with loop.mlperf_log(run, Progress(), 0) as log:
            log.begin(0)
            log.stop(0, success=True)
        assert bool(list(tmp_path.glob("mllog*"))) == writes


@pytest.mark.parametrize("flag", ["--mllog=org:Example", "--histogram_rows=5"])
@pytest.mark.sample(1)
@pytest.mark.exhaustive
def test_online_refuses_what_it_does_not_write(tmp_path, flag):
    """Each period's evaluation is its own there, and no run of epochs."""
    ended = forked.run("online", f"--workdir={tmp_path}", flag)
    name = flag.partition("=")[0]
    assert ended.returncode == 1 and f"{name}: for dlrm_jax.train alone; leave it out here" in ended.stderr


def test_a_submission_in_words():
    assert parse_submission("") is None
    assert parse_submission("org:Example Inc,platform:8x a:b,division:closed") == Submission(
        "Example Inc", "closed", "8x a:b"
    )
    for text, words in {
        "division:open": "mllog=division:open: org is missing; name who submits, as org:NAME",
        "org:A,team:B": "'team' is not among org, division, platform, status, benchmark",
        "org:A,division:half": "division is 'half'",
    }.items():
        with pytest.raises(ConfigError, match=words):
            RecordOptions(text)
