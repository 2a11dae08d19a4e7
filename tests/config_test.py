"""Tests `dlrm_jax/config`, `dlrm_jax/training/run_config.py`: bad settings are refused in words."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm_jax.api.trained import load_config
from dlrm_jax.config import (
    ConfigError,
    FeatureConfig,
    HiddenConfig,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TableConfig,
    differences,
    tell,
)
from dlrm_jax.data.read.load import DataConfig
from dlrm_jax.tables.plan import read_overrides
from dlrm_jax.training.run_config import ModelOptions, RunConfig, from_dict
from dlrm_jax.training.table_settings import read_table_settings
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
        (
            lambda: tiny_model(table_init="uniform"),
            "table_init is 'uniform'; choose one of dlrm, flax, normal:DEVIATION",
        ),
        (lambda: tiny_model(table_init="normal:-1"), "table_init is 'normal:-1'; give a standard deviation"),
        (
            lambda: tiny_model(table_init="normal:x"),
            "table_init is 'normal:x'; give a standard deviation, as normal:1e-4",
        ),
        (lambda: HiddenConfig(dropout=-0.1), "dropout is -0.1; it must lie in [0, 1)"),
        (lambda: tiny_model(bottom_mlp=(5, 3)), "ends in 3 but embedding_dim is 4"),
        (lambda: tiny_model(top_mlp=(6, 2)), "ends in 2; the last width must be 1"),
        (lambda: dataclasses.replace(tiny_model(), interaction="cat"), "'cat'; it must be an InteractionConfig"),
        (lambda: tiny_model(num_dense=-1), "num_dense is -1"),
        (lambda: tiny_model(num_dense=0), "bottom_mlp is (5, 4) but num_dense is 0; leave bottom_mlp empty"),
        (lambda: tiny_model(bottom_mlp=()), "bottom_mlp is empty; it needs at least one layer"),
        (
            lambda: tiny_model(embedded_columns=(1, 3)),
            "embedded_columns is (1, 3); they must rise, and be of 3 numbers",
        ),
        (lambda: tiny_model(embedded_columns=(1,), bottom_mlp=()), "bottom_mlp is empty"),
        (
            lambda: tiny_model(num_dense=0, bottom_mlp=(), embed_numbers=True),
            "embed_numbers is on, but the data has no numbers; leave it out",
        ),
        (lambda: tiny_model(features=(FeatureConfig("x", "nowhere"),)), "'x' reads table 'nowhere'"),
        (lambda: tiny_model(features=(FeatureConfig("x", "user"),)), "no feature reads table flag, item"),
        (
            lambda: tiny_model(
                tables=(TableConfig("user", 11, 4), TableConfig("item", 7, 8), TableConfig("flag", 1, 4))
            ),
            "bottom_mlp ends in 4 but embedding_dim is 8",
        ),
        (lambda: LossConfig(threshold=0.5), "loss_threshold is 0.5"),
        (lambda: LossConfig("wbce", (1.0, -1.0)), "class_weights is (1.0, -1.0); it must not be negative"),
        (lambda: ScheduleConfig(learning_rate=0.0), "learning_rate is 0.0"),
        (lambda: ScheduleConfig(0.1, warmup_steps=5, decay_start_step=3, decay_steps=2), "before the end of warm-up"),
        (lambda: OptimizerConfig(ScheduleConfig(0.1), table_l2=-1.0), "table_l2 is -1.0"),
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
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_dict(dict(values)) == from_dict(values | {"ids_out_of_range": "error"}) == config  # As of old.


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


def test_other_data_is_told_in_a_short_line_names_first():
    ours = {"data": {"fingerprint": "a" * 300 + "b", "name": "mine"}, "model": {"tables": [{"name": "t"}] * 26}}
    theirs = {"data": {"fingerprint": "a" * 300 + "c", "name": "yours"}, "model": {"tables": [{"name": "t"}] * 7}}
    told = tell(differences(ours, theirs))
    assert told.startswith("data.name: 'mine' != 'yours'; model.tables: 26 of them != 7 of them; data.fingerprint: ...")
    assert told.endswith("aab' != ...aaaaaaaaaac'")


JSON = st.recursive(
    st.integers() | st.floats(allow_nan=False) | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=30) | st.dictionaries(st.text(max_size=100), inner, max_size=30),
    max_leaves=60,
)


@given(JSON, JSON)
def test_no_difference_is_told_in_a_long_line(ours, theirs):
    different = differences(ours, theirs)
    assert (not different) == (ours == theirs)
    assert len(tell(different)) < 600


NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize(
    "make",
    [
        *(lambda v, name=f.name: ScheduleConfig(**{"learning_rate": 0.1, name: v})
          for f in dataclasses.fields(ScheduleConfig) if f.type is float),
        *(lambda v, name=f.name: OptimizerConfig(ScheduleConfig(0.1), dense="adamw", **{name: v})
          for f in dataclasses.fields(OptimizerConfig) if f.type is float),
        lambda v: LossConfig("wbce", (1.0, v)),
        lambda v: LossConfig("wbce", (v, 1.0)),
        lambda v: LossConfig(threshold=v),
        lambda v: DataConfig("synthetic", id_skew=v),
        lambda v: run_config(target_value=v),
    ],
)  # fmt: skip
def test_numbers_that_are_not_finite_are_refused(make, value):
    with pytest.raises(ConfigError, match=f"{value}|must"):
        make(value)


@pytest.mark.parametrize(("metric", "value"), [("auc", 1.5), ("auc", -0.1), ("accuracy", 2.0), ("log_loss", -1.0)])
def test_a_target_that_no_model_reaches_is_refused(metric, value):
    with pytest.raises(ConfigError, match=f"target_value is {value}, which {metric} cannot reach"):
        run_config(target_metric=metric, target_value=value)


def test_a_seed_beyond_64_bits_is_refused():
    with pytest.raises(ConfigError, match="seed is 9223372036854775808; it must be below"):
        run_config(seed=2**63)


def test_class_weights_that_train_nothing_are_refused():
    with pytest.raises(ConfigError, match="class_weights is 0,0"):
        LossConfig("wbce", (0.0, 0.0))
    assert LossConfig("wbce", (0.0, 1.0)).class_weights == (0.0, 1.0)


@pytest.mark.parametrize(
    ("most", "changes", "words"),
    [(18, {}, "moves all 19 rows .* --most_rows_updated=19"), (19, {"learned_pooling": True}, "--learned_pooling")],
)
def test_an_update_of_all_rows_is_refused_where_it_costs_too_much_or_cannot_be(most, changes, words):
    settings = dataclasses.replace(optimizer(), table_update="all")
    run_config(optimizer=settings, most_rows_updated=19).check_model(tiny_model())
    with pytest.raises(ConfigError, match=words):
        run_config(optimizer=settings, most_rows_updated=most).check_model(tiny_model(**changes))


def test_numbers_that_no_machine_holds_are_refused():
    with pytest.raises(ConfigError, match=r"learning_rate is 1000.*at most 64 bits"):
        ScheduleConfig(10**400)


def of_config(path):
    load_config(path.rename(path.with_name("config.json")).parent)


@pytest.mark.parametrize("read", [read_overrides, lambda path: read_table_settings(path.read_text()), of_config])
def test_a_file_that_is_nested_without_end_is_one_line(tmp_path, read):
    path = tmp_path / "file"
    path.write_text('{"tables": ' + "[" * 100_000)
    with pytest.raises(ConfigError, match="nested too deeply"):
        read(path)
