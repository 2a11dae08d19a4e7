"""Tests `dlrm_jax/plan.py`: what it writes goes back into training unchanged, whatever the data and the devices."""

import dataclasses
import json
import pathlib

import pytest

from dlrm_jax.api.planning import model_of, resident_rows
from dlrm_jax.config import ConfigError, LossConfig
from dlrm_jax.data.read.load import DataConfig, load_dataset
from dlrm_jax.data.schema.schema import Dense, Label, Schema, Sparse, Split
from dlrm_jax.host.mesh import parse_mesh
from dlrm_jax.planning import planner, report
from dlrm_jax.planning.cost import RESIDENT
from dlrm_jax.planning.hardware import HARDWARE
from dlrm_jax.training.options import ShardingOptions, choose_plan
from dlrm_jax.training.placement import load_of, place_run, prediction, setting_of
from dlrm_jax.training.reporting import write_json_atomically
from dlrm_jax.training.run_config import ModelOptions, RunConfig
from tests.data.criteo_test import ROWS, write_txt
from tests.data.movielens_test import write_atomic
from tests.helpers import SHARDINGS, optimizer
from tests.prepared_helpers import prepare_text


def prepared(directory: pathlib.Path) -> DataConfig:
    text = "label,x,user,item\n" + "".join(f"{i % 2},{i},u{i % 7},i{i * i % 11}\n" for i in range(60))
    log = Schema("mine", Label("label"), (Dense("x"),), (Sparse("user"), Sparse("item")), split=Split("random"))
    return DataConfig(data_dir=str(prepare_text(directory, text, log)))


def criteo(directory: pathlib.Path) -> DataConfig:
    write_txt(directory, ROWS)
    return DataConfig("criteo_kaggle", str(directory))


SYNTHETIC = DataConfig("synthetic", num_examples=400, table_sizes=(50, 60, 7), hotness=(3, 1, 4), num_dense=2)
DATA = {
    "planted": lambda directory: DataConfig(num_examples=400),
    "synthetic": lambda directory: SYNTHETIC,
    "synthetic, cut": lambda directory: dataclasses.replace(SYNTHETIC, max_rows_per_table=20),
    **{
        f"synthetic, {way} bags": lambda directory, way=way: dataclasses.replace(
            SYNTHETIC, hotness=(1,), multi_hot=way, multi_hot_sizes=(2, 3, 1)
        )
        for way in ("compatible", "virtual")
    },
    "movielens": lambda directory: DataConfig("movielens_100k", write_atomic(directory)),
    "criteo": criteo,
    "prepared": prepared,
}
MODEL = ModelOptions(embedding_dim=4, bottom_mlp=(4,), top_mlp=(1,))


def run_of(data: DataConfig, **sharding) -> RunConfig:
    return RunConfig(data, MODEL, LossConfig(), optimizer(), 16, sharding=ShardingOptions(**sharding))


def planned(config: RunConfig, path: pathlib.Path) -> dict:
    """What `dlrm_jax.plan --json=path` does."""
    mesh = parse_mesh(config.sharding.mesh, 8)
    setting = planner.Setting(model_of(config, path.parent), config.optimizer, mesh, load_of(config), HARDWARE["cpu"])
    ranked = planner.ranking(setting)
    plan = choose_plan(setting.model, config.sharding, mesh, dict(ranked)[planner.AUTO].plan)
    write_json_atomically(path, report.as_dict(setting, setting.cost_of(plan), ranked))
    return plan.to_dict()


@pytest.mark.parametrize("name", DATA)
@pytest.mark.sample(1)
def test_a_plan_goes_back_into_training_unchanged(tmp_path, name):
    data = DATA[name](tmp_path)
    dataset = load_dataset(data, workdir=tmp_path)
    model = MODEL.build(dataset)
    assert model_of(run_of(data), tmp_path) == model
    for mesh, shardings in (
        ("model:8", (*SHARDINGS, planner.AUTO)),
        ("data:2,model:2", ["auto"]),
        ("model:1", ["auto"]),
    ):
        for sharding in shardings:
            plan = planned(run_of(data, sharding=sharding, mesh=mesh), tmp_path / "plan.json")
            placed = place_run(run_of(data, plan=str(tmp_path / "plan.json"), mesh=mesh), model, dataset)
            if mesh != "model:1":  # On one device all types are the same, and called data_parallel.
                assert placed.plan.to_dict() == plan


@pytest.mark.parametrize("mesh", ["model:1", "model:2"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is not a file"),
        ("{", "is not a sharding plan"),
        ("[]", "is not a sharding plan"),
        ('{"tables": {"user": 3}}', "is not a sharding plan"),
        ('{"tables": {"user": {"sharding": "row_wise", "first": 0, "count": "two"}}}', "is not a sharding plan"),
        ('{"tables": {"nobody": "row_wise"}}', "speaks of nobody, which the model does not have; it has user, item"),
        ('{"tables": {"user": "sideways"}}', "'sideways'; choose one of"),
        ('{"tables": {"user": {"sharding": "row_wise", "first": 0, "count": 8}}}', "make the plan anew"),
    ],
)
@pytest.mark.sample(6)
def test_a_plan_is_checked_on_one_device_too(tmp_path, mesh, text, words):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    config = run_of(DataConfig(num_examples=400), plan=str(path), mesh=mesh)
    dataset = load_dataset(config.data)
    with pytest.raises(ConfigError, match=words):
        place_run(config, MODEL.build(dataset), dataset)


def test_a_plan_of_many_unknown_tables_is_one_short_line(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"tables": {f"table_{i}": "row_wise" for i in range(1000)}}))
    config = run_of(DataConfig(num_examples=400), plan=str(tmp_path / "plan.json"))
    dataset = load_dataset(config.data)
    with pytest.raises(ConfigError) as error:
        place_run(config, MODEL.build(dataset), dataset)
    assert len(str(error.value)) < 300


def test_what_is_planned_is_what_a_run_predicts_for_itself():
    flags = {"sharding": "row_wise", "mesh": "model:4"}
    exchange = {"exchange_dtype": "bfloat16", "exchange_capacity": 8}
    costs = []
    for given, parts in (({}, 1), (exchange, 1), ({}, 4), (exchange, 4)):
        config = dataclasses.replace(run_of(SYNTHETIC, **flags, **given), batch_size=256, num_micro_batches=parts)
        dataset = load_dataset(config.data)
        setting = setting_of(config, model_of(config), parse_mesh("model:4", 4))
        costs.append(setting.cost_of(choose_plan(setting.model, config.sharding, setting.mesh, None)))
        if given:
            told = prediction(config, place_run(config, setting.model, dataset))
            assert (told.sent, told.memory, told.options) == (costs[-1].sent, costs[-1].memory, costs[-1].options)
    plain, narrow, cut, both = costs
    assert narrow.sent.total < plain.sent.total == cut.sent.total and both.sent == narrow.sent
    assert cut.memory["activations"] < plain.memory["activations"]
    assert both.memory["activations"] < narrow.memory["activations"]


def test_rows_that_stay_on_devices_are_planned_for():
    config = dataclasses.replace(run_of(SYNTHETIC, sharding="row_wise"), data_on_device="always")
    rows = load_dataset(config.data).splits
    assert resident_rows(config) == len(rows["train"]) + len(rows["val"])
    assert resident_rows(dataclasses.replace(config, data_on_device="auto")) == 0
    setting = setting_of(config, model_of(config), parse_mesh("model:4", 4))
    load = dataclasses.replace(setting.load, resident_rows=10**9)
    costs = [
        one.cost_of(choose_plan(one.model, config.sharding, one.mesh, None))
        for one in (setting, dataclasses.replace(setting, load=load))
    ]
    more = costs[1].bytes_held - costs[0].bytes_held
    assert more == costs[1].memory[RESIDENT] == 10**9 * 4 * (setting.model.num_dense + setting.model.num_slots + 2)
    assert "--data_on_device=auto" in planner.remedy(setting, costs[1], more)


GIVEN = {"group_size": 2, "exchange_dtype": "bfloat16", "exchange_capacity": 64}


@pytest.mark.parametrize(
    ("mesh", "sharding", "unused"),
    [
        ("model:1", {"sharding": "row_wise", "pipeline": True}, "on one device: --sharding=row_wise, --group_size=2, "
         "--exchange_dtype=bfloat16, --exchange_capacity=64, --pipeline_exchange=true"),
        ("model:4", {"sharding": "row_wise"}, "under this plan: --group_size=2"),
        ("model:4", {"sharding": "table_row_wise"}, ""),
        ("model:4", {"sharding": "table_wise"}, "under this plan: --group_size=2, --exchange_capacity=64"),
        ("model:4", {"sharding": "data_parallel"}, "--exchange_capacity=64, --exchange_dtype=bfloat16"),
    ],
)  # fmt: skip
def test_placement_flags_without_effect_are_said(mesh, sharding, unused, caplog):
    config = run_of(DataConfig(num_examples=400), mesh=mesh, **GIVEN, **sharding)
    dataset = load_dataset(config.data)
    with caplog.at_level("WARNING", logger="dlrm_jax"):
        place_run(config, MODEL.build(dataset), dataset)
    assert unused in caplog.text and ("without effect" in caplog.text) == bool(unused)


def test_one_device_by_default_says_nothing(caplog):
    config = run_of(DataConfig(num_examples=400), mesh="model:1")
    dataset = load_dataset(config.data)
    with caplog.at_level("WARNING", logger="dlrm_jax"):
        place_run(config, MODEL.build(dataset), dataset)
    assert not caplog.text
