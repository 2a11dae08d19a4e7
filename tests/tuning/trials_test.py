"""Tests `dlrm_jax/tuning/trials.py` and the command: each trial trains once, whatever stops the search."""

import contextlib
import json
import subprocess
import sys

import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.host import files
from dlrm_jax.tuning import trials as of_search
from dlrm_jax.tuning.search import Search, rounds
from dlrm_jax.tuning.trials import Trials, best_flags, kept_file, ranked, require_one
from tests.helpers import ROOT, has_logged, until

TRAIN = """
import json, pathlib, sys
given = dict(one[2:].split("=", 1) for one in sys.argv[1:])
directory = pathlib.Path(given["workdir"])
with (directory / "calls").open("a") as calls:
    calls.write(given.get("num_steps", "all") + "\\n")
if given["x"] == "bad":
    sys.exit("error: x is 'bad'; give a number")
steps = int(given.get("num_steps", 9))
(directory / "result.json").write_text(json.dumps({"step": steps, "val": {"auc": float(given["x"]) + steps / 1000}}))
"""


def search_of(tmp_path, texts: list[str]) -> Trials:
    flagfile = tmp_path / "base.flags"
    flagfile.write_text("--batch_size=8\n--x=0\n")
    return Trials(
        workdir=tmp_path,
        flagfile=flagfile,
        flags=[{"x": text} for text in texts],
        metric="auc",
        smaller_is_better=False,
        length=lambda share: {} if share == 1 else {"num_steps": str(round(9 * share))},
        command=(sys.executable, "-c", TRAIN),
    )


def calls(trials: Trials) -> list[list[str]]:
    return [(trials.directory(i) / "calls").read_text().split() for i in range(len(trials.flags))]


def test_halving_trains_on_with_the_best_and_a_second_search_finds_all_done(tmp_path):
    trials = search_of(tmp_path, ["0.1", "0.3", "bad", "0.2"])
    plan = rounds(Search("halving", factor=2), 4)
    order = ranked(trials.run(plan, lambda outcome: None), False)
    assert calls(trials) == [["2"], ["2", "4", "all"], ["2"], ["2", "4"]]
    assert [outcome.trial for outcome in order] == [1, 3, 0, 2]
    assert (order[0].value, order[0].step) == (pytest.approx(0.309), 9)
    assert order[-1].error == "x is 'bad'; give a number"
    again = ranked(trials.run(plan, lambda outcome: None), False)
    assert again == order
    assert calls(trials) == [["2"], ["2", "4", "all"], ["2", "2"], ["2", "4"]], "only what failed is tried again"
    assert best_flags(trials, order[0]).splitlines()[1:] == ["--batch_size=8", "--x=0.3"]


def test_an_outcome_of_other_flags_is_not_taken(tmp_path):
    first = search_of(tmp_path, ["0.1"])
    first.run(rounds(Search(), 1), lambda outcome: None)
    (outcome,) = search_of(tmp_path, ["0.2"]).run(rounds(Search(), 1), lambda outcome: None)
    assert outcome.value == pytest.approx(0.209)


def test_a_trial_that_a_killed_search_left_is_waited_for(tmp_path, monkeypatch):
    trials, waited = search_of(tmp_path, ["0.1"]), []
    trials.directory(0).mkdir()
    with contextlib.ExitStack() as left:
        left.enter_context(files.alone(trials.directory(0) / files.LOCK, "another training is running"))

        def sleep(seconds: float) -> None:
            waited.append((trials.directory(0) / "calls").exists())
            left.close()

        monkeypatch.setattr(of_search.time, "sleep", sleep)
        (outcome,) = trials.run(rounds(Search(), 1), lambda outcome: None)
    assert waited == [False] and outcome.value == pytest.approx(0.109)


def test_where_all_fail_the_first_reason_is_told(tmp_path):
    order = ranked(search_of(tmp_path, ["bad", "bad"]).run(rounds(Search(), 2), lambda outcome: None), False)
    with pytest.raises(ConfigError, match="all 2 trials failed; the first: x is 'bad'"):
        require_one(order)


def test_a_workdir_of_another_search_is_refused(tmp_path):
    trials = search_of(tmp_path, ["1"])
    kept_file(trials, {"seed": 1})
    kept_file(trials, {"seed": 1})
    with pytest.raises(ConfigError, match="holds another search"):
        kept_file(trials, {"seed": 2})


@pytest.mark.slow
@pytest.mark.end_to_end
def test_a_search_that_was_killed_goes_on_loses_no_step_and_writes_table_picture_and_flags(tmp_path):
    (tmp_path / "search.yaml").write_text("{method: grid, flags: {learning_rate: [0.001, 0.02]}}")
    flags = ("num_examples=1000", "embedding_dim=4", "bottom_mlp=8,4", "top_mlp=8,1", "batch_size=8", "log_every=1")
    flags += ("num_steps=1000", "eval_every=500", f"search={tmp_path}/search.yaml", f"workdir={tmp_path}/run")
    command = [sys.executable, "-m", "dlrm_jax.tune", *(f"--{flag}" for flag in flags)]
    first = tmp_path / "run" / "trial-000"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        until(lambda: has_logged(first, 100), process)
        process.kill()
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    tuned = json.loads((tmp_path / "run" / "tune.json").read_text())
    assert sorted((row["trial"], row["error"]) for row in tuned["trials"]) == [(0, ""), (1, "")]
    steps = [line["step"] for line in map(json.loads, (first / "metrics.jsonl").open()) if line["split"] == "train"]
    assert steps == list(range(1, 1001))
    assert out[0].split() == ["trial", "learning_rate", "val", "auc", "steps"] and len(out) == 4
    assert f"--learning_rate={tuned['best']['flags']['learning_rate']}" in (tmp_path / "run/best.flags").read_text()
    assert (tmp_path / "run" / "tune.png").read_bytes().startswith(b"\x89PNG")
