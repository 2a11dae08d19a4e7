"""Runs that go on in a used workdir under other settings: stopping rules, fewer steps, another schedule."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from dlrm_jax import evaluate
from dlrm_jax.api import trained
from dlrm_jax.config import ConfigError
from dlrm_jax.training import loop, opening
from dlrm_jax.training.progress import Progress, stopping
from dlrm_jax.training.reporting import read_metrics
from dlrm_jax.training.run import Run
from tests.training.resume_test import CONFIG, final_state

SLOW = dataclasses.replace(CONFIG.optimizer.schedule, learning_rate=1e-30)
STILL = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, schedule=SLOW))
LOWER = dataclasses.replace(CONFIG.optimizer.schedule, learning_rate=0.001)
WILD = dataclasses.replace(
    CONFIG,
    optimizer=dataclasses.replace(
        CONFIG.optimizer, schedule=dataclasses.replace(CONFIG.optimizer.schedule, learning_rate=3.0)
    ),
)
LOWERED = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, schedule=LOWER))


OLD_PROGRESS = {"best_value": 0.5, "best_step": 20, "evals_since_best": 0, "stopped": None}


def evaluated_at(workdir) -> list[int]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["split"] == "val"]


def rates(workdir) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [round(line["learning_rate"], 6) for line in lines if line["split"] == "train"]


def contents(workdir) -> dict[str, tuple[bytes, int]]:
    files = [path for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(workdir)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.exhaustive
def test_more_patience_and_then_none_goes_on_to_the_same_bits(tmp_path):
    """The rules of today decide, not the words that the checkpoint of yesterday holds."""
    for patience, reached in ((2, 60), (2, 60), (3, 80), (0, 100)):
        loop.train_and_evaluate(dataclasses.replace(STILL, patience=patience, num_steps=100), tmp_path / "stopped")
        assert evaluated_at(tmp_path / "stopped")[-1] == reached
    loop.train_and_evaluate(dataclasses.replace(STILL, num_steps=100), tmp_path / "through")
    states = [final_state(tmp_path / name, STILL) for name in ("stopped", "through")]
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.exhaustive
def test_another_target_goes_on(tmp_path):
    for target, reached in ((0.01, 20), (0.999, 60)):
        loop.train_and_evaluate(dataclasses.replace(CONFIG, target_value=target), tmp_path)
        assert evaluated_at(tmp_path)[-1] == reached


@pytest.mark.parametrize(
    ("settings", "progress", "words"),
    [
        ({"patience": 2}, Progress(0.7, 20, 1), None),
        ({"patience": 2}, Progress(0.7, 20, 2), "and 2 of --patience=2 evaluations without a better one"),
        ({"patience": 1}, Progress(0.7, 20, 5), "0.700000 at step 20, and 5 of --patience=1 evaluations"),
        ({"patience": 2}, Progress(None, None, 2), "no val auc so far, and 2 of --patience=2"),
        ({"target_value": 0.7}, Progress(0.7, 20, 0), "0.700000 at step 20 reached the target 0.7"),
        ({"target_value": 0.71}, Progress(0.7, 20, 9), None),
        ({"target_value": 0.5}, Progress(), None),
    ],
)
def test_stopping_rules(settings, progress, words):
    told = stopping(dataclasses.replace(CONFIG, **settings), progress)
    assert told is None if words is None else words in told


@pytest.fixture
def finished(tmp_path):
    return tmp_path, loop.train_and_evaluate(CONFIG, tmp_path)


@pytest.mark.exhaustive
def test_a_finished_run_again_keeps_its_speed_and_cost(finished):
    workdir, result = finished
    again = loop.train_and_evaluate(CONFIG, workdir)
    assert again == result and json.loads((workdir / "result.json").read_text()) == json.loads(json.dumps(result))


def test_fewer_steps_than_done_change_nothing(finished):
    workdir, _ = finished
    before = contents(workdir)
    with pytest.raises(ConfigError, match="is at step 60 already, beyond the 40 asked for; nothing was changed"):
        loop.train_and_evaluate(dataclasses.replace(CONFIG, num_steps=40), workdir, "--num_steps=40\n")
    assert contents(workdir) == before


def test_another_metric_is_not_compared_with_the_best_of_the_first(finished):
    other = dataclasses.replace(CONFIG, target_metric="log_loss", num_steps=80)
    with pytest.raises(ConfigError, match="chose its best checkpoint by auc, not by --target_metric=log_loss"):
        loop.train_and_evaluate(other, finished[0])


@pytest.mark.exhaustive
def test_so_it_is_where_a_checkpoint_does_not_name_its_metric(tmp_path, monkeypatch):
    """As those of before it was noted: config.json has it."""
    with monkeypatch.context() as then:
        record_of = loop.record_of
        then.setattr(loop, "record_of", lambda run, progress: {**record_of(run, progress), "progress": OLD_PROGRESS})
        loop.train_and_evaluate(dataclasses.replace(CONFIG, num_steps=20), tmp_path)
    with pytest.raises(ConfigError, match="chose its best checkpoint by auc, not by --target_metric=accuracy"):
        loop.train_and_evaluate(dataclasses.replace(CONFIG, target_metric="accuracy"), tmp_path)
    loop.train_and_evaluate(CONFIG, tmp_path)


def test_a_run_that_went_back_keeps_its_own_best(finished, caplog):
    """As after a damaged latest checkpoint: best/ then holds a step that this run never came to."""
    workdir, _ = finished
    shutil.rmtree(workdir / "checkpoints" / "latest" / "60")
    with caplog.at_level("WARNING", logger="dlrm_jax"):
        wild = dataclasses.replace(WILD, allow_schedule_change=True, eval_every=4)
        result = loop.train_and_evaluate(wild, workdir)
    assert "best checkpoint, of step 40, is missing (one of step 60 is there): the best from here on" in caplog.text
    aucs = {line["step"]: line["auc"] for line in read_metrics(workdir) if line["split"] == "val"}
    own = max(auc for step, auc in aucs.items() if step > 50)
    assert own < aucs[40], "what was best before must not be what these are compared with"
    assert result["val"]["auc"] == own == aucs[result["step"]]
    assert int(trained.restore(workdir, "best").state.step) == result["step"]


@pytest.mark.exhaustive
def test_only_what_is_of_the_best_checkpoint_renews_the_result(tmp_path):
    result = loop.train_and_evaluate(dataclasses.replace(STILL, num_steps=60), tmp_path)
    assert result["step"] == 20
    before = contents(tmp_path)
    evaluate.renew_result(tmp_path, {"step": 60})
    assert contents(tmp_path) == before
    evaluate.renew_result(tmp_path, {"step": 20, "test": None})
    assert json.loads((tmp_path / "result.json").read_text()) == {"step": 20, "test": None}


def test_another_learning_rate_needs_its_flag_and_is_written_down(tmp_path):
    loop.train_and_evaluate(dataclasses.replace(CONFIG, num_steps=30), tmp_path)
    with pytest.raises(ConfigError, match=r"or go on with --allow_schedule_change\. .*learning_rate: 0\.001 != 0\.01"):
        loop.train_and_evaluate(LOWERED, tmp_path)
    allowed = dataclasses.replace(LOWERED, allow_schedule_change=True)
    for _ in range(2):  # The second one has nothing to change.
        loop.train_and_evaluate(allowed, tmp_path)
        assert rates(tmp_path) == [0.01] * 3 + [0.001] * 3
        said = json.loads((tmp_path / "config.json").read_text())
        assert said["optimizer"]["schedule"]["learning_rate"] == 0.001
        earlier = {"until_step": 30} | dataclasses.asdict(CONFIG.optimizer.schedule)
        assert said["earlier_schedules"] == [earlier]
    assert trained.load_config(tmp_path) == allowed
    for kind in ("best", "latest"):
        assert trained.restore(tmp_path, kind).config.optimizer == allowed.optimizer


@pytest.mark.exhaustive
def test_the_flag_lets_nothing_else_pass_and_changes_nothing_by_itself(tmp_path):
    for steps in (30, 60):
        loop.train_and_evaluate(
            dataclasses.replace(CONFIG, num_steps=steps, allow_schedule_change=steps > 30), tmp_path
        )
    assert "earlier_schedules" not in json.loads((tmp_path / "config.json").read_text())
    loop.train_and_evaluate(CONFIG, tmp_path / "through")
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path), final_state(tmp_path / "through"))
    for other in (
        dataclasses.replace(LOWERED, seed=1),
        dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, eps=1e-3)),
    ):
        with pytest.raises(ConfigError, match=r"another --workdir or the same settings\. Diff"):
            loop.train_and_evaluate(dataclasses.replace(other, allow_schedule_change=True), tmp_path)


def test_what_a_batch_larger_than_the_data_and_a_late_evaluation_do_is_said(tmp_path, caplog):
    data = dataclasses.replace(CONFIG.data, num_examples=100)
    with caplog.at_level("WARNING", logger="dlrm_jax"):
        run = Run(dataclasses.replace(CONFIG, data=data, batch_size=100, num_steps=3, eval_every=9), tmp_path)
    assert "80 training rows, the rest of --batch_size=100 is padding" in caplog.text
    assert "--eval_every=9 is beyond the last step, 3: val is scored once, at the end" in caplog.text
    assert run.num_steps == 3


def test_stopping_rules_need_val_rows(tmp_path, monkeypatch, caplog):
    honest = opening.load_dataset(CONFIG.data)
    rows = honest.splits["val"]
    none = dataclasses.replace(rows, **{name: column[:0] for name, column in vars(rows).items() if column is not None})
    without = dataclasses.replace(honest, splits={**honest.splits, "val": none})
    monkeypatch.setattr(opening, "load_dataset", lambda *_: without)
    with pytest.raises(ConfigError, match=r"--target_value=0\.7 needs val rows, and planted has none"):
        loop.train_and_evaluate(dataclasses.replace(CONFIG, target_value=0.7), tmp_path)
    with caplog.at_level("WARNING", logger="dlrm_jax"):
        assert loop.train_and_evaluate(dataclasses.replace(CONFIG, patience=1, num_steps=3), tmp_path)["step"] == 3
    assert "planted has no val rows: all 3 steps are taken, whatever --patience" in caplog.text
