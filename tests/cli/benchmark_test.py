"""Tests `dlrm_jax.benchmark`: where a step's time goes, and the command with its sweeps."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import types

import jax
import pytest

from dlrm_jax.benchmark import swept
from dlrm_jax.config import LossConfig
from dlrm_jax.data.read.load import DataConfig
from dlrm_jax.data.read.pipeline import Cut
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.host.native_code import has_compiler
from dlrm_jax.tables.collective import ExchangeOptions
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.training import measuring, step_parts, stepper
from dlrm_jax.training.feed import Feed
from dlrm_jax.training.measuring_input import measure_input, text
from dlrm_jax.training.placed import Placed, on_one_device
from dlrm_jax.training.step import make_train_step
from dlrm_jax.training.step_parts import Event
from tests.helpers import ROOT, optimizer, tiny_model
from tests.prepared_helpers import csv_rows, in_small_blocks, prepare_text, schema
from tests.training.feed_test import split_of
from tests.training.resume_test import CONFIG

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler on this machine")


def benchmark(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dlrm_jax.benchmark", "--num_examples=2000", "--batch_size=64", "--seconds=0"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


def test_shares_of_overlapping_events_and_gaps():
    events = [Event("a", 0, 4), Event("b", 2, 4), Event("a", 6, 10), Event("unknown", 0, 100)]
    found = step_parts.shares(events, {"a": "MLPs", "b": "lookup"})
    assert found == {
        part: pytest.approx({"MLPs": 0.7, "lookup": 0.1, "launch gaps": 0.2}.get(part, 0)) for part in found
    }
    assert step_parts.shares([Event("unknown", 0, 1)], {"a": "MLPs"}) == {}


@pytest.mark.parametrize("num_devices", [1, 2])
def test_every_part_of_a_compiled_step_is_found(num_devices):
    model, shape = tiny_model(), MeshShape(1, num_devices)
    placed = Placed(model, optimizer(), make_plan(model, shape, "row_wise"), make_mesh(shape), ExchangeOptions())
    placed = placed if num_devices > 1 else on_one_device(model, optimizer())
    step = placed.jit_step(make_train_step(model, LossConfig(), placed.optimizer, 1, placed.ops))
    text = step.lower(placed.abstract_state, placed.abstract_batch(8)).compile().as_text()
    found = set(step_parts.parts_of(text).values())
    assert found >= {"lookup", "interaction", "MLPs", "sparse update"}
    assert ("exchange" in found) == (num_devices > 1)


def test_a_profile_of_a_real_step_has_its_operations():
    compiled = jax.jit(lambda x: (x @ x).sum()).lower(jax.ShapeDtypeStruct((300, 300), "float32")).compile()
    argument = jax.numpy.ones((300, 300))
    events = step_parts.profile(lambda: jax.block_until_ready(compiled(argument)), compiled.as_text())
    shares = step_parts.shares(events, step_parts.parts_of(compiled.as_text()))
    assert sum(shares.values()) == pytest.approx(1) and shares["other"] > 0


@pytest.mark.end_to_end
def test_the_command_prints_and_writes_what_it_measured(tmp_path):
    done = benchmark(f"--json={tmp_path}/b.json", f"--picture={tmp_path}/b.png")
    assert not done.returncode, done.stderr
    numbers = json.loads((tmp_path / "b.json").read_text())
    for kind in ("train", "forward"):
        assert sum(numbers[kind]["parts"].values()) == pytest.approx(1)
        assert numbers[kind]["parts"]["MLPs"] > 0 and numbers[kind]["compile_seconds"] > 0
        assert numbers[kind]["samples_per_second"] == pytest.approx(64 / numbers[kind]["step_seconds"])
        for seconds, how in (("step_seconds", "a step, dispatched back to back"), ("waited_seconds", "waited for")):
            assert f"{numbers[kind][seconds] * 1e3:,.3f} ms {how}" in done.stdout
    assert numbers["forward"]["parts"]["sparse update"] == 0 < numbers["train"]["parts"]["sparse update"]
    assert (tmp_path / "b.png").stat().st_size > 5000


def test_a_gpus_parts_are_of_programs_without_command_buffers(monkeypatch):
    """The option is known to the compiler of every backend; what is traced is compiled with it, apart from the rest."""
    profiled = []
    monkeypatch.setattr(step_parts, "TRACED_OPTIONS", {"cpu": step_parts.TRACED_OPTIONS["gpu"]})
    monkeypatch.setattr(measuring, "_shares", lambda call, executable: profiled.append((call(0), executable)) or {})
    monkeypatch.setattr(measuring, "_timed", lambda call, executable, *rest: profiled.append(executable) or {})
    placed = on_one_device(tiny_model(), optimizer())
    feed = Feed(split_of(placed.model), Cut(8, 4), placed.mesh)
    with feed.train_windows(0, 0, shuffle=True) as windows:
        _, window = next(windows)
    config = dataclasses.replace(CONFIG, optimizer=placed.optimizer)
    numbers = measuring._passes(config, placed, feed, window, 0, True)
    train, forward, (_, train_apart), (logits, forward_apart) = profiled
    assert numbers["train"]["parts"] == numbers["forward"]["parts"] == {}
    assert len({id(one) for one in (train, forward, train_apart, forward_apart)}) == 4 and logits.shape == (8,)


@pytest.mark.parametrize("flags", [("--steps_per_dispatch=4",), ("--pipeline_exchange", "--sharding=row_wise")])
@pytest.mark.sample(1)
@pytest.mark.exhaustive
def test_the_step_measured_is_the_runs_own(tmp_path, flags):
    found = {}
    for name, these in (("plain", flags[1:]), ("own", flags)):
        done = benchmark(*these, f"--json={tmp_path}/{name}.json")
        assert not done.returncode, done.stderr
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())["train"]
    at_once = "--steps_per_dispatch=4" in flags
    more_held = found["own"]["held_bytes"] - found["plain"]["held_bytes"]
    assert at_once or more_held > 0  # The next batch and its routes.
    assert found["own"]["steps"] >= 10 * (4 if at_once else 1) and found["own"]["steps"] % (4 if at_once else 1) == 0


@pytest.mark.parametrize(
    ("kind", "stages"),
    [
        ("memory", {"permute", "transfer"}),
        ("generated", {"make", "permute", "transfer"}),
        ("prepared", {"read", "decode", "permute", "transfer"}),
        pytest.param("large", {"read", "place", "transfer"}, marks=needs_compiler),
    ],
)
def test_the_road_is_measured_by_stage(tmp_path, kind, stages, monkeypatch):
    data = CONFIG.data
    if kind == "large":
        in_small_blocks(monkeypatch)
    if kind == "generated":
        data = DataConfig("synthetic", num_examples=500, table_sizes=(9, 8))
    elif kind in ("prepared", "large"):
        log = csv_rows([(i % 2, i, f"v{i}") for i in range(200)])
        data = DataConfig(data_dir=str(prepare_text(tmp_path, log, schema())))
    numbers = measure_input(dataclasses.replace(CONFIG, data=data), 0.0)
    rates = numbers["rows_per_second"]
    assert set(rates) == stages | {"host", "road"} and min(rates.values()) > 0
    assert numbers["binds"] == min(stages, key=rates.get)
    assert f"{numbers['binds']} binds" in text(numbers) and "windows of 64 batches of 64" in text(numbers)


def test_what_a_pipelined_step_compiles_is_timed_all(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(stepper, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    model = tiny_model()
    placed = on_one_device(model, optimizer())
    pipelined = dataclasses.replace(CONFIG.sharding, pipeline=True)
    config = dataclasses.replace(CONFIG, optimizer=placed.optimizer, sharding=pipelined)
    feed = Feed(split_of(model), Cut(8, 3), placed.mesh)
    with feed.train_windows(0, 0, shuffle=True) as windows:
        step = stepper.Stepper(config, placed, feed, windows)
        _, state = step(placed.init_state(0), 0, 1)
        step(state, 1, 1)
    assert step.compile_seconds == 2  # The routes of the first batch, and the step.


@pytest.mark.parametrize(
    ("sweep", "flags"),
    [
        ("batch", ("--sweep_values=16,64",)),
        pytest.param("devices", ("--sharding=row_wise",), marks=pytest.mark.exhaustive),
        pytest.param(
            "hotness", ("--dataset=synthetic", "--sweep_values=1,3"), marks=(pytest.mark.slow, pytest.mark.exhaustive)
        ),
    ],
)
@pytest.mark.exhaustive
def test_sweeps(tmp_path, sweep, flags):
    done = benchmark(f"--sweep={sweep}", *flags, f"--json={tmp_path}/b.json", f"--picture={tmp_path}/b.png")
    assert not done.returncode, done.stderr
    points = json.loads((tmp_path / "b.json").read_text())["points"]
    asked = [v for flag in flags if "values" in flag for v in flag.split("=")[1].split(",")]
    assert list(points) == (asked or ["1", "2"])
    held = [point["train"]["held_bytes"] for point in points.values()]
    assert held == sorted(held, reverse=sweep == "devices") and len(set(held)) == len(held)
    assert (tmp_path / "b.png").stat().st_size > 5000


def test_without_values_a_sweep_goes_around_the_runs_own():
    data = dataclasses.replace(CONFIG.data, dataset="synthetic", table_sizes=(5000, 50))
    config = dataclasses.replace(CONFIG, data=data, batch_size=128)
    assert {value: run.batch_size for value, run in swept(config, "batch", []).items()} == {
        value: value for value in (2, 8, 32, 128, 512)
    }
    assert [run.data.max_rows_per_table for run in swept(config, "rows", []).values()] == [100, 1000, 10000]
    assert [run.data.hotness for run in swept(config, "hotness", []).values()] == [(1,), (2,), (4,), (8,), (16,), (32,)]
    assert [run.model.bottom_mlp[-1] for run in swept(config, "dim", []).values()] == [8, 16, 32, 64, 128]
    assert [run.sharding.mesh for run in swept(config, "devices", []).values()] == [
        f"model:{count}" for count in (1, 2, 4, 8)
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seconds=inf",), "--seconds=inf never ends"),
        (("--sweep_values=3",), "needs --sweep"),
        (("--sweep=batch", "--sweep_values=3,x"), "--sweep_values=3,x are not all whole numbers"),
        (("--sweep=rows",), "--sweep=rows changes the data, so it needs --dataset=synthetic"),
        (("--sweep=devices", "--sweep_values=64"), "--sweep_values has 64 devices, but there are 2"),
    ],
)
@pytest.mark.sample(2)
def test_what_cannot_be_measured_is_said_in_a_line(flags, message):
    done = benchmark(*flags)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
