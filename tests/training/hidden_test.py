"""Batch norms and dropout in training: one meaning on any devices, in any parts, and after any stop."""

import dataclasses

import jax
import numpy as np
import pytest

from dlrm_jax.config import PLAIN, ConfigError, HiddenConfig, LossConfig, OptimizerConfig, ScheduleConfig
from dlrm_jax.data.read.load import DataConfig
from dlrm_jax.data.read.pipeline import Cut
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.training import loop
from dlrm_jax.training.feed import Feed
from dlrm_jax.training.hidden_options import read_hidden
from dlrm_jax.training.options import ShardingOptions
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.run_config import ModelOptions, RunConfig
from dlrm_jax.training.state import init_state
from dlrm_jax.training.step import make_pipelined_step, make_train_step
from dlrm_jax.training.stepper import Stepper
from dlrm_jax.training.window_step import RECORDED
from tests.helpers import optimizer, random_batch, tiny_model
from tests.placement_helpers import by_name, local, pad
from tests.training.feed_test import split_of
from tests.training.resume_test import assert_same_bits, final_state

BATCH = 22
BOTH = HiddenConfig("gelu", "batch", dropout=0.3)
NORM, DROPOUT = HiddenConfig(norm="batch"), HiddenConfig(dropout=0.3)
TOWER = {"interaction": "parallel_cross", "cross_layers": 1, "cross_rank": 3, "tower_mlp": (3,)}
EVERYWHERE = tiny_model(**TOWER, bottom_mlp=(6, 4), bottom_hidden=BOTH, top_hidden=BOTH)
"""Hidden layers of both MLPs and of a tower are normalised and dropped."""
SETTINGS = optimizer("rowwise_adagrad", "adam", rate=0.01)


def in_top(hidden: HiddenConfig):
    """A model one of whose layers is so."""
    return tiny_model(bottom_mlp=(4,), top_mlp=(5, 1), top_hidden=hidden)


def placed_on(model, devices: int) -> Placed:
    shape = MeshShape(1, devices)
    plan = make_plan(model, shape, "row_wise" if devices > 1 else "data_parallel")
    return Placed(model, SETTINGS, plan, make_mesh(shape))


def trained(model, devices: int, parts: int = 1, steps: int = 4):
    """What is known of a run on so many devices: everything but tables as it is, and these by name."""
    placed = placed_on(model, devices)
    step = placed.jit_step(make_train_step(model, LossConfig(), SETTINGS, parts, placed.ops, seed=7))
    state, losses = placed.init_state(0), []
    for i in range(steps):
        state, metrics = step(state, placed.put(local(pad(random_batch(model, BATCH, seed=i), 8))))
        losses.append(float(metrics["loss"]))
    dense = jax.tree.map(np.asarray, (state.dense_params, state.batch_stats))
    return losses, dense, by_name(placed, state.tables)


def trained_alone(model, parts: int = 1, steps: int = 4):
    """The same without a mesh, in one process; nothing is padded."""
    step = jax.jit(make_train_step(model, LossConfig(), SETTINGS, parts, seed=7))
    state, losses = init_state(model, SETTINGS, 0), []
    for i in range(steps):
        state, metrics = step(state, pad(random_batch(model, BATCH, seed=i), parts))
        losses.append(float(metrics["loss"]))
    tables = {name: np.asarray(rows) for name, rows in named_tables(model, state.tables)}
    return losses, jax.tree.map(np.asarray, (state.dense_params, state.batch_stats)), tables


def assert_close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


def test_twenty_steps_on_several_devices_are_those_on_one():
    one = trained_alone(EVERYWHERE, steps=20)
    assert len(jax.tree.leaves(one[1][1])) == 2 * 3 and len(set(one[0])) == 20
    for devices in (2, 8):
        assert_close(trained(EVERYWHERE, devices, steps=20), one)


@pytest.mark.exhaustive
def test_in_bfloat16_statistics_stay_float32_and_one_meaning_on_any_devices():
    model = dataclasses.replace(in_top(BOTH), compute_dtype="bfloat16")
    half, full = trained_alone(model), trained_alone(in_top(BOTH))
    assert half[0] != full[0], "products are of bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half[1])} == {"float32"}
    assert_close(half[0], full[0], 0.01)
    assert_close(half[1][1], full[1][1], 0.02)
    losses, (_, averages), _ = trained(model, 2)
    assert_close((losses, averages), (half[0], half[1][1]))


@pytest.mark.exhaustive
def test_parts_of_a_batch_drop_what_the_whole_drops():
    assert_close(trained(in_top(DROPOUT), 2, parts=4), trained_alone(in_top(DROPOUT)))


def test_parts_of_a_batch_are_normalised_each_by_itself_on_any_devices():
    assert_close(trained(in_top(NORM), 2, parts=4), trained_alone(in_top(NORM), parts=4))


def test_padding_rows_count_in_no_statistic_and_a_part_without_others_changes_nothing():
    """Of the parts of three rows, the first has rows 0, 2 and 4, the second 1, 3 and 5."""
    model = in_top(NORM)
    batch = random_batch(model, 6).replace(weight_B=np.float32([1, 0, 1, 0, 0, 0]))
    batch.dense_BxN[[1, 3, 4, 5]] = 100
    state = init_state(model, SETTINGS, 0)
    of_parts, metrics = jax.jit(make_train_step(model, LossConfig(), SETTINGS, 2))(state, batch)
    two = jax.tree.map(lambda x: x[:3:2], batch)
    alone, _ = jax.jit(make_train_step(model, LossConfig(), SETTINGS))(state, two)
    assert bool(metrics["finite"])
    assert_close(of_parts, alone, 1e-6)


@pytest.mark.exhaustive
def test_a_pipelined_step_drops_the_same_and_every_step_something_else():
    placed = placed_on(in_top(BOTH), 1)
    batches = [placed.put(random_batch(placed.model, 8, seed=i)) for i in range(3)]
    settings = (placed.model, LossConfig(), SETTINGS, 1, placed.ops)
    plain, piped = placed.jit_step(make_train_step(*settings, 3)), jax.jit(make_pipelined_step(*settings, 3))
    starts = [placed.init_state(0).replace(step=np.int32(i)) for i in range(2)]
    losses = [float(plain(state, batches[0])[1]["loss"]) for state in starts]
    assert abs(losses[0] - losses[1]) > 1e-3
    routes = placed.jit_route(lambda batch, step: batch, None)(batches[0], 0)
    a, b = placed.init_state(0), placed.init_state(0)
    for i in range(2):
        a, _ = plain(a, batches[i])
        b, _, routes = piped(b, batches[i], routes, batches[i + 1])
    assert_same_bits(a, b)


@pytest.mark.parametrize("hidden", [PLAIN, DROPOUT])
def test_a_runs_seed_decides_what_is_dropped_and_nothing_else_of_a_step(hidden):
    placed = placed_on(in_top(hidden), 1)
    programs, record = [], np.zeros((2, len(RECORDED)), np.float32)
    feed = Feed(split_of(placed.model), Cut(8, 2), placed.mesh)
    with feed.train_windows(0, 0, shuffle=False) as windows:
        _, window = next(windows)
    for seed in (0, 5):
        config = dataclasses.replace(RUN, seed=seed)
        step = Stepper(config, placed, feed, windows)._plain
        programs.append(step.lower(placed.abstract_state, record, window).as_text())
    assert (programs[0] == programs[1]) == (hidden == PLAIN)
    assert ("threefry" in programs[0]) == (hidden != PLAIN)


RUN = RunConfig(
    data=DataConfig(num_examples=500),
    model=ModelOptions(
        embedding_dim=4,
        bottom_mlp=(8, 4),
        top_mlp=(8, 1),
        norm="batch",
        dropout="bottom:0.1,top:0.4",
        table_init="normal:0.01",
    ),
    loss=LossConfig(),
    optimizer=OptimizerConfig(
        ScheduleConfig(0.01, plateau="factor:0.5,min_delta:1"),
        **{"dense": "adam", "table": "adam", "table_update": "all", "table_l2": 0.01, "clip_norm": 0.3},
    ),
    batch_size=64,
    num_steps=10,
    eval_every=3,
    sharding=ShardingOptions(mesh="model:1"),
)


def test_a_run_of_the_published_recipe_that_stopped_ends_in_the_same_bits(tmp_path):
    results = []
    for name, stops in (("through", (10,)), ("stopped", (3, 10))):
        for steps in stops:
            result = loop.train_and_evaluate(dataclasses.replace(RUN, num_steps=steps), tmp_path / name)
        results.append((final_state(tmp_path / name, RUN), result["test"], result["val"]))
    assert_same_bits(results[0], results[1])
    assert len(jax.tree.leaves(results[0][0].batch_stats)) == 4 and float(results[0][0].rate_factor) == 0.125


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("relu", "none", "x"), "dropout is 'x': 'x' is not a number, as 0.2 or bottom:0,top:0.2"),
        (("relu", "none", "1"), r"dropout is 1.0; it must lie in \[0, 1\)"),
        (("relu", "none", "top:nan"), "dropout is nan; it must lie in"),
        (("relu", "none", "top:0.1,0.2"), "dropout is 'top:0.1,0.2': '0.2' is not bottom:VALUE or top:VALUE"),
        (("relu", "none", "top:0.1,top:0.2"), "'top:0.2' is not bottom:VALUE or top:VALUE, each at most once"),
        (("tanh", "none", "0"), "activation is 'tanh'; choose one of relu, gelu, silu, prelu"),
        (("relu", "middle:batch", "0"), "norm is 'middle:batch': 'middle:batch' is not bottom:VALUE"),
        (("relu", "bottom:group", "0"), "norm is 'group'; choose one of none, batch, layer"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(settings, words):
    with pytest.raises(ConfigError, match=words) as error:
        read_hidden(*settings)
    assert "\n" not in str(error.value)


def test_an_mlp_that_is_not_named_has_the_default():
    assert read_hidden("top:silu", "bottom:layer", "0.2") == (
        HiddenConfig("relu", "layer", 0.2),
        HiddenConfig("silu", "none", 0.2),
    )
