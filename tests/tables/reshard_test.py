"""Promise 5 on other devices: what one plan saved, another reads bit by bit, and no more of it than a shard at once."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dlrm_jax.config import ConfigError, LossConfig
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.tables import reshard
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.training import loop, opening, saved
from dlrm_jax.training.checkpoint import LATEST, Checkpoints
from dlrm_jax.training.options import ShardingOptions
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.step import make_train_step
from tests.helpers import SHARDINGS, optimizer
from tests.placement_helpers import by_name, pad, slots_by_name
from tests.tables.placement_test import batch, model
from tests.training.resume_test import CONFIG

MIX = {"user": "row_wise", "item": "table_wise", "flag": "column_wise", "page": "table_row_wise"}
CHAIN = [((1, 8), "row_wise"), ((1, 2), "table_wise"), ((1, 1), "data_parallel"), ((2, 4), MIX), ((1, 3), "row_wise")]


def placed_as(mesh, sharding, table="rowwise_adagrad", packed=False, learned=True):
    config, shape = model(learned), MeshShape(*mesh)
    return Placed(config, optimizer(table), make_plan(config, shape, sharding), make_mesh(shape), packed=packed)


def trained(placed):
    step = placed.jit_step(make_train_step(placed.model, LossConfig(), placed.optimizer, 1, placed.ops))
    state = placed.init_state(1)
    for i in range(3):
        state, _ = step(state, placed.put(pad(batch(i, False), placed.num_devices)))
    return state


def everything(placed, state):
    """Tables, and optimizer state, by table name."""
    return by_name(placed, state.tables), slots_by_name(placed, state.table_opt_state)


@pytest.mark.parametrize(
    "table",
    [
        "rowwise_adam,correct_by=row",
        *(
            pytest.param(name, marks=pytest.mark.exhaustive)
            for name in ("rowwise_adagrad", "adagrad", "sgd", "adam", "ftrl,initial=0.1")
        ),
    ],
)
def test_from_plan_to_plan_bit_by_bit(tmp_path, table, monkeypatch):
    monkeypatch.setattr(reshard, "_PIECE_FLOATS", 36)  # 9 rows at a time.
    placed = placed_as(*CHAIN[0], table)
    state = trained(placed)
    want = everything(placed, state)
    for i, (mesh, sharding_type) in enumerate(CHAIN[1:]):
        with Checkpoints(tmp_path / str(i)) as checkpoints:
            checkpoints.save(LATEST, state, placed, {})
        placed = placed_as(mesh, sharding_type, table)
        with Checkpoints(tmp_path / str(i)) as checkpoints:
            state = checkpoints.restore(LATEST, placed)
        assert int(state.step) == 3
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed.shardings), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        got = everything(placed, state)
        for ours, theirs in zip(got, want, strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours:
                np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f"{mesh} {sharding_type} {name}")


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_from_packed_lines_to_plain_rows_and_back(tmp_path, sharding):
    plain, packed = placed_as((1, 2), sharding), placed_as((2, 2), sharding, packed=True)
    state = plain.init_state(1)
    want = by_name(plain, state.tables)
    for i, (old, new) in enumerate(((plain, packed), (packed, plain))):
        with Checkpoints(tmp_path / str(i)) as checkpoints:
            checkpoints.save(LATEST, state, old, {})
        with Checkpoints(tmp_path / str(i)) as checkpoints:
            state = checkpoints.restore(LATEST, new)
        for name, rows in by_name(new, state.tables).items():
            np.testing.assert_array_equal(rows, want[name])


@pytest.mark.parametrize("same_plan", [True, False])
def test_a_state_that_is_not_whole_is_never_handed_out(tmp_path, monkeypatch, same_plan):
    old = placed_as((1, 2), "row_wise", "adagrad")
    new = old if same_plan else placed_as((1, 4), "row_wise", "adagrad")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(LATEST, old.init_state(1), old, {})
        checkpoints.wait()
        monkeypatch.setattr(saved, "TrainState", lambda **fields: new.abstract_state)
        with pytest.raises(ConfigError, match="step of a checkpoint was read as ShapeDtypeStruct int32"):
            checkpoints.restore(LATEST, new)


def test_a_run_goes_on_under_another_plan(tmp_path):
    """Eight devices row-wise, then two table-wise: the same losses as one device all the way."""
    plans = [("row_wise", "model:8", 20), ("table_wise", "model:2", 40), ("auto", "model:1", 60)]
    for sharding, mesh, steps in plans:
        options = ShardingOptions(sharding, mesh=mesh)
        result = loop.train_and_evaluate(dataclasses.replace(CONFIG, sharding=options, num_steps=steps), tmp_path)
    alone = loop.train_and_evaluate(CONFIG, tmp_path / "alone")
    assert result["step"] == alone["step"]
    for metric in ("auc", "log_loss"):
        assert result["test"][metric] == pytest.approx(alone["test"][metric], abs=1e-5)


@pytest.mark.exhaustive
def test_further_rounds_are_counted_and_said(tmp_path, caplog):
    options = ShardingOptions("row_wise", mesh="model:4", exchange_capacity=2)
    with caplog.at_level("WARNING", logger="dlrm_jax"):
        loop.train_and_evaluate(dataclasses.replace(CONFIG, sharding=options, num_steps=20), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["exchange_overflows"] for line in lines if line["split"] == "train"] == [10, 20]
    assert "20 steps needed further rounds" in caplog.text


@pytest.mark.exhaustive
def test_the_pipelined_loop_ends_in_the_same_bits_and_resumes(tmp_path):
    for name, pipeline in (("plain", False), ("pipelined", True)):
        options = ShardingOptions("row_wise", mesh="model:4", pipeline=pipeline)
        for steps in (30, 60) if pipeline else (60,):
            config = dataclasses.replace(CONFIG, sharding=options, num_steps=steps)
            loop.train_and_evaluate(config, tmp_path / name)
    states = []
    for name in ("plain", "pipelined"):
        dataset_model = opening.read(config)[1]
        plan = make_plan(dataset_model, MeshShape(1, 4), "row_wise")
        placed = Placed(dataset_model, config.optimizer, plan, make_mesh(MeshShape(1, 4)))
        with Checkpoints(tmp_path / name) as checkpoints:
            states.append(checkpoints.restore(LATEST, placed))
    jax.tree.map(np.testing.assert_array_equal, *states)
