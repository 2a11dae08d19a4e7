"""Tests plans: every table placed, ranked by cost, refused where they cannot be; and the command that shows them."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.host import memory
from dlrm_jax.host.mesh import MeshShape, parse_mesh
from dlrm_jax.planning.cost import Load
from dlrm_jax.planning.hardware import HARDWARE, at_hand, find, of_device
from dlrm_jax.planning.planner import AUTO, Setting, auto_plan, does_not_fit, largest_holder, ranking
from dlrm_jax.tables.plan import Placement, make_plan, plan_from_dict, read_overrides
from dlrm_jax.training.options import ShardingOptions, choose_plan
from dlrm_jax.training.topology import parse_topology
from tests.helpers import ROOT, SHARDINGS, optimizer
from tests.planning.cost_test import model

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
    text = does_not_fit(small, small.cost_of(auto_plan(small)))
    assert re.match(
        r"the plan needs 0\.0\d GB a device, 0\.0\d GB more than the 0\.01 GB usable of h100; most of", text
    )
    assert "the largest 't0' (1,000,000 rows of 16: 0.06 GB)" in text
    devices = int(re.search(r"about (\d+) devices on the model axis", text)[1])
    more = dataclasses.replace(small, mesh=MeshShape(1, devices))
    assert more.over(more.cost_of(auto_plan(more))) <= 0 < small.over(small.cost_of(auto_plan(small)))
    tiny = with_memory(1e3)
    assert "a smaller --batch_size" in does_not_fit(tiny, tiny.cost("row_wise"))


def test_the_largest_holder_is_named_with_its_size():
    def largest(**changes) -> str:
        setting = dataclasses.replace(SETTING, mesh=MeshShape(1, 1), **changes)
        return largest_holder(setting, setting.cost("data_parallel"))

    assert largest() == "tables (0.12 GB), the largest 't0' (1,000,000 rows of 16: 0.06 GB)"
    halves = tuple(dataclasses.replace(table, dtype="bfloat16") for table in SETTING.model.tables)
    half = dataclasses.replace(SETTING.model, tables=halves)
    assert largest(model=half) == "tables (0.06 GB), the largest 't0' (1,000,000 rows of 16: 0.03 GB)"
    assert largest(load=Load(2**20)).startswith("activations of batch_size 1,048,576 (")


KINDS = {
    "gpu": {
        **{"NVIDIA H100 80GB HBM3": "h100", "NVIDIA GH200 480GB": "h200", "NVIDIA A100-SXM4-40GB": "a100"},
        **{"NVIDIA B200": "b200", "NVIDIA L40S": "l40s", "NVIDIA L4": "l4", "NVIDIA A10G": "a10g"},
        **{"Tesla T4": "t4", "Tesla V100-SXM2-16GB": "v100", "NVIDIA GeForce RTX 4090": "rtx4090"},
        **{"AMD Instinct MI300X": "mi300x", "AMD Instinct MI250X/MI250": "mi250x"},
    },
    "tpu": {
        **{"TPU v2": "v2", "TPU v3": "v3", "TPU v4": "v4", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v5 lite": "v5e"},
        **{"TPU v5e": "v5e", "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"},
    },
}


@pytest.mark.parametrize(
    ("platform", "kind"), [(platform, kind) for platform, kinds in KINDS.items() for kind in kinds]
)
def test_accelerators_are_known_by_the_names_that_jax_gives_them(platform, kind):
    known = at_hand(kind, platform, memory_bytes=5e9)
    assert known == dataclasses.replace(HARDWARE[KINDS[platform][kind]], memory_bytes=5e9) and not known.assumed
    assert at_hand(kind, platform).memory_bytes == HARDWARE[known.name].memory_bytes


@pytest.mark.parametrize(
    ("platform", "kind"), [("gpu", "NVIDIA A40"), ("gpu", "AMD Instinct MI500"), ("tpu", "TPU v9")]
)
def test_an_unknown_accelerator_has_its_own_memory_and_says_what_is_assumed(platform, kind):
    found = at_hand(kind, platform, 8, 111e9)
    assert found.assumed and found.name == kind and found.memory_bytes == 111e9
    assert found.flops > 1e13, "an accelerator's, not a CPU's"
    assert "not in the table: its rates are assumed" in found.source and "--calibrate" in found.source
    assert "its memory and rates are assumed" in at_hand(kind, platform).source


def test_a_cpu_at_hand_has_its_machines_memory():
    whole, shared = of_device(jax.devices()[0]), of_device(jax.devices()[0], 8)
    assert whole.memory_bytes == memory.host_total() and shared.memory_bytes == memory.host_total() // 8
    assert at_hand("cpu", "cpu", 4).memory_bytes == HARDWARE["cpu"].memory_bytes / 4


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


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dlrm_jax.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


KAGGLE = "--flagfile=experiments/shape_kaggle.flags"


@pytest.mark.end_to_end
def test_the_command_plans_without_touching_a_device(tmp_path):
    plan, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    done = run(KAGGLE, "--devices=8", "--hardware=h100", f"--json={plan}", f"--picture={picture}")
    assert done.returncode == 0, done.stderr
    for words in ("26 tables, 33,762,577 rows of 16", "f25", "tables on a device: least", "predicted step:", "fits"):
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
@pytest.mark.sample(3)
def test_the_command_refuses_in_one_line(flags, message):
    done = run(KAGGLE, *flags)
    assert done.returncode == 1 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")
