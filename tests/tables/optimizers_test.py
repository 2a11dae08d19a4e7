"""Tests `dlrm_jax/tables/optimizers.py`: row-sparse updates equal dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.host import formulations
from dlrm_jax.tables import optimizers
from dlrm_jax.tables.optimizers import BagGrad, SparseGrad
from tests.helpers import optimizer

V, D = 6, 3


def gradient(seed: int, size: int = 20) -> SparseGrad:
    """Repeated ids, empty slots (-1) and ids beyond the table."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, V + 1, size).astype(np.int32)
    return SparseGrad(jnp.asarray(ids), jnp.asarray(rng.normal(size=(size, D)), jnp.float32))


def dense(grad: SparseGrad) -> np.ndarray:
    total = np.zeros((V, D))
    for row, value in zip(np.asarray(grad.ids_M), np.asarray(grad.rows_MxD), strict=True):
        if 0 <= row < V:
            total[row] += value
    return total


def dense_update(name: str, g: np.ndarray, state: np.ndarray, table: np.ndarray, rate: float, eps: float):
    """The formulas of the reference, on whole tables."""
    if name == "sgd":
        return table - rate * g, state
    state = state + (g**2 if name == "adagrad" else (g**2).mean(axis=1, keepdims=True))
    return table - rate * g / (np.sqrt(state) + eps), state


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad"])
def test_update_equals_the_dense_formula_over_steps(name):
    ours = optimizers.make_sparse_optimizer(optimizer(name))
    table = jax.random.normal(jax.random.key(0), (V, D))
    expected, expected_state = np.asarray(table, np.float64), np.zeros((V, D if name == "adagrad" else 1))
    state = ours.init(table, D)
    update = jax.jit(ours.update, donate_argnums=(1, 2))
    for seed in range(4):
        grad = gradient(seed)
        table, state = update(grad, state, table, jnp.float32(0.1))
        expected, expected_state = dense_update(name, dense(grad), expected_state, expected, 0.1, 1e-10)
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad"])
def test_rows_not_looked_up_keep_their_bits(name):
    ours = optimizers.make_sparse_optimizer(optimizer(name))
    table = jax.random.normal(jax.random.key(0), (V, D))
    grad = SparseGrad(jnp.array([2, 2, -1, V]), jnp.ones((4, D)))
    new_table, _ = ours.update(grad, ours.init(table, D), table, jnp.float32(0.1))
    untouched = np.arange(V) != 2
    np.testing.assert_array_equal(new_table[untouched], table[untouched])
    assert (np.asarray(new_table[2]) != np.asarray(table[2])).all()


@pytest.mark.parametrize("size", [1, 2, 20])
def test_merge_duplicates_has_each_id_once_with_the_summed_row(size):
    grad = gradient(3, size)
    merged = optimizers.merge_duplicates(grad, V)
    ids = np.asarray(merged.ids_M)
    assert len(set(ids[ids < V])) == (ids < V).sum()
    np.testing.assert_allclose(dense(merged), dense(grad), rtol=1e-5, atol=1e-6)


def test_one_id_in_every_slot_is_squared_after_summing():
    ours = optimizers.rowwise_adagrad(eps=0.0)
    grad = SparseGrad(jnp.zeros(8, jnp.int32), jnp.ones((8, D)))
    _, state = ours.update(grad, jnp.zeros((V, 1)), jnp.zeros((V, D)), jnp.float32(1.0))
    assert float(state[0, 0]) == 64.0


@pytest.mark.parametrize("size", [1, 2, 500])
def test_both_sorts_give_equal_ids_in_slot_order(size):
    ids = jnp.asarray(np.random.default_rng(size).integers(0, 2**31 - 1, size) % (2**31 - 1 if size < 500 else 40))
    for ours, theirs in zip(formulations.sort_packed(ids), formulations.sort_pairs(ids), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == np.int32


@pytest.mark.parametrize("piece", [1, 3, 4096])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad"])
def test_update_by_bags_equals_update_by_rows(name, scaled, piece, monkeypatch):
    """Ids that fill several pieces, that end with one, and void ones; bags of two hotnesses together."""
    monkeypatch.setattr(optimizers, "PIECE", piece)
    rng, bags, ids, rows = np.random.default_rng(piece), [], [], []
    for hotness, count in ((3, 4), (1, 5)):
        bag_ids = rng.integers(-1, V + 1, (hotness, count)).astype(np.int32)
        scale = rng.random((hotness, count)).astype(np.float32) if scaled else np.ones((hotness, count), np.float32)
        d_bags = rng.normal(size=(count, D)).astype(np.float32)
        bags.append(BagGrad(jnp.asarray(bag_ids), jnp.asarray(scale) if scaled else None, jnp.asarray(d_bags)))
        ids.append(bag_ids.reshape(-1))
        rows.append((scale[:, :, None] * d_bags[None]).reshape(-1, D))
    grad = SparseGrad(jnp.asarray(np.concatenate(ids)), jnp.asarray(np.concatenate(rows)))
    ours, table = optimizers.make_sparse_optimizer(optimizer(name)), jax.random.normal(jax.random.key(0), (V, D))
    state = jax.tree.map(lambda x: x + 0.5, ours.init(table, D))
    expected = jax.jit(ours.update)(grad, state, table, jnp.float32(0.1))
    actual = jax.jit(ours.update_bags)(tuple(bags), state, table, jnp.float32(0.1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)
