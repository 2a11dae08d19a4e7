"""Tests `dlrm_jax/config.py`, `dlrm_jax/run_config.py`: bad settings are refused in words."""

import dataclasses
import json

import pytest

from dlrm_jax.config import (
    ConfigError,
    FeatureConfig,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TableConfig,
    differences,
)
from dlrm_jax.data.load import DataConfig
from dlrm_jax.run_config import ModelOptions, RunConfig, from_dict
from tests.helpers import optimizer, tiny_model

MODEL = ModelOptions(embedding_dim=4, bottom_mlp=(4,), top_mlp=(1,))


def run_config(**changes) -> RunConfig:
    fields = {"data": DataConfig(), "model": MODEL, "loss": LossConfig(), "optimizer": optimizer(), "batch_size": 8}
    return RunConfig(**(fields | changes))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TableConfig("t", 0, 4), "'t': num_embeddings is 0"),
        (lambda: TableConfig("t", 2**31, 4), "2147483648; ids are int32"),
        (lambda: FeatureConfig("f", "t", hotness=0), "'f': hotness is 0"),
        (lambda: FeatureConfig("f", "t", pooling="max"), "'max'; choose one of sum, mean"),
        (lambda: tiny_model(bottom_mlp=(5, 3)), "ends in 3 but embedding_dim is 4"),
        (lambda: tiny_model(top_mlp=(6, 2)), "ends in 2; the last width must be 1"),
        (lambda: tiny_model(interaction="sum"), "'sum'; choose one of dot, cat, cross"),
        (lambda: tiny_model(num_dense=0), "num_dense is 0"),
        (lambda: tiny_model(features=(FeatureConfig("x", "nowhere"),)), "'x' reads table 'nowhere'"),
        (lambda: tiny_model(features=(FeatureConfig("x", "user"),)), "no feature reads table flag, item"),
        (
            lambda: tiny_model(
                tables=(TableConfig("user", 11, 4), TableConfig("item", 7, 8), TableConfig("flag", 1, 4))
            ),
            "'item' has embedding_dim 8",
        ),
        (lambda: LossConfig(threshold=0.5), "loss_threshold is 0.5"),
        (lambda: LossConfig("wbce", (1.0, -1.0)), "weights are not negative"),
        (lambda: ScheduleConfig(learning_rate=0.0), "learning_rate is 0.0"),
        (lambda: ScheduleConfig(0.1, warmup_steps=5, decay_start_step=3, decay_steps=2), "before the end of warm-up"),
        (lambda: OptimizerConfig(ScheduleConfig(0.1), table="adam"), "'adam'; choose one of sgd"),
        (lambda: OptimizerConfig(ScheduleConfig(0.1), weight_decay=0.1), "only adamw decays"),
        (lambda: run_config(batch_size=0), "batch_size is 0"),
        (lambda: run_config(batch_size=8, num_micro_batches=3), "8 does not split into 3 equal num_micro_batches"),
        (lambda: run_config(target_metric="f1"), "'f1'; choose one of auc"),
        (lambda: DataConfig("criteo_kaggle"), "--data_dir is missing"),
    ],
)
def test_bad_setting_is_refused_with_its_value(make, words):
    with pytest.raises(ConfigError) as error:
        make()
    assert words in str(error.value)


def test_run_config_survives_json():
    config = run_config(target_value=0.8, loss=LossConfig("wbce", (0.5, 2.0)))
    assert from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_differences_name_the_path_and_both_values():
    ours = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert differences(ours, ours) == []
    assert differences(ours, {"a": {"b": 1, "c": [1, 5]}}) == ["a.c[1]: 2 != 5", "d: 3 != None"]


@pytest.mark.parametrize(("metric", "better", "worse"), [("auc", 0.8, 0.7), ("log_loss", 0.4, 0.5)])
def test_target_metric_knows_its_direction(metric, better, worse):
    config = run_config(target_metric=metric, target_value=(better + worse) / 2)
    assert config.is_better(better, worse) and not config.is_better(worse, better)
    assert config.is_better(worse, None) and not config.is_better(float("nan"), None)
    assert config.reaches_target(better) and not config.reaches_target(worse)
