"""The commands as a user types them: files, tables, exit status, and one line when something is wrong."""

import csv
import json
import os
import pathlib
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest

from dlrm_jax.cli import commands
from dlrm_jax.host import files, interrupts
from dlrm_jax.serving import load
from experiments.quality_gate import check, read_baselines
from tests.forked import run
from tests.helpers import ROOT, SHARED

pytestmark = [pytest.mark.end_to_end, pytest.mark.usefixtures("optimised")]  # They train for many steps.


def typed(module: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"dlrm_jax.{module}", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def result_of(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "result.json").read_text())


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, optimised):
    workdir = tmp_path_factory.mktemp("quickstart")
    finished = typed("train", "--flagfile=experiments/quickstart.flags", f"--workdir={workdir}")
    assert finished.returncode == 0, finished.stderr
    return workdir, finished


def test_quickstart_comes_within_two_hundredths_of_the_optimum(quickstart):
    workdir, finished = quickstart
    result = result_of(workdir)
    assert result["optimum"]["auc"] - 0.02 <= result["test"]["auc"] <= result["optimum"]["auc"] + 0.005
    for words in ("samples/s", "loss", "s left", "val auc"):
        assert words in finished.stderr
    for words in ("optimum", "test", "calibration", "normalized_entropy", f"{result['test']['auc']:.5f}"):
        assert words in finished.stdout
    assert "Orbax" not in finished.stderr and "nan" not in finished.stderr


def test_quickstart_is_as_good_as_it_was(quickstart):
    verdict = check(result_of(quickstart[0])["test"], read_baselines("quickstart"))
    assert not verdict.regressions, verdict.regressions


def test_evaluate_says_what_training_said_and_writes_predictions(quickstart, tmp_path):
    workdir, _ = quickstart
    before = result_of(workdir)
    predictions = tmp_path / "scores.csv"
    finished = run("evaluate", f"--workdir={workdir}", "--split=test", f"--predictions_out={predictions}")
    assert finished.returncode == 0, finished.stderr
    table, line = finished.stdout.strip().rsplit("\n", 1)
    assert json.loads(line)["auc"] == before["test"]["auc"] == result_of(workdir)["test"]["auc"]
    assert f"{before['test']['auc']:.5f}" in table and "optimum" in table
    with predictions.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == before["test"]["num_samples"] == 40_000
    assert int(rows[0]["id"]) == 360_000
    mean = sum(float(row["probability"]) for row in rows) / sum(float(row["label"]) for row in rows)
    assert mean == pytest.approx(before["test"]["calibration"], rel=1e-4)


def test_evaluate_finds_steps_and_names_what_there_is(quickstart):
    workdir, _ = quickstart
    finished = run("evaluate", f"--workdir={workdir}", "--checkpoint=latest", "--split=val")
    assert json.loads(finished.stdout.strip().splitlines()[-1])["step"] == 2500
    missing = run("evaluate", f"--workdir={workdir}", "--checkpoint=3")
    assert missing.returncode == 1 and "no checkpoint '3'" in missing.stderr and "Traceback" not in missing.stderr


@pytest.mark.exhaustive
@pytest.mark.slow
def test_bfloat16_mlps_rank_as_well(quickstart, tmp_path):
    flags = ("--flagfile=experiments/quickstart.flags", "--compute_dtype=bfloat16", f"--workdir={tmp_path}")
    assert run("train", *flags).returncode == 0
    exact, short = (result_of(workdir)["test"]["auc"] for workdir in (quickstart[0], tmp_path))
    assert 0 < abs(short - exact) < 5e-4


def test_second_run_in_the_same_workdir_is_done_at_once(quickstart):
    workdir, _ = quickstart
    before = result_of(workdir)
    again = run("train", "--flagfile=experiments/quickstart.flags", f"--workdir={workdir}")
    assert again.returncode == 0 and "resumed at step 2500 of 2500" in again.stderr
    assert result_of(workdir)["test"] == before["test"]


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.slow
@pytest.mark.exhaustive
def test_flags_txt_repeats_the_run_bit_by_bit(tmp_path):
    small = ["--num_examples=5000", "--batch_size=100", "--learning_rate=0.05", "--num_epochs=1"]
    first = run("train", *small, f"--workdir={tmp_path / 'a'}")
    assert first.returncode == 0, first.stderr
    text = (tmp_path / "a" / "flags.txt").read_text()
    assert "--num_examples=5000" in text and "--jax" not in text
    assert "--table_optimizer=rowwise_adagrad" in text, "defaults that were taken are kept too"
    (taken,) = (line for line in first.stderr.splitlines() if line.startswith("defaults taken: "))
    assert taken.split()[2:] == ["--dense_optimizer=adagrad", "--table_optimizer=rowwise_adagrad", "--patience=2"]
    second = run("train", f"--flagfile={tmp_path / 'a' / 'flags.txt'}", f"--workdir={tmp_path / 'b'}")
    assert second.returncode == 0, second.stderr
    assert result_of(tmp_path / "a")["test"] == result_of(tmp_path / "b")["test"]
    assert "defaults taken" not in second.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("movielens_100k", 0.780),
        pytest.param("movielens_100k_sgd", 0.769, marks=pytest.mark.exhaustive),
        pytest.param("movielens_100k_time", 0.705, marks=pytest.mark.exhaustive),
    ],
)
def test_movielens_reaches_the_reference(tmp_path, name, least):
    data = SHARED / "data" / "ml-100k"
    if not data.exists():
        pytest.skip("MovieLens 100k is not beside this checkout")
    finished = run("train", f"--flagfile=experiments/{name}.flags", f"--data_dir={data}", f"--workdir={tmp_path}")
    assert finished.returncode == 0, finished.stderr
    assert result_of(tmp_path)["test"]["auc"] >= least


def test_criteo_flag_file_runs_on_the_sample_and_its_model_takes_raw_rows(tmp_path):
    data = SHARED / "data" / "criteo_sample"
    if not data.exists():
        pytest.skip("the Criteo sample is not beside this checkout")
    flags = ["--flagfile=experiments/criteo_kaggle.flags", f"--data_dir={data}", f"--workdir={tmp_path}"]
    finished = run("train", *flags)
    assert finished.returncode == 0, finished.stderr
    result = result_of(tmp_path)
    assert result["step"] == 14 and result["test"]["num_samples"] == 143 and 0.4 < result["test"]["log_loss"] < 0.6
    exported = run("export", f"--workdir={tmp_path}", f"--out={tmp_path}/model", "--evaluate=test")
    assert exported.returncode == 0 and "preparing" not in exported.stderr, exported.stderr
    model = load(tmp_path / "model")
    with (data / "train.csv").open() as file:
        rows = list(csv.DictReader(file))[1714 : 1714 + 143]
    scores = model.predict_rows([{name: row[name] for name in model.reader.columns} for row in rows])
    calibration = scores.sum() / sum(int(row["Label"]) for row in rows)
    assert calibration == pytest.approx(result["test"]["calibration"], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--workdir is missing"),
        (["--workdir={tmp}", "--dataset=criteo_kaggle"], "--data_dir is missing"),
        (["--workdir={tmp}", "--dataset=criteo_kaggle", "--data_dir={tmp}/no"], "holds none of train.txt"),
        (["--workdir={tmp}", "--batch_size=0"], "batch_size is 0"),
        (["--workdir={tmp}", "--bottom_mlp=64,x"], "--bottom_mlp=64,x: it is not a list of numbers"),
        (["--workdir={tmp}", "--bottom_mlp=64,8"], "bottom_mlp ends in 8 but embedding_dim is 16"),
        (["--workdir={tmp}", "--num_examples=3"], "num_examples is 3"),
        (["--workdir={tmp}", "stray"], "unexpected argument 'stray'"),
        (["--workdir={tmp}", "--batch_sise=3"], "Did you mean: batch_size"),
        (["--workdir={tmp}", "--loss=hinge"], "hinge"),
        (["--workdir=/dev/null/x"], "/dev/null"),
    ],
)
def test_a_mistake_is_one_line_without_traceback(tmp_path, flags, words):
    finished = run("train", *(flag.format(tmp=tmp_path) for flag in flags))
    assert finished.returncode != 0
    assert words in finished.stderr and "Traceback" not in finished.stderr


def test_evaluate_without_a_run_says_so(tmp_path):
    finished = run("evaluate", f"--workdir={tmp_path}")
    assert finished.returncode == 1 and "config.json does not exist" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("module", "flag"), [("train", "--table_optimizer"), ("evaluate", "--predictions_out")])
def test_help_lists_the_flags(module, flag):
    assert flag in run(module, "--help").stdout


OUTPUTS = {
    "evaluate": ["--workdir=WORKDIR", "--predictions_out=MISSING"],
    "plan": ["--json=MISSING"],
    "benchmark": ["--picture=MISSING"],
    "loadtest": ["--json=MISSING"],
    "export": ["--workdir=WORKDIR", "--out=BELOW"],
    "prepare": ["--input=README.md", "--output=BELOW"],
    "train": ["--workdir=BELOW"],
    "online": ["--workdir=BELOW"],
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_an_output_that_cannot_be_is_said_before_the_work(command, tmp_path):
    """The workdir is none, and the log no log: whoever begins to work says that first."""
    (tmp_path / "file").touch()
    places = {"WORKDIR": tmp_path / "no", "MISSING": tmp_path / "missing" / "x", "BELOW": tmp_path / "file" / "x"}
    arguments = list(OUTPUTS[command])
    for word, place in places.items():
        arguments = [argument.replace(word, str(place)) for argument in arguments]
    finished = run(command, *arguments)
    assert finished.returncode == 1 and finished.stdout == ""
    assert finished.stderr.startswith(f"error: {arguments[-1]}") and finished.stderr.count("\n") == 1
    assert "Errno" not in finished.stderr


def test_a_flag_file_and_a_token_file_that_are_not_there(tmp_path):
    finished = run("train", f"--flagfile={tmp_path / 'no.flags'}")
    assert finished.returncode == 1
    assert finished.stderr == f"error: --flagfile: No such file or directory: '{tmp_path / 'no.flags'}'\n"
    finished = run("serve", f"--model={tmp_path}", f"--token_file={tmp_path / 'no'}")
    assert finished.returncode == 1
    assert finished.stderr == f"error: --token_file={tmp_path / 'no'} does not exist; name a file\n"


@pytest.mark.exhaustive
def test_evaluate_leaves_a_running_training_alone(tmp_path):
    """Its half-written checkpoint stays, and its result.json is left to it."""
    workdir = tmp_path / "run"
    assert run("train", "--num_examples=2000", "--num_steps=5", f"--workdir={workdir}").returncode == 0
    half = workdir / "checkpoints" / "latest" / "9999.orbax-checkpoint-tmp"
    half.mkdir()
    (workdir / "result.json").write_text("{}")
    with files.alone(workdir / files.LOCK, "another"):
        finished = run("evaluate", f"--workdir={workdir}")
    assert finished.returncode == 0 and half.is_dir() and result_of(workdir) == {}
    assert finished.stderr == f"a training is running in {workdir}: result.json is left to it\n"
    assert run("evaluate", f"--workdir={workdir}").returncode == 0 and half.is_dir()
    assert result_of(workdir)["step"] > 0


def test_console_scripts_are_the_commands():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    names = {path.stem for path in (ROOT / "dlrm_jax").glob("*.py")} - {"__init__", "compat", "config"}
    assert scripts == {f"dlrm-{name}": f"dlrm_jax.{name}:command" for name in names}


def test_a_console_script_ends_as_the_module_does():
    script = pathlib.Path(sys.executable).with_name("dlrm-loadtest")
    outcome = subprocess.run([script, "--qps=none"], capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("error: flag --qps=none"), outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


@pytest.mark.parametrize(("argv", "runs"), [(["/somewhere/bin/dlrm-train"], True), (["x.py"], False), ([], False)])
def test_ctrl_c_ends_a_console_script_while_it_loads(monkeypatch, argv, runs):
    monkeypatch.setattr(sys, "argv", argv)
    assert interrupts.runs_a_command() is runs


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("Event loop is closed"), False),
        (
            Exception("Encountered error while reading array index: (slice(0, 9, 1),). See full TensorStore details"),
            False,
        ),
        (RuntimeError("Event loop is open"), True),
        (ValueError("anything else"), True),
    ],
)
def test_of_a_checkpoint_whose_reading_failed_the_other_reads_are_silent(error, told):
    """Whether Orbax's coroutines end before Python does is chance, so they are not awaited here but made up."""
    seen = []
    commands._quiet_when_reading_failed(seen.append, SimpleNamespace(exc_value=error))
    assert bool(seen) == told


def test_reads_that_never_began_are_silent_too(monkeypatch, recwarn):
    async def read():
        pass

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    commands._say_once_that_reading_failed()
    read()  # Gone at once.
    assert not recwarn.list
