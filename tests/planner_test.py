"""Tests plans: every table placed, ranked by cost, refused where they cannot be; and the command that shows them."""

import dataclasses
import json
import subprocess
import sys

import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.sharding.cost import Load
from dlrm_jax.sharding.hardware import HARDWARE, at_hand, find
from dlrm_jax.sharding.mesh import MeshShape, parse_mesh
from dlrm_jax.sharding.options import ShardingOptions, choose_plan
from dlrm_jax.sharding.plan import SHARDINGS, Placement, make_plan, plan_from_dict, read_overrides
from dlrm_jax.sharding.planner import AUTO, Setting, auto_plan, does_not_fit, ranking
from dlrm_jax.sharding.topology import parse_topology
from tests.cost_test import model
from tests.helpers import ROOT, optimizer

SETTING = Setting(model(), optimizer("rowwise_adagrad"), MeshShape(1, 8), Load(2048), HARDWARE["h100"])


def with_memory(num_bytes: float) -> Setting:
    return dataclasses.replace(SETTING, hardware=dataclasses.replace(HARDWARE["h100"], memory_bytes=num_bytes))


def test_auto_is_at_least_as_good_as_every_uniform_plan():
    ranked = ranking(SETTING)
    assert {name for name, _ in ranked} == {*SHARDINGS, AUTO}
    costs = dict(ranked)
    assert all(costs[AUTO].step_seconds <= costs[kind].step_seconds for kind in SHARDINGS)
    assert [SETTING.rank_key(cost) for _, cost in ranked] == sorted(SETTING.rank_key(cost) for _, cost in ranked)
    assert set(auto_plan(SETTING).tables) == {table.name for table in SETTING.model.tables}
    assert auto_plan(SETTING) == auto_plan(SETTING)


def test_what_does_not_fit_whole_is_split():
    tight = with_memory(40e6)
    assert tight.over(tight.cost("data_parallel")) > 0
    plan = auto_plan(tight)
    assert tight.over(tight.cost_of(plan)) <= 0
    assert plan.tables["t0"].sharding != "data_parallel"


def test_a_plan_that_cannot_fit_says_by_how_much_and_what_would_help():
    small = with_memory(12e6)
    with pytest.raises(ConfigError, match=r"needs 0\.0\d GB a device, 0\.0\d GB more than .* usable of h100; with the"):
        auto_plan(small)
    tiny = with_memory(1e3)
    assert "make --batch_size smaller" in does_not_fit(tiny, tiny.cost("row_wise"))


def test_table_wise_balances_what_devices_carry():
    plan = make_plan(model(), MeshShape(1, 3), "table_wise")
    rows = [0, 0, 0]
    for table in model().tables:
        rows[plan.tables[table.name].first] += table.num_embeddings
    assert min(rows) > 0 and max(rows) == 1_000_000


def test_plans_survive_json_and_overrides_win(tmp_path):
    plan = make_plan(model(), MeshShape(2, 4), "row_wise", {"t1": "column_wise", "t2": Placement("table_wise", 3, 1)})
    assert plan.tables["t1"].sharding == "column_wise" and plan.tables["t2"].first == 3
    assert plan_from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_dict()))
    again = choose_plan(model(), ShardingOptions("table_wise", str(path)), MeshShape(2, 4), None)
    assert again == plan
    path.write_text('{"tables": {"t0": "column_wise"}}')
    mixed = choose_plan(model(), ShardingOptions("row_wise", str(path)), MeshShape(1, 4), None)
    assert mixed.tables["t0"].sharding == "column_wise" and mixed.tables["t1"].sharding == "row_wise"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"absent": "row_wise"}, "speaks of absent"),
        ({"t0": "sideways"}, "sharding of table 't0' is 'sideways'; choose one of"),
        (
            {"t0": Placement("table_wise", 4, 1)},
            "planned table_wise on shards 4 to 4, but the model axis has 4",
        ),
        ({"t0": Placement("row_wise", 0, 2)}, "the model axis has 4"),
    ],
)
def test_overrides_that_cannot_be(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(model(), MeshShape(1, 4), "row_wise", overrides)


@pytest.mark.parametrize("text", ["[]", "{", '{"tables": 3}', '{"tables": {"t0": {"first": 1}}}'])
def test_a_file_that_is_no_plan_is_named(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"plan\.json is not a sharding plan"):
        read_overrides(path)


def test_meshes_topologies_and_hardware_as_text():
    assert parse_mesh("", 8) == MeshShape(1, 8) and parse_mesh("data:2,model:4", 8) == MeshShape(2, 4)
    assert parse_mesh("model:2", 8) == MeshShape(1, 2)
    for text in ("data:2,model:8", "rows:2", "data:x", "data:0"):
        with pytest.raises(ConfigError, match="mesh"):
            parse_mesh(text, 8)
    with pytest.raises(ConfigError, match=r"has 16 devices, but there are 8; .* set JAX_NUM_CPU_DEVICES=16 \(with"):
        parse_mesh("data:2,model:8", 8)
    assert parse_topology("v5p:4x4x4").num_chips == 64
    for text in ("v5p", "v5p:4x4", "v9:2x2", "v5e:0x2", "v5e:axb"):
        with pytest.raises(ConfigError, match="--topology"):
            parse_topology(text)
    with pytest.raises(ConfigError, match="--hardware=abacus is not known; choose one of h100"):
        find("abacus")
    assert at_hand("NVIDIA H100 80GB HBM3", "gpu").name == "h100" and at_hand("TPU v5 lite", "tpu").name == "v5e"
    assert at_hand("cpu", "cpu").name == "cpu"


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dlrm_jax.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


KAGGLE = "--flagfile=experiments/shape_kaggle.flags"


@pytest.mark.end_to_end
def test_the_command_plans_without_touching_a_device(tmp_path):
    plan, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    done = run(KAGGLE, "--devices=8", "--hardware=h100", f"--json={plan}", f"--picture={picture}")
    assert done.returncode == 0, done.stderr
    for words in ("26 tables, 33,762,577 rows of 16", "C26", "tables on a device: least", "predicted step:", "fits"):
        assert words in done.stdout
    assert all(kind in done.stdout for kind in (*SHARDINGS, AUTO))
    values = json.loads(plan.read_text())
    assert len(values["tables"]) == 26 and set(values["ranking"]) == {*SHARDINGS, AUTO}
    assert picture.stat().st_size > 10_000
    again = run(KAGGLE, "--devices=8", "--hardware=h100", f"--sharding_plan={plan}", "--sharding=table_wise")
    assert again.returncode == 0 and again.stdout == done.stdout


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--hardware=cpu", "--devices=1", "--embedding_dim=128", "--bottom_mlp=8,128"), "GB more than the"),
        (("--hardware=pea",), "--hardware=pea is not known"),
        (("--hardware=h100", "--mesh=rows:2"), "is not data:N or model:N"),
        (("--hardware=h100", "--devices=2", "--mesh=model:4"), "there are 2; make it smaller, or plan for --devices=4"),
        (("--hardware=h100", "--sharding_plan=nowhere.json"), "nowhere.json is not a file"),
        (("--topology=v5p:4x4",), "v5p has 3 axes"),
    ],
)
def test_the_command_refuses_in_one_line(flags, message):
    done = run(KAGGLE, *flags)
    assert done.returncode == 1 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")
