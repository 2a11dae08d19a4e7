"""Tables in two bytes: rounded without bias, to the same bits under every placement, kept, read and predicted so."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.config import FeatureConfig, LossConfig, TableConfig
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.planning.cost import Load, estimate
from dlrm_jax.planning.hardware import HARDWARE
from dlrm_jax.serving import load
from dlrm_jax.tables.dtypes import DTYPES, rounded, table_dtype
from dlrm_jax.tables.exchange import init_slots, local_ops
from dlrm_jax.tables.init import init_tables
from dlrm_jax.tables.layout import local_stacks
from dlrm_jax.tables.noise import noise_of
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.training.checkpoint import LATEST, Checkpoints
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.state import init_state
from dlrm_jax.training.step import logits, make_train_step
from tests.helpers import SHARDINGS, optimizer, random_batch, tiny_model
from tests.placement_helpers import by_name, pad
from tests.serving_helpers import export_tiny, lively_state

HALVES = ["bfloat16", "float16"]
ROUNDED = [name for name in DTYPES.all() if name != "float32"]
BFLOAT16 = table_dtype("bfloat16")


def model(dtype, **changes):
    plain = tiny_model(**changes)
    return dataclasses.replace(plain, tables=tuple(dataclasses.replace(t, dtype=dtype) for t in plain.tables))


def place(mesh, sharding, dtype, table="rowwise_adagrad", packed=False):
    config, shape = model(dtype), MeshShape(*mesh)
    if sharding == "mix":
        sharding = {t.name: SHARDINGS[(i + 1) % len(SHARDINGS)] for i, t in enumerate(config.tables)}
    plan = make_plan(config, shape, sharding)
    return Placed(config, optimizer(table), plan, make_mesh(shape), packed=packed)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [1.001, -3.3, 5e-5, 1e-6, 3e-8, -2e-9, 0.0, 1.5, 60000.0])
def test_a_number_becomes_one_of_its_neighbours_and_right_on_average(dtype, value):
    count = 100_000
    noise = jax.random.bits(jax.random.key(0), (1, count), "uint32")
    got = rounded(jnp.full((1, count), value, jnp.float32), jnp.dtype(dtype), noise)
    assert got.dtype == dtype
    values = np.unique(np.asarray(got, np.float64))
    exact = float(np.float32(value))
    assert len(values) == (1 if exact == float(np.asarray(exact, jnp.dtype(dtype))) else 2)
    assert values.min() <= exact <= values.max()
    gap = values.max() - values.min()
    assert abs(np.asarray(got, np.float64).mean() - exact) <= 3 * gap / 2 / count**0.5 + 1e-12 * abs(exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_beyond_the_type_is_not_hidden(dtype):
    noise = jnp.full((1, 3), 0xFFFFFFFF, jnp.uint32)
    got = np.asarray(rounded(jnp.array([[np.inf, np.nan, 3.4e38]], jnp.float32), jnp.dtype(dtype), noise), np.float32)
    assert got[0, 0] == np.inf and np.isnan(got[0, 1]) and got[0, 2] >= 3.38e38


@pytest.mark.parametrize(
    "dtype", [ROUNDED[0], *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ROUNDED[1:])]
)
@pytest.mark.parametrize(
    ("mesh", "packed"), [((2, 2), False), ((2, 2), True), pytest.param((1, 8), False, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize(
    "sharding",
    [
        kind if kind in ("table_row_wise", "column_wise") else pytest.param(kind, marks=pytest.mark.exhaustive)
        for kind in SHARDINGS
    ],
)
@pytest.mark.sample(1)
def test_equal_gradients_give_equal_bits_under_every_placement(sharding, mesh, packed, dtype):
    """Each id once, so that no sum is rounded: what is left is the noise, which must not depend on where a row lies."""
    config, batch = model(dtype), 4
    ids = np.full((batch, config.num_slots), -1, np.int32)
    ids[:, 0], ids[:, 1], ids[0, 2:4], ids[2, 5] = range(batch), range(batch), (6, 5), 0
    d_pooled = np.random.default_rng(0).normal(size=(batch, 4, 4)).astype(np.float32)
    rate, count = jnp.float32(0.01), jnp.int32(7)

    ops, states = local_ops(config, optimizer("rowwise_adagrad")), {}
    for stack in local_stacks(config):
        states |= init_slots(optimizer("rowwise_adagrad"), config, stack)
    tables = init_tables(config, 1)
    alone, _, _ = jax.jit(ops.update)(tables, states, ops.route(ids, None), d_pooled, rate, count)
    one = place((1, 1), "data_parallel", dtype)
    changed = by_name(one, alone)
    assert any((changed[name] != table).any() for name, table in by_name(one, tables).items())

    placed = place(mesh, sharding, dtype, packed=packed)
    state = placed.init_state(1)
    routes = placed.ops.route(ids, None)
    new, _, _ = jax.jit(placed.ops.update)(state.tables, state.table_opt_state, routes, d_pooled, rate, count)
    for name, table in by_name(placed, new).items():
        np.testing.assert_array_equal(table, changed[name], err_msg=name)


def test_steps_round_otherwise_each_time():
    """A gradient below half a unit in the last place moves a weight by as much as it should, over many steps."""
    config = model("bfloat16")
    ops, tables = local_ops(config, optimizer("sgd")), init_tables(config, 0)
    tables = {name: BFLOAT16.from_floats(jnp.ones(table.shape)) for name, table in tables.items()}
    ids = np.array([[3, -1, -1, -1, -1, -1, -1]], np.int32)
    d_pooled = jnp.full((1, 4, 4), 1e-4)

    def step(count, tables):
        states = {name: {} for name in tables}
        return ops.update(tables, states, ops.route(ids, None), d_pooled, jnp.float32(1), count + 1)[0]

    after = jax.jit(lambda tables: jax.lax.fori_loop(0, 1000, step, tables))(tables)["stack_0"][3]
    np.testing.assert_allclose(BFLOAT16.to_floats(after).mean(), 0.9, atol=0.02)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_less_memory_is_held_and_predicted_and_slots_stay_float32(dtype):
    placed = place((1, 2), "row_wise", dtype, "adagrad")
    cost = estimate(placed.model, placed.optimizer, placed.plan, Load(8), HARDWARE["cpu"])
    leaves = jax.tree.leaves(placed.abstract_state.tables)
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    assert cost.memory["tables"] == held == cost.memory["optimizer state"] * table_dtype(dtype).bytes / 4
    assert {leaf.dtype.name for leaf in leaves} == {table_dtype(dtype).stored}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(placed.abstract_state.table_opt_state)} == {"float32"}


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.sample(1)
def test_training_goes_on_from_a_checkpoint_under_another_plan(tmp_path, dtype):
    old, new = place((1, 4), "row_wise", dtype), place((2, 2), "mix", dtype, packed=dtype == "bfloat16")
    step = old.jit_step(make_train_step(old.model, LossConfig(), old.optimizer, 1, old.ops))
    state = old.init_state(1)
    for i in range(3):
        state, _ = step(state, old.put(pad(random_batch(old.model, 16, seed=i), 4)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(LATEST, state, old, {})
    for placed in (old, new):
        with Checkpoints(tmp_path) as checkpoints:
            restored = checkpoints.restore(LATEST, placed)
        for name, rows in by_name(placed, restored.tables).items():
            np.testing.assert_array_equal(rows, by_name(old, state.tables)[name], err_msg=name, strict=True)


def test_gradients_of_a_batch_are_those_of_float32_tables():
    """One step from equal weights moves float32 and bfloat16 tables alike, but for the rounding."""
    half, single = model("bfloat16"), tiny_model()
    start, settings = init_state(half, optimizer("sgd"), 0), optimizer("sgd")
    wide = start.replace(tables={name: BFLOAT16.to_floats(table) for name, table in start.tables.items()})
    batch, loss = random_batch(single, 16), LossConfig()
    of_half, _ = jax.jit(make_train_step(half, loss, settings))(start, batch)
    of_single, _ = jax.jit(make_train_step(single, loss, settings))(wide, batch)
    for name, table in of_single.tables.items():
        got = BFLOAT16.to_floats(of_half.tables[name])
        np.testing.assert_allclose(got, table, rtol=2**-7, atol=1e-30)


@pytest.mark.exhaustive
def test_an_export_has_the_weights_of_training(tmp_path):
    config = model("bfloat16")
    state, _ = lively_state(config), export_tiny(tmp_path, config)
    batch = random_batch(config, 20)
    got = load(tmp_path).predict(batch.dense_BxN, batch.ids_BxK)
    np.testing.assert_allclose(got, jax.nn.sigmoid(logits(config, state, batch)), atol=1e-6)


def test_noise_is_of_its_own_for_each_table_row_column_and_update():
    tables = tuple(TableConfig(name, 50, 4, dtype="bfloat16") for name in ("a", "b"))
    features = tuple(FeatureConfig(name, name) for name in ("a", "b"))
    (stack,) = local_stacks(tiny_model(tables=tables, features=features))
    drawn = [np.asarray(noise_of(stack, jnp.int32(count))(jnp.arange(100))) for count in (1, 2)]
    assert len(np.unique(drawn)) == 2 * 100 * 4
    assert abs(np.mean(np.array(drawn, np.float64)) / 2**32 - 0.5) < 0.05
