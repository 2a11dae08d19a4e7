"""Tests `dlrm_jax/training/seeds.py`: several seeds in one command, and going on with it."""

import dataclasses
import json

import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.data.read.load import DataConfig, load_dataset
from dlrm_jax.training import seeds
from dlrm_jax.training.monitor import Interrupted
from dlrm_jax.training.seeds import format_seeds, summary, train_seeds
from tests.data.movielens_test import write_atomic
from tests.training.resume_test import CONFIG

SHORT = dataclasses.replace(CONFIG, num_steps=2, eval_every=0, checkpoint_every=0, seed=3)


def test_seeds_are_runs_of_their_own_that_are_not_run_again(tmp_path, monkeypatch):
    trained, honest = [], seeds.train_and_evaluate

    def train(config, workdir, **rest):
        if len(trained) == 1:
            trained.append(None)
            raise Interrupted(15, 1)
        trained.append(config.seed)
        assert config.data == SHORT.data and workdir == tmp_path / f"seed-{config.seed}"
        return honest(config, workdir, **rest)

    monkeypatch.setattr(seeds, "train_and_evaluate", train)
    with pytest.raises(Interrupted):
        train_seeds(SHORT, tmp_path, 2, "--seed=3\n")
    assert list(json.loads((tmp_path / "seeds.json").read_text())["runs"]) == ["3"]
    written = train_seeds(SHORT, tmp_path, 2, "--seed=3\n")
    assert trained == [3, None, 4]
    assert written == json.loads((tmp_path / "seeds.json").read_text())
    results = [json.loads((tmp_path / f"seed-{seed}" / "result.json").read_text()) for seed in (3, 4)]
    assert [result["seed"] for result in results] == [3, 4]
    aucs = [result["test"]["auc"] for result in results]
    of_auc = written["summary"]["test"]["auc"]
    assert aucs[0] != aucs[1] and of_auc["mean"] == pytest.approx(np.mean(aucs))
    assert (of_auc["minimum"], of_auc["maximum"]) == (min(aucs), max(aucs))
    # Other settings are another matter: they go to the runs, which go on or refuse.
    with pytest.raises(ConfigError, match="already, beyond the 1 asked for"):
        train_seeds(dataclasses.replace(SHORT, num_steps=1), tmp_path, 2)


def test_summary_is_numpys_and_leaves_out_what_is_no_number():
    runs = {
        str(i): {"val": None, "test": {"auc": auc, "brier": brier, "num_samples": 7}}
        for i, (auc, brier) in enumerate([(0.7, 0.2), (0.8, float("nan")), (0.75, 0.1)])
    }
    of_auc = summary(runs)["test"]["auc"]
    aucs = np.array([0.7, 0.8, 0.75])
    want = {"mean": aucs.mean(), "minimum": 0.7, "maximum": 0.8, "spread": 0.1, "deviation": aucs.std(ddof=1)}
    assert (
        of_auc == pytest.approx(want) and summary(runs).keys() == {"test"} and summary(runs)["test"].keys() == {"auc"}
    )
    header, line = format_seeds({"summary": summary(runs)}).splitlines()
    assert header.split()[2:] == ["mean", "minimum", "maximum", "spread", "deviation"]
    assert line.split() == ["test", "auc", "0.75000", "0.70000", "0.80000", "0.10000", "0.05000"]
    assert summary({"0": runs["0"]})["test"]["auc"]["deviation"] == 0


def test_a_directory_of_one_run_and_no_seeds_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a run of one seed"):
        train_seeds(SHORT, tmp_path, 2)
    with pytest.raises(ConfigError, match="--num_seeds=0"):
        train_seeds(SHORT, tmp_path / "other", 0)


def test_a_raw_log_is_prepared_once_for_all_seeds(tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    data = DataConfig("movielens_100k", str(write_atomic(tmp_path / "raw")))
    found = []

    def train(config, workdir, **rest):
        found.append(load_dataset(config.data, workdir=workdir).directory)
        return {"step": 1, "val": {"auc": 0.5}, "test": {"auc": 0.5}}

    monkeypatch.setattr(seeds, "train_and_evaluate", train)
    train_seeds(dataclasses.replace(SHORT, data=data), tmp_path / "run", 2)
    assert [path.parent.name for path in found] == ["seed-3", "seed-4"]
    assert {path.resolve() for path in found} == {(tmp_path / "run" / "data").resolve()}
