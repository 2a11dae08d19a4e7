"""Lookup, the gradient of its rows, and initial tables, against loops in NumPy and dense autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.config import EMPTY_SLOT, FeatureConfig, ModelConfig, TableConfig
from dlrm_jax.host.mesh import MeshShape
from dlrm_jax.tables import init, pooling
from dlrm_jax.tables.by_name import named_tables, stack_tables
from dlrm_jax.tables.exchange import init_slots, local_ops
from dlrm_jax.tables.init import init_tables
from dlrm_jax.tables.layout import MAX_STACK_ROWS, place_stacks
from dlrm_jax.tables.plan import DATA_PARALLEL, make_plan
from dlrm_jax.tables.pooling import POOLING_WEIGHTS
from tests.helpers import optimizer, random_batch, tiny_model

MEAN = tuple(
    FeatureConfig(name, table, hotness, "mean")
    for name, table, hotness in (("user", "user", 1), ("item", "item", 1), ("history", "item", 3), ("flag", "flag", 2))
)


def plain_lookup(config: ModelConfig, named: dict, ids: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """The oracle: a loop over examples, features and slots."""
    pooled = np.zeros((len(ids), len(config.features), config.embedding_dim))
    for b in range(len(ids)):
        slot = 0
        for f, feature in enumerate(config.features):
            count = 0
            for k in range(slot, slot + feature.hotness):
                if ids[b, k] != EMPTY_SLOT:
                    row = named[feature.table][ids[b, k]] * (1 if weights is None else weights[b, k])
                    if config.learned_pooling:
                        row = row * named[feature.table + POOLING_WEIGHTS][ids[b, k]]
                    pooled[b, f] += row
                    count += 1
            if feature.pooling == "mean" and count:
                pooled[b, f] /= count
            slot += feature.hotness
    return pooled


def numbered_tables(config: ModelConfig, seed: int = 0) -> dict[str, jax.Array]:
    tables = init_tables(config, seed)
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=table.shape), jnp.float32) for name, table in tables.items()}


CASES = {
    "sum": (tiny_model(), False),
    "mean": (tiny_model(features=MEAN), False),
    "weighted_ids": (tiny_model(features=MEAN), True),
    "learned_pooling": (tiny_model(learned_pooling=True), False),
    "learned_mean_of_weighted_ids": (tiny_model(learned_pooling=True, features=MEAN), True),
    "equal_hotness": (tiny_model(features=tuple(FeatureConfig(n, n, 2) for n in ("user", "item", "flag"))), False),
}


def lookup(config, tables, ids, weights=None):
    ops = local_ops(config)
    return jax.jit(lambda tables: ops.lookup(tables, ops.route(ids, weights))[0])(tables)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_rows", [MAX_STACK_ROWS, 12])
@pytest.mark.sample(2)
def test_lookup_and_update_equal_the_plain_form(case, max_rows, monkeypatch):
    """The gradient of the rows is what SGD at a rate of -1 adds to them."""
    config, weighted = CASES[case]
    stacks = place_stacks(config, make_plan(config, MeshShape(1, 1), DATA_PARALLEL), max_rows=max_rows)
    assert len(stacks) == (1 if max_rows > 12 else 2)
    for module in ("exchange", "init", "by_name"):
        monkeypatch.setattr(f"dlrm_jax.tables.{module}.local_stacks", lambda config: stacks)
    tables = numbered_tables(config)
    batch = random_batch(config, 9, weighted_ids=weighted)
    named = {name: np.asarray(rows, np.float64) for name, rows in named_tables(config, tables)}
    pooled = lookup(config, tables, batch.ids_BxK, batch.id_weights_BxK)
    expected = plain_lookup(config, named, batch.ids_BxK, batch.id_weights_BxK)
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)

    d_pooled = jax.random.normal(jax.random.key(0), pooled.shape)
    _, vjp = jax.vjp(lambda t: lookup(config, t, batch.ids_BxK, batch.id_weights_BxK), tables)
    want = jax.jit(vjp)(d_pooled)[0]
    ops, states = local_ops(config, optimizer("sgd")), {}
    for stack in stacks:
        states |= init_slots(optimizer("sgd"), config, stack)

    @jax.jit
    def updated(tables, states):
        routes = ops.route(batch.ids_BxK, batch.id_weights_BxK)
        return ops.update(tables, states, routes, d_pooled, jnp.float32(-1), jnp.int32(1))[0]

    new = updated(tables, states)
    for name, d_table in want.items():
        np.testing.assert_allclose(new[name] - tables[name], d_table, rtol=1e-5, atol=1e-5, err_msg=name)


def test_empty_bag_pools_to_zero_under_every_pooling():
    config = tiny_model(features=MEAN)
    ids = np.full((2, config.num_slots), EMPTY_SLOT, np.int32)
    np.testing.assert_array_equal(lookup(config, numbered_tables(config), ids), 0)


def test_init_depends_on_seed_table_name_and_position_alone():
    alone = tiny_model(tables=(TableConfig("item", 7, 4),), features=(FeatureConfig("item", "item"),))
    rows = dict(named_tables(tiny_model(), init_tables(tiny_model(), 5)))
    np.testing.assert_array_equal(rows["item"], init_tables(alone, 5)["stack_0"][:7])
    assert (np.asarray(rows["item"]) != np.asarray(init_tables(alone, 6)["stack_0"])).mean() > 0.9
    unscaled = {name: np.asarray(rows[name][:7]) * len(rows[name]) ** 0.5 for name in ("user", "item")}
    assert not np.isclose(unscaled["user"], unscaled["item"]).any()


def test_init_in_pieces_equals_init_at_once(monkeypatch):
    whole = init_tables(tiny_model(), 1)["stack_0"]
    monkeypatch.setattr(init, "FILL_FLOATS", 16)
    np.testing.assert_array_equal(init_tables(tiny_model(), 1)["stack_0"], whole)


@pytest.mark.parametrize(
    ("name", "std", "limit"), [("dlrm", 0.01 / 3**0.5, 0.01), ("flax", 0.25, np.inf), ("normal:1e-4", 1e-4, 1e-3)]
)
def test_init_has_the_stated_distribution(name, std, limit):
    config = tiny_model(
        tables=(TableConfig("big", 10000, 16),),
        features=(FeatureConfig("big", "big"),),
        bottom_mlp=(16,),
        table_init=name,
    )
    rows = np.asarray(init_tables(config, 0)["stack_0"], np.float64)
    assert abs(rows).max() < limit and np.isfinite(rows).all()
    assert abs(rows.mean()) < 4 * std / 400
    np.testing.assert_allclose(rows.std(), std, rtol=0.01)
    correlations = np.corrcoef(rows.T) - np.eye(16)
    assert abs(correlations).max() < 0.05


def test_stack_tables_inverts_named_tables():
    config = tiny_model(learned_pooling=True)
    tables = numbered_tables(config)
    restacked = stack_tables(config, dict(named_tables(config, tables)))
    assert restacked.keys() == tables.keys()
    for name in tables:
        np.testing.assert_array_equal(restacked[name], tables[name])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("hotness", [1, 2, 4, 5, 9])
@pytest.mark.sample(4)
def test_pooling_in_loops_equals_pooling_whole(hotness, scaled):
    rng = np.random.default_rng(hotness)
    table, ids = rng.normal(size=(7, 3)).astype(np.float32), rng.integers(-1, 7, (4, 2, hotness)).astype(np.int32)
    scale = np.where(ids < 0, 0, rng.random(ids.shape)).astype(np.float32) if scaled else None
    args = (pooling.read_rows, jnp.asarray(table), ids, scale)
    whole, loops = pooling.pool_whole(*args), pooling.pool_in_loops(*args)
    np.testing.assert_allclose(loops, whole, rtol=1e-5, atol=1e-6)
