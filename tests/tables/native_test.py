"""C++ lookup and update equal to XLA's, on every kind of bag; compiled once, refused clearly where they cannot be."""

import hashlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.config import FeatureConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TableConfig
from dlrm_jax.host.mesh import MeshShape
from dlrm_jax.host.native_code import has_compiler
from dlrm_jax.tables import exchange, init
from dlrm_jax.tables.exchange import init_slots, local_ops
from dlrm_jax.tables.init import init_tables
from dlrm_jax.tables.kernels import build, native
from dlrm_jax.tables.layout import local_stacks, place_stacks
from dlrm_jax.tables.plan import DATA_PARALLEL, make_plan

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler on this machine")

RATE = 0.1


def model_of(dim, hotness, pooling="sum"):
    return ModelConfig(
        num_dense=2,
        tables=tuple(TableConfig(f"t{i}", rows, dim) for i, rows in enumerate((1, 7, 50_000))),
        features=tuple(FeatureConfig(f"f{i}", f"t{i % 3}", h, pooling) for i, h in enumerate(hotness)),
        bottom_mlp=(dim,),
        top_mlp=(1,),
    )


def settings_of(table):
    return OptimizerConfig(schedule=ScheduleConfig(learning_rate=RATE), table=table, dense="sgd", eps=1e-4)


def slots_of(model, batch, weighted=False):
    """Ids with repeats and, in bags, empty slots and empty bags; weights or None; gradients."""
    rng = np.random.default_rng(0)
    rows = {table.name: table.num_embeddings for table in model.tables}
    ids = np.concatenate([rng.integers(0, rows[f.table], (batch, f.hotness)) for f in model.features], axis=1)
    if model.num_slots > len(model.features):
        ids[rng.random(ids.shape) < 0.2] = -1
        ids[::5, : model.features[0].hotness] = -1
    weights = rng.normal(size=ids.shape).astype(np.float32) if weighted else None
    d_pooled = rng.normal(size=(batch, len(model.features), model.embedding_dim)).astype(np.float32)
    return ids.astype(np.int32), weights, d_pooled


def run(make_ops, model, settings, ids, weights, d_pooled):
    """(pooled, tables, states) after a lookup and two updates, compiled, tables given away."""
    made = make_ops(model, settings)
    tables, states = init_tables(model, 0), {}
    for stack in local_stacks(model):
        states |= init_slots(settings, model, stack)

    def step(tables, states, d_pooled):
        pooled, routes = made.lookup(tables, made.route(ids, weights))
        return pooled, *made.update(tables, states, routes, d_pooled, jnp.float32(RATE), jnp.int32(1))[:2]

    step = jax.jit(step, donate_argnums=(0, 1))
    pooled, tables, states = step(tables, states, d_pooled)
    _, tables, states = step(tables, states, -0.5 * d_pooled)
    return jax.tree.map(np.asarray, (pooled, tables, states))


def native_ops(model, settings):
    build.register()
    lookup, update = (what == "native" for what in native.does(model, settings))
    assert lookup or update
    return native.with_native(local_ops(model, settings), lookup, update, settings, local_stacks(model))


def assert_equal_to_plain(model, settings, *slots):
    plain = run(local_ops, model, settings, *slots)
    ours = run(native_ops, model, settings, *slots)
    # A row of the smallest table takes hundreds of gradients, and rounding grows with their sum.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, plain)


@needs_compiler
@pytest.mark.parametrize(
    ("table", "dim", "hotness", "pooling", "weighted", "batch"),
    [
        ("sgd", 16, (3, 1, 20, 5), "sum", False, 67),
        ("adagrad", 32, (4, 4, 4), "mean", False, 16),
        ("rowwise_adagrad", 64, (2, 9, 30), "sum", True, 33),
        ("sgd", 128, (2, 2, 2), "mean", True, 5),
        ("adagrad", 12, (1, 7, 3), "sum", False, 40),
        ("rowwise_adagrad", 16, (1, 1, 1), "sum", False, 64),
        ("rowwise_adagrad", 16, (2, 1, 1), "sum", False, 1),
    ],
)
@pytest.mark.sample(2)
def test_native_is_equal_to_plain(table, dim, hotness, pooling, weighted, batch):
    model = model_of(dim, hotness, pooling)

    assert_equal_to_plain(model, settings_of(table), *slots_of(model, batch, weighted))


@needs_compiler
def test_native_over_several_stacks_is_equal_to_plain(monkeypatch):
    model = model_of(16, (3, 2, 5, 4, 1, 2))
    plan = make_plan(model, MeshShape(1, 1), DATA_PARALLEL)
    stacks = place_stacks(model, plan, max_rows=20)
    assert len(stacks) == 2
    for module in (exchange, init, native, sys.modules[__name__]):
        monkeypatch.setattr(module, "local_stacks", lambda model, divisible=True: stacks)

    assert_equal_to_plain(model, settings_of("rowwise_adagrad"), *slots_of(model, 20))


def hash_of_native_run() -> str:
    model = model_of(16, (3, 20, 5))
    made = run(native_ops, model, settings_of("rowwise_adagrad"), *slots_of(model, 200, weighted=True))
    return hashlib.sha256(b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(made))).hexdigest()


@needs_compiler
def test_native_is_the_same_bits_with_any_number_of_threads():
    code = "from tests.tables.native_test import hash_of_native_run; print(hash_of_native_run())"
    hashes = set()
    for threads in ("1", "2", "5"):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": threads}  # XLA's own name for its threads.
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        hashes.add(done.stdout)
    assert len(hashes) == 1


@needs_compiler
@pytest.mark.parametrize("hotness", [(2, 3), (2, 1), (-1, 5), (2**40,)])
@pytest.mark.parametrize("target", build.TARGETS)
@pytest.mark.sample(4)
def test_bags_that_do_not_fit_the_ids_are_not_read(target, hotness):
    """As native_ops never passes them: XLA knows the arrays' sizes, and C++ compares."""
    build.register()
    table, ids = jnp.ones((7, 4)), jnp.zeros((5, 4), jnp.int32)
    bags, attributes = jnp.ones((5, len(hotness), 4)), {"hotness": np.array(hotness, np.int64)}
    if target == "dlrm_lookup":
        inputs, outputs = (table, ids, jnp.zeros((0, 0))), [bags]
    else:
        held = (table,) if target.endswith("sgd") else (table, jnp.ones((7, 1 if "rowwise" in target else 4)))
        inputs = (*held, ids, jnp.zeros((0, 0)), bags, jnp.float32(1))
        outputs = (*held, jnp.zeros(1, jnp.int32))
        attributes |= {} if target.endswith("sgd") else {"eps": np.float32(1)}
    call = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in outputs])
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
        jax.block_until_ready(call(*inputs, **attributes))


@needs_compiler
def test_native_keeps_one_copy_of_a_table():
    model = model_of(16, (3, 2, 5))
    made = native_ops(model, settings_of("adagrad"))
    tables = init_tables(model, 0)
    ids, _, d_pooled = slots_of(model, 8)

    def step(tables, states):
        _, routes = made.lookup(tables, made.route(ids, None))
        return made.update(tables, states, routes, d_pooled, jnp.float32(RATE), jnp.int32(1))[:2]

    states = {name: {"sum": jnp.zeros_like(table)} for name, table in tables.items()}
    memory = jax.jit(step, donate_argnums=(0, 1)).lower(tables, states).compile().memory_analysis()

    num_bytes = 50_008 * 16 * 4
    assert memory.alias_size_in_bytes >= 2 * num_bytes
    assert memory.temp_size_in_bytes < num_bytes / 10


@needs_compiler
def test_a_rule_that_native_does_not_know_is_left_to_xla_and_said(caplog):
    model = model_of(16, (3, 1, 5))
    with caplog.at_level("INFO", logger="dlrm_jax"):
        assert_equal_to_plain(model, settings_of("adam"), *slots_of(model, 20))
    assert [record.getMessage() for record in caplog.records] == [
        "--kernels=native: tables.cc has no Adam, so XLA updates the tables"
    ]
