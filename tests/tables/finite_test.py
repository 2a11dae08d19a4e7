"""A pooled vector's gradient that is no number is told, whoever updates the tables, and looked for once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.config import FeatureConfig, LossConfig, TableConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.tables.collective import ExchangeOptions
from dlrm_jax.tables.kernels import blocks, build, segments
from dlrm_jax.tables.kernels.choice import Kernels, table_ops
from dlrm_jax.tables.layout import local_stacks
from dlrm_jax.training.state import init_state
from dlrm_jax.training.step import make_train_step
from tests.helpers import optimizer, tiny_model
from tests.tables.native_test import needs_compiler

TABLES = tuple(TableConfig(name, 5, 4) for name in "ab")
FEATURES = tuple(FeatureConfig(name, name) for name in "ab")
MODEL = tiny_model(tables=TABLES, features=FEATURES, bottom_mlp=(4,), top_mlp=(1,))
BATCH = Batch(
    dense_BxN=np.ones((2, MODEL.num_dense), np.float32),
    ids_BxK=np.array([[1, 3], [1, 3]], np.int32),
    label_B=np.ones(2, np.float32),
    weight_B=np.ones(2, np.float32),
)
WHO = ["xla", pytest.param("native", marks=needs_compiler), "pallas"]


@pytest.fixture
def step_by(monkeypatch):
    """`(who, rule) -> (step, state)` of a model that scores by the product of both rows alone."""
    monkeypatch.setattr(blocks, "IN_FLIGHT", 1)
    real = segments.update_segments
    monkeypatch.setattr(segments, "update_segments", lambda *args: real(*args, interpret=True))

    def made(who: str, rule: str, row_of_a: float):
        if who == "native":
            build.register()
        settings, kernels = optimizer(rule), Kernels("xla", who)
        stacks, mesh = local_stacks(MODEL), make_mesh(MeshShape(1, 1))
        ops = table_ops(kernels, MODEL, settings, stacks, mesh, ExchangeOptions())
        state = init_state(MODEL, settings, 0)
        (stack,) = stacks
        weights = jnp.zeros_like(state.tables[stack.name]).at[: TABLES[0].num_embeddings].set(row_of_a)
        dense = jax.tree.map(jnp.zeros_like, state.dense_params)
        dense["top_mlp"]["layer_0"]["kernel"] = dense["top_mlp"]["layer_0"]["kernel"].at[-1].set(1e10)
        state = state.replace(tables={stack.name: weights}, dense_params=dense)
        return make_train_step(MODEL, LossConfig(), settings, ops=ops), state

    return made


@pytest.mark.parametrize("rule", ["rowwise_adagrad", "adagrad"])
@pytest.mark.parametrize("who", WHO)
def test_a_gradient_that_overflows_is_told_though_the_loss_and_mlps_are_finite(step_by, who, rule):
    """Half of 1e10 times a row of 1e30, of which no other gradient knows, as the other row is 0."""
    for row_of_a, finite in ((1e-3, True), (1e30, False)):
        step, state = step_by(who, rule, row_of_a)
        new_state, step_metrics = jax.jit(step)(state, BATCH)
        assert bool(step_metrics["finite"]) == finite and np.isfinite(step_metrics["loss"])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new_state.dense_params))
        assert set(step_metrics) == {"loss", "finite", "learning_rate"}


@pytest.mark.parametrize("who", WHO[1:])
def test_kernels_tell_of_a_sum_that_overflows(step_by, who):
    """Both examples have the same rows: 2.5e38 each, and 5e38 is infinite."""
    step, state = step_by(who, "rowwise_adagrad", 1e29)
    assert not jax.jit(step)(state, BATCH)[1]["finite"]
    alone = dataclasses.replace(BATCH, ids_BxK=np.array([[1, 3], [2, 4]], np.int32))
    assert jax.jit(step)(state, alone)[1]["finite"]


@pytest.mark.parametrize("who", WHO[1:])
def test_a_sum_that_overflows_over_many_slots_is_told_and_that_of_empty_bags_is_none(step_by, who):
    """More slots than a kernel's program adds up: 200 sums of 5e36 are infinite, and of a tenth of that are not.

    Empty bags have gradients too, 8 of which are infinite here, but no row knows of them.
    """
    rows = 200
    batch = jax.tree.map(lambda x: np.repeat(x[:1], rows, axis=0), BATCH)
    for row_of_a, ids, finite in ((2e29, [1, 3], False), (2e28, [1, 3], True), (2e30, [1, -1], True)):
        step, state = step_by(who, "rowwise_adagrad", row_of_a)
        several = dataclasses.replace(batch, ids_BxK=np.repeat(np.array([ids], np.int32), rows, axis=0))
        assert bool(jax.jit(step)(state, several)[1]["finite"]) == finite


@pytest.mark.parametrize("who", WHO)
def test_kernels_spare_another_pass_over_the_gradients(step_by, who):
    step, state = step_by(who, "rowwise_adagrad", 1.0)
    text = jax.jit(step).lower(state, BATCH).as_text()
    over_pooled = [line for line in text.splitlines() if "is_finite" in line and "2x2x4xf32" in line]
    assert len(over_pooled) == (who == "xla")
