"""`python -m dlrm_jax.prepare` and training on what it made, as a user types them."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from dlrm_jax.training import checkpoint
from experiments import shop_log
from tests.cli.commands_test import result_of
from tests.data.infer_test import own_log
from tests.data.preparation_test import kaggle_text
from tests.forked import run
from tests.helpers import ROOT, SHARED
from tests.prepared_helpers import digest

pytestmark = pytest.mark.end_to_end


@pytest.mark.exhaustive
def test_an_unknown_log_becomes_a_trained_model_in_two_commands(tmp_path):
    pq.write_table(own_log(), tmp_path / "log.parquet")
    prepared = run("prepare", f"--input={tmp_path}/log.parquet", f"--output={tmp_path}/data")
    assert prepared.returncode == 0, prepared.stderr
    assert "schema: click is the label by its name" in prepared.stderr
    assert "3,000 rows (train 2,400, val 300, test 300), 4 tables" in prepared.stdout and "rows/s" in prepared.stdout
    trained = run("train", f"--data_dir={tmp_path}/data", f"--workdir={tmp_path}/run", "--log_every=10")
    assert trained.returncode == 0, trained.stderr
    assert "of the time waiting for input" in trained.stdout and "auc" in trained.stdout
    assert result_of(tmp_path / "run")["test"]["num_samples"] == 300
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
        schema = checkpoints.record(checkpoint.LATEST)["schema"]
    assert schema == json.loads((tmp_path / "data" / "schema.json").read_text())
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "input_wait_fraction"} <= set(logged[0])
    again = run("evaluate", f"--workdir={tmp_path}/run", f"--predictions_out={tmp_path}/scores.csv")
    assert again.returncode == 0, again.stderr
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert len(lines) == 301 and lines[1].startswith("2700,")
    shown = run("prepare", f"--describe={tmp_path}/data")
    assert shown.returncode == 0 and "user_id" in shown.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--output is missing"),
        (("--output=x",), "--input is missing"),
        (("--output=x", "--input=/nowhere/*.csv"), "matches no file"),
        (
            ("--output=x", f"--input={__file__}", "--schema=criteo"),
            "neither a file, nor infer, nor one of criteo_kaggle",
        ),
        (("--output=x", f"--input={__file__}", "--max_memory=lots"), "--max_memory=lots is no amount of memory"),
        (("--output=x", f"--input={ROOT}/tests", "--schema=criteo_kaggle"), "is not a file; give files or a glob"),
        (("--describe=/nowhere",), "is not a prepared dataset"),
        (("extra",), "unexpected argument 'extra'"),
    ],
)
def test_wrong_flags_are_one_line(flags, words):
    finished = run("prepare", *flags)
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ") and words in finished.stderr and finished.stderr.count("\n") == 1


def test_help_names_schemas_and_mlperfs_split_names():
    text = " ".join(run("prepare", "--help").stdout.split())
    for words in ("criteo_terabyte", "val, test (the names as MLPerf has them", "--on_bad_row", "--max_memory"):
        assert words in text


def test_flags_change_what_they_promise(tmp_path):
    (tmp_path / "log.csv").write_text(
        "click,x,kind\n" + "".join(f"{i % 2},{i / 2},k{i % 3}\n" for i in range(9)) + "5,1,k\n"
    )
    flags = (f"--input={tmp_path}/log.csv", f"--output={tmp_path}/data")
    (tmp_path / "s.yaml").write_text("name: mine\nlabel: click\ndense: [x]\nsparse: [kind]\n")
    bad = run("prepare", *flags, f"--schema={tmp_path}/s.yaml")
    assert bad.returncode == 1 and "log.csv, line 11, column click: '5' is neither 0 nor 1" in bad.stderr
    good = run("prepare", *flags, f"--schema={tmp_path}/s.yaml", "--on_bad_row=skip_and_count", "--compression=zstd")
    assert good.returncode == 0, good.stderr
    assert "skipped 1 rows" in good.stdout and "is neither 0 nor 1" in good.stdout
    assert json.loads((tmp_path / "data" / "job.json").read_text())["compression"] == "zstd"


def test_what_a_label_counts_as_negative_and_a_split_of_one_class_are_said(tmp_path):
    rows = "".join(
        f"{'sold' if i % 5 == 0 and i < 150 else 'back' if i % 2 else 'Sold'},k{i % 3}\n" for i in range(200)
    )
    (tmp_path / "log.csv").write_text("outcome,kind\n" + rows)
    (tmp_path / "s.yaml").write_text(
        "name: mine\nlabel: {column: outcome, positive: [sold]}\nsparse: [kind]\nsplit: {by: order}\n"
    )
    flags = (f"--input={tmp_path}/log.csv", f"--output={tmp_path}/data", f"--schema={tmp_path}/s.yaml")
    finished = run("prepare", *flags)
    assert finished.returncode == 0, finished.stderr
    assert "label: counted as negative: 'Sold' (85), 'back' (85)" in finished.stdout
    for name in ("val", "test"):
        assert f"warning: split {name}: all 20 rows have label 0, so it has no AUC" in finished.stderr
    assert "split train" not in finished.stderr


@pytest.mark.slow
@pytest.mark.exhaustive
def test_prepared_data_refuses_flags_that_would_do_nothing(tmp_path):
    (tmp_path / "train.txt").write_text(kaggle_text(300))
    assert (
        run(
            "prepare", f"--input={tmp_path}/train.txt", f"--output={tmp_path}/data", "--schema=criteo_kaggle"
        ).returncode
        == 0
    )
    for flag in ("--max_rows_per_table=5", "--split=time", "--dataset=movielens_100k"):
        finished = run("train", f"--data_dir={tmp_path}/data", f"--workdir={tmp_path}/run", flag)
        assert finished.returncode == 1 and flag.split("=")[0] in finished.stderr
    trained = run(
        "train",
        "--flagfile=experiments/criteo_kaggle.flags",
        f"--data_dir={tmp_path}/data",
        f"--workdir={tmp_path}/run",
    )
    assert trained.returncode == 0, trained.stderr


@pytest.mark.slow
@pytest.mark.exhaustive
def test_synthetic_and_multi_hot_runs(tmp_path):
    flags = (
        "--dataset=synthetic",
        "--table_sizes=100,2000",
        "--num_examples=3000",
        "--num_dense=2",
        "--batch_size=256",
        "--num_steps=4",
    )
    for i, more in enumerate(
        ((), ("--multi_hot=virtual", "--multi_hot_sizes=3,2"), ("--multi_hot=compatible", "--multi_hot_sizes=3,2"))
    ):
        finished = run("train", *flags, *more, f"--workdir={tmp_path}/{i}")
        assert finished.returncode == 0, finished.stderr
        assert result_of(tmp_path / str(i))["test"]["num_samples"] == 300
    bad = run("train", *flags, "--multi_hot=virtual", f"--workdir={tmp_path}/bad")
    assert bad.returncode == 1 and "give both or none" in bad.stderr


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_defaults_come_near_logistic_regression_on_its_own_kind_of_log(tmp_path):
    """A newcomer's two commands. Plain SGD for one epoch, the defaults of before, had a test AUC of .638."""
    shop_log.write(tmp_path / "shop.csv")
    prepared = run("prepare", f"--input={tmp_path}/shop.csv", f"--output={tmp_path}/data")
    assert prepared.returncode == 0, prepared.stderr
    trained = run("train", f"--data_dir={tmp_path}/data", f"--workdir={tmp_path}/run")
    assert trained.returncode == 0, trained.stderr
    assert "defaults taken: --dense_optimizer=adagrad --table_optimizer=rowwise_adagrad" in trained.stderr
    result = result_of(tmp_path / "run")
    assert 0.790 < result["test"]["auc"] < 0.805, "logistic regression has .798 (experiments/README.md)"
    epochs = result["step"] / (23_946 // 256 + 1)
    assert 1 <= epochs < 20, "the best of few epochs, and the run ends by itself"


def start(*command: str) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.exhaustive
def test_kill_minus_nine_during_training_on_prepared_data(tmp_path):
    """The data position is in the checkpoint: the weights are those of a run that nobody killed."""
    (tmp_path / "train.txt").write_text(kaggle_text(3000))
    assert (
        run(
            "prepare", f"--input={tmp_path}/train.txt", f"--output={tmp_path}/data", "--schema=criteo_kaggle"
        ).returncode
        == 0
    )
    flags = (
        f"--data_dir={tmp_path}/data",
        "--num_epochs=2",
        "--patience=0",
        "--checkpoint_every=20",
        "--batch_size=64",
        "--log_every=10",
    )
    whole = run("train", *flags, f"--workdir={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    kills = 0
    for attempt in range(20):
        process = start("dlrm_jax.train", *flags, f"--workdir={tmp_path}/killed")
        latest = tmp_path / "killed" / "checkpoints" / "latest"
        before = sorted(latest.glob("[0-9]*")) if latest.exists() else []
        while process.poll() is None:
            if latest.exists() and sorted(latest.glob("[0-9]*")) != before and not kills:
                process.send_signal(signal.SIGKILL)
                kills += 1
            time.sleep(0.01)
        process.wait()
        if process.returncode == 0:
            break
        assert attempt < 19
    assert kills == 1
    ours, theirs = result_of(tmp_path / "killed"), result_of(tmp_path / "whole")
    for key in ("step", "val", "test"):
        assert ours[key] == theirs[key]
    for workdir in ("killed", "whole"):
        run(
            "evaluate",
            f"--workdir={tmp_path}/{workdir}",
            "--checkpoint=latest",
            f"--predictions_out={tmp_path}/{workdir}.csv",
        )
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_the_public_criteo_sample_has_a_header(tmp_path):
    sample = SHARED / "data" / "criteo_sample" / "train.csv"
    if not sample.exists():
        pytest.skip("the Criteo sample is not beside this checkout")
    finished = run("prepare", f"--input={sample}", f"--output={tmp_path}/data", "--schema=criteo_kaggle")
    assert finished.returncode == 0 and "1,999 rows (train 1,714, val 142, test 143)" in finished.stdout
    assert digest(tmp_path / "data")
