"""Tests `dlrm_jax/training/loop.py`: results, stopping rules, and what happens to a NaN."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from dlrm_jax.api import trained
from dlrm_jax.config import ConfigError
from dlrm_jax.data.generate import planted
from dlrm_jax.data.read.dataset import Split
from dlrm_jax.data.read.load import DataConfig
from dlrm_jax.data.schema.schema import Split as ByRandom
from dlrm_jax.training import checkpoint, loop, reporting
from tests.prepared_helpers import prepare_text, schema
from tests.tables.native_test import needs_compiler
from tests.training.resume_test import CONFIG, final_state


def lines(workdir, split: str) -> list[dict]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["split"] == split]


def test_result_and_files_are_complete(tmp_path):
    result = loop.train_and_evaluate(CONFIG, tmp_path, "--seed=0\n")
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert set(result) == {
        *("step", "val", "test", "optimum", "samples_per_second", "input_wait_fraction", "step_cost", "seed"),
        *("host_wait_fraction", "versions"),
    }
    for side in ("predicted", "measured"):
        assert all(result["step_cost"][side][what] > 0 for what in ("seconds", "bytes"))
    for split in ("val", "test"):
        assert {"auc", "log_loss", "normalized_entropy", "calibration", "accuracy", "num_samples"} <= set(result[split])
        assert result[split]["num_samples"] == 200
    assert result["samples_per_second"] > 0 and 0 <= result["input_wait_fraction"] <= 1
    assert 0 <= result["host_wait_fraction"] <= 1
    assert all({"step", "split", "loss"} <= set(line) for line in lines(tmp_path, "train") + lines(tmp_path, "val"))
    assert "auc" in lines(tmp_path, "val")[0]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "flags.txt").read_text() == "--seed=0\n"
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.exhaustive
def test_learning_beats_chance_and_shuffled_labels_do_not(tmp_path, monkeypatch):
    config = dataclasses.replace(
        CONFIG, data=dataclasses.replace(CONFIG.data, num_examples=20000), num_steps=0, num_epochs=3, eval_every=0
    )
    result = loop.train_and_evaluate(config, tmp_path / "learn")
    assert result["test"]["auc"] > 0.68
    honest = planted.generate

    def shuffled(seed: int, num_examples: int):
        data = honest(seed, num_examples)
        order = np.random.default_rng(1).permutation(len(data.splits["train"]))
        train = dataclasses.replace(data.splits["train"], label_R=data.splits["train"].label_R[order])
        return dataclasses.replace(data, splits={**data.splits, "train": train})

    monkeypatch.setattr(planted, "generate", shuffled)
    assert abs(loop.train_and_evaluate(config, tmp_path / "noise")["test"]["auc"] - 0.5) < 0.1


def test_best_checkpoint_is_the_best_evaluation(tmp_path):
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, dense="sgd"), num_steps=200)
    result = loop.train_and_evaluate(config, tmp_path)
    evaluations = lines(tmp_path, "val")
    best = max(evaluations, key=lambda line: line["auc"])
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.find("best") == ("best", best["step"])
    assert result["step"] == best["step"]
    assert result["val"]["auc"] == pytest.approx(best["auc"], abs=1e-12)


@pytest.mark.exhaustive
def test_reaching_the_target_stops_the_run_for_good(tmp_path):
    config = dataclasses.replace(CONFIG, target_value=0.01)
    loop.train_and_evaluate(config, tmp_path)
    assert [line["step"] for line in lines(tmp_path, "val")] == [20]
    loop.train_and_evaluate(config, tmp_path)
    assert int(final_state(tmp_path).step) == 20


def test_patience_stops_after_evaluations_without_improvement(tmp_path):
    # With the smallest of learning rates nothing improves after the first evaluations but by chance.
    schedule = dataclasses.replace(CONFIG.optimizer.schedule, learning_rate=1e-30)
    slow = dataclasses.replace(CONFIG.optimizer, schedule=schedule)
    loop.train_and_evaluate(dataclasses.replace(CONFIG, optimizer=slow, patience=2, num_steps=200), tmp_path)
    assert [line["step"] for line in lines(tmp_path, "val")] == [20, 40, 60]


@pytest.mark.exhaustive
def test_several_steps_a_dispatch_are_the_same_run(tmp_path):
    plain = loop.train_and_evaluate(CONFIG, tmp_path / "plain")
    at_once = dataclasses.replace(CONFIG, steps_per_dispatch=4)  # 4, 4, 1, 1 steps between two checkpoints.
    several = loop.train_and_evaluate(at_once, tmp_path / "several")
    assert several["step"] == plain["step"]
    for split in ("train", "val"):
        ours, theirs = lines(tmp_path / "several", split), lines(tmp_path / "plain", split)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        np.testing.assert_allclose([x["loss"] for x in ours], [x["loss"] for x in theirs], atol=1e-5)
    assert int(final_state(tmp_path / "several").step) == CONFIG.num_steps


BAGS = DataConfig("synthetic", num_examples=2000, table_sizes=(50, 60, 70), hotness=(3, 1, 4), num_dense=13)


@needs_compiler
@pytest.mark.exhaustive
def test_native_kernels_are_the_same_run(tmp_path, caplog):
    bags = dataclasses.replace(CONFIG, data=BAGS, kernels="xla")
    result = loop.train_and_evaluate(bags, tmp_path / "xla")
    with caplog.at_level("INFO", logger="dlrm_jax"):
        native = loop.train_and_evaluate(dataclasses.replace(bags, kernels="native"), tmp_path / "native")
    assert "kernels of the tables: native" in caplog.text
    assert native["test"]["log_loss"] == pytest.approx(result["test"]["log_loss"], abs=1e-5)
    with caplog.at_level("INFO", logger="dlrm_jax"):
        ours, theirs = (final_state(tmp_path / kind, bags) for kind in ("native", "xla"))
    assert caplog.text.count("kernels of the tables were native, and are xla here: what comes is equal up to") == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


@needs_compiler
@pytest.mark.exhaustive
def test_native_kernels_go_on_to_the_same_bits(tmp_path):
    native = dataclasses.replace(CONFIG, data=BAGS, kernels="native")
    loop.train_and_evaluate(native, tmp_path / "through")
    for steps in (30, 60):
        loop.train_and_evaluate(dataclasses.replace(native, num_steps=steps), tmp_path / "stopped")
    through, stopped = (final_state(tmp_path / name, native) for name in ("through", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, through, stopped)


def test_native_kernels_on_several_devices_are_refused(tmp_path):
    several = dataclasses.replace(CONFIG.sharding, mesh="model:2")
    with pytest.raises(ConfigError, match="--kernels=native works on one device; this run has 2"):
        loop.train_and_evaluate(dataclasses.replace(CONFIG, kernels="native", sharding=several), tmp_path)


def test_two_ways_to_run_ahead_are_refused(tmp_path):
    sharding = dataclasses.replace(CONFIG.sharding, pipeline=True)
    with pytest.raises(ConfigError, match="choose one"):
        loop.train_and_evaluate(dataclasses.replace(CONFIG, steps_per_dispatch=4, sharding=sharding), tmp_path)


@pytest.mark.parametrize(
    ("column", "words", "at_once"),
    [("dense_RxN", "'dense_2' is nan", 1), ("label_R", "the label is nan", 1), ("label_R", "the label is nan", 3)],
)
@pytest.mark.sample(1)
def test_nan_stops_the_run_names_the_column_and_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, column, words, at_once
):
    honest = planted.generate(0, 2000)
    config = dataclasses.replace(CONFIG, shuffle=False, num_steps=40, steps_per_dispatch=at_once)
    values = getattr(honest.splits["train"], column).copy()
    values[64 * 15 + 7, ...] = values[64 * 15 + 7, ...] if column == "dense_RxN" else np.nan
    if column == "dense_RxN":
        values[64 * 15 + 7, 2] = np.nan
    poisoned = dataclasses.replace(honest.splits["train"], **{column: values})
    data = dataclasses.replace(honest, splits={**honest.splits, "train": poisoned})
    monkeypatch.setattr(planted, "generate", lambda seed, num_examples: data)
    with pytest.raises(ConfigError) as error:
        loop.train_and_evaluate(config, tmp_path)
    assert words in str(error.value) and "step 16" in str(error.value) and "row 7" in str(error.value)
    with np.load(tmp_path / "bad_batch_step_16.npz") as batch:
        assert len(batch["label_B"]) == 64
    state = final_state(tmp_path)
    assert int(state.step) == 10
    assert all(
        np.isfinite(leaf).all() for leaf in (*state.tables.values(), *state.dense_params["top_mlp"]["layer_0"].values())
    )


def test_divergence_is_named(tmp_path):
    schedule = dataclasses.replace(CONFIG.optimizer.schedule, learning_rate=1e30)
    wild = dataclasses.replace(CONFIG.optimizer, schedule=schedule, dense="sgd", table="sgd")
    with pytest.raises(ConfigError, match="the weights diverged"):
        loop.train_and_evaluate(dataclasses.replace(CONFIG, optimizer=wild), tmp_path)


def test_an_id_outside_its_table_stops_the_run(tmp_path, monkeypatch):
    honest = planted.generate(0, 2000)
    train = honest.splits["train"]
    ids = train.ids_RxK.copy()
    ids[100, 0] = 5000
    splits = {**honest.splits, "train": Split(train.dense_RxN, ids, train.label_R, train.row_R)}
    monkeypatch.setattr(planted, "generate", lambda seed, count: dataclasses.replace(honest, splits=splits))
    with pytest.raises(ConfigError, match="feature 'user', row 100: id 5000 is outside table 'user' of 600 rows"):
        loop.train_and_evaluate(CONFIG, tmp_path)


@pytest.mark.parametrize(("examples", "batch_size"), [(10, 64), (10, 1), (2000, 1999)])
@pytest.mark.sample(1)
def test_odd_sizes_train(tmp_path, examples, batch_size):
    data = dataclasses.replace(CONFIG.data, num_examples=examples)
    config = dataclasses.replace(CONFIG, data=data, batch_size=batch_size, num_steps=3, eval_every=1)
    result = loop.train_and_evaluate(config, tmp_path)
    assert result["test"]["num_samples"] == examples // 10


def test_a_second_training_in_a_workdir_is_refused_and_the_first_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("dlrm_jax.host.files._LOCK_SECONDS", 0.0)
    train = loop.train

    def another_meanwhile(*args):
        with pytest.raises(ConfigError, match=f"another training is running in {tmp_path} .process .*; wait for"):
            loop.train_and_evaluate(CONFIG, tmp_path)
        return train(*args)

    monkeypatch.setattr(loop, "train", another_meanwhile)
    assert loop.train_and_evaluate(CONFIG, tmp_path)["step"] > 0
    monkeypatch.setattr(loop, "train", train)
    loop.train_and_evaluate(CONFIG, tmp_path)


def test_a_run_whose_best_is_deleted_says_so_and_uses_what_is_there(tmp_path, caplog, monkeypatch):
    """Deleted while it runs, and before it goes on; the good latest one is never to be deleted."""
    config = dataclasses.replace(CONFIG, patience=1, target_metric="log_loss")
    monkeypatch.setattr(type(config), "is_better", lambda self, value, than: than is None)  # The first one stays best.
    wait = checkpoint.Checkpoints.wait

    def deleted_at_the_end(self):
        wait(self)
        shutil.rmtree(tmp_path / "checkpoints" / checkpoint.BEST / "20", ignore_errors=True)

    with monkeypatch.context() as patch, caplog.at_level("WARNING", logger="dlrm_jax"):
        patch.setattr(checkpoint.Checkpoints, "wait", deleted_at_the_end)
        assert loop.train_and_evaluate(config, tmp_path)["step"] == 40
    assert "best/20" in caplog.text and "the result is that of the last step, 40" in caplog.text
    caplog.clear()
    more = dataclasses.replace(config, patience=0)
    shutil.rmtree(tmp_path / "checkpoints" / checkpoint.LATEST / "40")
    with caplog.at_level("WARNING", logger="dlrm_jax"):
        assert loop.train_and_evaluate(more, tmp_path)["step"] == 40
    assert "the best checkpoint, of step 20, is missing: the best from here on is kept" in caplog.text
    assert (tmp_path / "checkpoints" / checkpoint.BEST / "40").is_dir()


def test_a_result_that_cannot_be_written_is_not_lost(tmp_path, monkeypatch):
    write = reporting.write_json_atomically

    def full(path, value):
        if path.name == "result.json":
            raise OSError(28, "No space left on device", str(path))
        write(path, value)

    monkeypatch.setattr(reporting, "write_json_atomically", full)
    with pytest.raises(loop.ResultNotWritten, match=r"result\.json: No space left on device") as raised:
        loop.train_and_evaluate(dataclasses.replace(CONFIG, num_steps=10), tmp_path)
    assert raised.value.result["step"] == 10 and raised.value.result["test"]["auc"] > 0


def test_a_reader_goes_on_to_the_newer_checkpoint_when_a_training_deletes_the_old_one(tmp_path, monkeypatch):
    loop.train_and_evaluate(dataclasses.replace(CONFIG, num_steps=20), tmp_path)
    record, directory = checkpoint.Checkpoints.record, tmp_path / "checkpoints" / checkpoint.LATEST

    def deleted_meanwhile(self, kind, step=None):
        if (directory / "20").exists():
            (directory / "20").rename(directory / "30")  # As if the run had got there: only a newer one is left.
        return record(self, kind, step)

    monkeypatch.setattr(checkpoint.Checkpoints, "record", deleted_meanwhile)
    assert int(trained.restore(tmp_path, "latest").state.step) == 20
    shutil.rmtree(directory)
    with pytest.raises(ConfigError, match="no checkpoint 'latest'"):
        trained.restore(tmp_path, "latest")


@pytest.mark.exhaustive
def test_config_names_prepared_data_by_its_own_name(tmp_path):
    """It said planted, which --dataset is by default."""
    text = "label,x,c\n" + "".join(f"{i % 2},{i},u{i % 7}\n" for i in range(60))
    output = prepare_text(tmp_path, text, schema(name="mine", split=ByRandom("random")))
    config = dataclasses.replace(CONFIG, data=DataConfig(data_dir=str(output)), num_steps=2, batch_size=8)
    loop.train_and_evaluate(config, tmp_path / "run")
    said = json.loads((tmp_path / "run" / "config.json").read_text())
    assert said["data"]["dataset"] == "mine"
    assert trained.restore(tmp_path / "run", "latest").dataset.name == "mine"
    moved = output.rename(tmp_path / "moved")
    assert trained.restore(tmp_path / "run", "latest", str(moved)).dataset.name == "mine"
    with pytest.raises(ConfigError, match="holds no prepared data set"):
        trained.restore(tmp_path / "run", "latest")


def test_evaluating_other_data_is_refused_in_a_short_line(tmp_path):
    text = "label,x,c\n" + "".join(f"{i % 2},{i},u{i % 7}\n" for i in range(60))
    output = prepare_text(tmp_path, text, schema(name="mine", split=ByRandom("random")))
    loop.train_and_evaluate(dataclasses.replace(CONFIG, num_steps=2), tmp_path / "run")
    with pytest.raises(ConfigError) as error:
        trained.restore(tmp_path / "run", "latest", str(output))
    told = str(error.value)
    assert "(now != then): data.name: 'mine' != 'planted'; model.features: " in told and len(told) < 400


def test_a_split_of_one_class_is_a_warning(tmp_path, monkeypatch, caplog):
    honest = planted.generate(0, 2000)
    val = honest.splits["val"]
    one_class = dataclasses.replace(val, label_R=np.zeros_like(val.label_R))
    splits = {**honest.splits, "val": one_class}
    monkeypatch.setattr(planted, "generate", lambda seed, count: dataclasses.replace(honest, splits=splits))
    loop.train_and_evaluate(dataclasses.replace(CONFIG, num_steps=2), tmp_path)
    assert [line for line in caplog.messages if line.startswith("split ")] == [
        "split val: all 200 rows have label 0, so it has no AUC; is the label right, and the split?"
    ]
