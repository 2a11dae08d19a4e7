"""Runs that do not fit into the memory at hand: one line before anything is made, and those that fit go on."""

import dataclasses
import os
import subprocess
import sys
import types

import jax
import pytest

from dlrm_jax import serve
from dlrm_jax.config import ConfigError
from dlrm_jax.data.read import load
from dlrm_jax.data.read.load import DataConfig, load_dataset
from dlrm_jax.host import memory
from dlrm_jax.host.mesh import MeshShape
from dlrm_jax.serving.artifact import loaded
from dlrm_jax.serving.artifact.placed import engine_maker
from dlrm_jax.serving.artifact.store import open_version
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.training import checkpoint, loop
from dlrm_jax.training.options import ShardingOptions
from dlrm_jax.training.placement import place_run, require_room, setting_of
from dlrm_jax.training.run_config import ModelOptions, RunConfig
from dlrm_jax.training.state import init_state
from tests.forked import run
from tests.helpers import ROOT, optimizer, tiny_model
from tests.serving_helpers import export_tiny
from tests.training.resume_test import CONFIG

ROWS = (3_000_000, 40)
DATA = DataConfig(dataset="synthetic", table_sizes=ROWS, num_examples=1000)
TABLES = 16 * 4 * sum(ROWS)


def run_of(**changes) -> RunConfig:
    model = ModelOptions(embedding_dim=16, bottom_mlp=(8, 16), top_mlp=(8, 1))
    return dataclasses.replace(CONFIG, data=DATA, model=model, optimizer=optimizer("sgd"), **changes)


def placed(monkeypatch, config: RunConfig, free: float, copies: float = 0) -> None:
    """Place it on a machine with so much memory free."""
    monkeypatch.setattr(memory, "host_available", lambda: int(free))
    dataset = load_dataset(config.data)
    place_run(config, config.model.build(dataset), dataset, copies)


@pytest.mark.parametrize("mesh", ["model:1", "model:4"])
def test_what_fits_is_placed_and_what_does_not_is_refused(monkeypatch, mesh):
    config = run_of(sharding=ShardingOptions(mesh=mesh, sharding="row_wise"))
    placed(monkeypatch, config, 1.1 * TABLES)
    line = (
        r"this run needs 0\.19 GB of this machine's memory, 0\.18 GB are free; most of it is tables .*'f0' \(3,000,000"
    )
    with pytest.raises(ConfigError, match=line) as refused:
        placed(monkeypatch, config, 0.95 * TABLES)
    assert "; what would fit: tables of at most 2," in str(refused.value) and "\n" not in str(refused.value)
    placed(monkeypatch, dataclasses.replace(config, allow_oversubscription=True), 0.95 * TABLES)


def test_copies_on_all_devices_of_a_host_are_counted(monkeypatch):
    config = run_of(sharding=ShardingOptions(mesh="model:4", sharding="data_parallel"))
    placed(monkeypatch, config, 4.2 * TABLES)
    with pytest.raises(ConfigError, match=r"needs 0\.7\d GB"):
        placed(monkeypatch, config, 3.9 * TABLES)


def test_the_copy_that_a_checkpoint_is_written_from_is_counted(monkeypatch):
    placed(monkeypatch, run_of(), 2.4 * TABLES, checkpoint.COPIES)
    with pytest.raises(ConfigError, match="with the copy that a checkpoint is written from, needs"):
        placed(monkeypatch, run_of(), 2.1 * TABLES, checkpoint.COPIES)


def test_micro_batches_need_less(monkeypatch):
    large = run_of(batch_size=2**20)
    with pytest.raises(ConfigError, match=r"activations of batch_size 1,048,576 .* a smaller --batch_size"):
        placed(monkeypatch, large, 3.6 * TABLES)
    with pytest.raises(ConfigError, match=r"activations of batch_size 1,048,576"):
        placed(monkeypatch, large, 4.0 * TABLES)
    placed(monkeypatch, dataclasses.replace(large, num_micro_batches=2**10), 4.0 * TABLES)


def test_an_accelerators_own_memory_counts(monkeypatch):
    gpu = types.SimpleNamespace(
        platform="gpu",
        device_kind="NVIDIA H100 80GB HBM3",
        memory_stats=lambda: {"bytes_limit": int(1.2 * TABLES), "bytes_in_use": int(0.3 * TABLES)},
    )
    config = run_of()
    model, shape = config.model.build(load_dataset(DATA)), MeshShape(1, 1)
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    plan = make_plan(model, shape, "data_parallel")
    with pytest.raises(ConfigError, match=r"of the memory of a h100, 0\.17 GB are free; .* about 2 devices"):
        require_room(config, setting_of(config, model, shape), plan, 0)
    gpu.memory_stats = lambda: {"bytes_limit": int(1.5 * TABLES), "bytes_in_use": int(0.3 * TABLES)}
    require_room(config, setting_of(config, model, shape), plan, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"multi_hot": "compatible", "multi_hot_sizes": (50, 2)},
            r"the bags of --multi_hot=compatible .*'f0' \(0\.59 GB",
        ),
        ({"id_trace": "dist.log", "num_examples": 10**8}, "a log of --id_trace needs .* smaller --num_examples"),
    ],
)
def test_data_that_is_held_as_a_whole_is_refused_before_it_is_made(monkeypatch, changes, words):
    monkeypatch.setattr(load, "host_available", lambda: 10**8)
    with pytest.raises(ConfigError, match=words):
        load_dataset(dataclasses.replace(DATA, **changes))


def test_a_model_that_does_not_fit_is_not_served(tmp_path, monkeypatch):
    version = export_tiny(tmp_path, tiny_model(bottom_mlp=(500, 4)))
    loaded.require_room(version, True, oversubscribe=False)
    monkeypatch.setattr(memory, "host_available", lambda: 3000)
    with pytest.raises(
        ConfigError, match=r"needs .* most of it is weights/.*; what would fit: an export with --tables="
    ):
        loaded.require_room(version, True, oversubscribe=False)
    loaded.require_room(version, True, oversubscribe=True)
    monkeypatch.setattr(memory, "host_available", lambda: 100)
    many = ShardingOptions(mesh="model:4")
    with pytest.raises(ConfigError, match=r"under data:1,model:4 needs .*table 'user' \(11 rows of 4, float32 here\)"):
        engine_maker(many, 16)(open_version(tmp_path), None)
    engine_maker(many, 16, oversubscribe=True)(open_version(tmp_path), None)


def test_an_allocation_that_fails_while_serving_names_the_largest_holder(tmp_path, monkeypatch):
    version = export_tiny(tmp_path, tiny_model(bottom_mlp=(500, 4)))

    def fails(version, like, apart):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")

    monkeypatch.setattr(loaded, "OneDevice", fails)
    unset = types.SimpleNamespace(present=False)
    flags = {"mesh": "", "kernels": "xla", "allow_oversubscription": False}
    monkeypatch.setattr(serve, "FLAGS", _Flags(flags, unset))
    line = r"memory ran out \(Out of memory allocating 5 bytes\); most of it is weights/.* an export with --tables="
    with pytest.raises(ConfigError, match=line):
        serve._make_engine(16)(version, None)


class _Flags(types.SimpleNamespace):
    """Flags that a test sets; of the others none was given."""

    def __init__(self, values: dict, unset) -> None:
        super().__init__(**values)
        self._unset = unset

    def __getitem__(self, name: str):
        return self._unset


HUGE = (
    *("--dataset=synthetic", "--table_sizes=2000000000,30", "--embedding_dim=1024", "--bottom_mlp=8,1024"),
    *("--num_examples=1000",),
)


@pytest.mark.end_to_end
@pytest.mark.parametrize("module", ["train", "benchmark"])
@pytest.mark.sample(1)
def test_the_commands_refuse_in_one_line_and_try_when_told_to(tmp_path, module):
    flags = [*HUGE, *([f"--workdir={tmp_path}"] if module == "train" else [])]
    refused = run(module, *flags)
    assert refused.returncode == 1 and refused.stderr.count("error: ") == 1, refused.stderr
    assert "error: this run" in refused.stderr and "--allow_oversubscription tries" in refused.stderr
    tried = run(module, *flags, "--allow_oversubscription")
    assert tried.returncode == 1 and tried.stderr.count("error: ") == 1, tried.stderr
    assert "error: memory ran out (Out of memory allocating " in tried.stderr
    assert "the largest 'f0' (2,000,000,000 rows of 1024: 8192.00 GB); what would fit:" in tried.stderr


def test_the_best_state_takes_the_last_ones_place():
    """On an accelerator that one of them fills, both together would not fit."""
    state = init_state(tiny_model(), optimizer(), 0)

    class Restored(Exception):
        """Raised where the best state would be read."""

    def restore(kind, placed):
        assert all(array.is_deleted() for array in jax.tree.leaves(state))
        raise Restored

    run, checkpoints = types.SimpleNamespace(placed=None), types.SimpleNamespace(restore=restore)
    with pytest.raises(Restored):
        loop.final_result(run, state, loop.Progress(best_step=3), checkpoints, None)


LIMITED = [("prepare", 2.0), ("prepare", 1.0), ("train", 1.2), pytest.param("train", 2.0, marks=pytest.mark.slow)]


@pytest.mark.end_to_end
@pytest.mark.parametrize(("command", "gigabytes"), LIMITED)
@pytest.mark.sample(1)
def test_under_a_limit_of_addresses_a_command_ends_well_or_in_one_line(tmp_path, command, gigabytes):
    """How much threads reserve depends on the cores; what must not be is that one which cannot start is waited for."""
    (tmp_path / "log.csv").write_text("click,kind\n" + "".join(f"{i % 2},k{i % 7}\n" for i in range(1000)))
    flags = {
        "prepare": (f"--input={tmp_path}/log.csv", f"--output={tmp_path}/data"),
        "train": ("--num_examples=1000", "--num_steps=2", f"--workdir={tmp_path}/run"),
    }
    limit = f'ulimit -v {int(gigabytes * 1e6)}; exec "$@"'
    start = ["bash", "-c", limit, "bash", sys.executable, "-m", f"dlrm_jax.{command}", *flags[command]]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        assert done.returncode == 1 and done.stderr.count("error: ") == 1, done.stderr
        assert "no room for the" in done.stderr or "memory ran out" in done.stderr
    assert "Traceback" not in done.stderr and "Fatal" not in done.stderr
