"""Kernels for GPUs equal to XLA's, interpreted, and lowered for CUDA without a GPU; who is chosen where."""

import dataclasses
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from dlrm_jax.config import ConfigError, FeatureConfig, TableConfig
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.tables.collective import ExchangeOptions
from dlrm_jax.tables.dtypes import table_dtype
from dlrm_jax.tables.exchange import OVERFLOWS, Fused, init_slots, placed_ops
from dlrm_jax.tables.init import init_stack
from dlrm_jax.tables.kernels import blocks, build, check, choice
from dlrm_jax.tables.kernels.choice import ALL_XLA, Kernels, chosen
from dlrm_jax.tables.kernels.pooled import pool_bags
from dlrm_jax.tables.kernels.segments import update_segments
from dlrm_jax.tables.layout import place_stacks
from dlrm_jax.tables.named_rules import make_rule
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.tables.updates import NOT_FINITE
from tests.helpers import RULES, optimizer, tiny_model
from tests.tables.native_test import needs_compiler

WIDTHS = (8, 16, 48, 64, 128, 12, 256, 8, 32)
CASES = [(name, WIDTHS[i % len(WIDTHS)], ("float32", "bfloat16")[i % 2], i % 3 == 0) for i, name in enumerate(RULES)]
"""Every rule; among them every width, both dtypes, with and without scales."""


def rule_of(name, **bounds):
    return make_rule(dataclasses.replace(optimizer(name), **bounds))


@pytest.fixture
def one_in_flight(monkeypatch):
    """As the loop's body is written down that often, and compiling it is what takes time."""
    monkeypatch.setattr(blocks, "IN_FLIGHT", 1)


def differs(case, dtype="float32"):
    return check.differs(case, table_dtype(dtype), {"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(("name", "width", "dtype", "scaled"), CASES)
@pytest.mark.sample(3)
def test_fused_update_is_xlas(one_in_flight, name, width, dtype, scaled):
    assert not differs(check.update_case(rule_of(name), table_dtype(dtype), width, scaled, interpret=True), dtype)


def test_fused_update_with_several_slots_in_flight_and_bounded_rows_is_xlas():
    bounded = rule_of("ftrl", table_l2=0.1, table_clip_norm=0.5, table_weight_decay=0.1, table_max_norm=0.9)
    assert not differs(check.update_case(bounded, table_dtype("float32"), 12, interpret=True))


@pytest.mark.parametrize(("width", "dtype", "scaled"), [(8, "float32", False), (48, "bfloat16", True)])
def test_fused_lookup_is_xlas(width, dtype, scaled):
    assert not differs(check.pool_case(table_dtype(dtype), width, scaled, interpret=True))  # Sums are of float32.


def lowered_for_cuda(function, *args):
    """The text of a module for a GPU that is not there."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Of Pallas's Triton backend, by jax 0.12.
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.golden
@pytest.mark.parametrize(("name", "width", "dtype", "scaled"), [*CASES, ("adam", 256, "float16", True)])
@pytest.mark.sample(4)
def test_kernels_are_lowered_for_cuda(name, width, dtype, scaled):
    cases = (
        check.update_case(rule_of(name), table_dtype(dtype), width, scaled),
        check.pool_case(table_dtype(dtype), width, scaled),
    )
    update, pool = (lowered_for_cuda(ours, *args) for ours, _, args in cases)
    assert update.count("__gpu$xla.gpu.triton") == pool.count("__gpu$xla.gpu.triton") == 1
    kept = 1 + len(rule_of(name).slots)
    assert update.count("output_operand_alias<") == kept  # In place.


@pytest.mark.parametrize(
    ("shardings", "devices", "capacity"),
    [
        (("data_parallel", "data_parallel"), 1, 0),
        (("row_wise", "row_wise"), 2, 0),
        (("row_wise", "row_wise"), 2, 4),
        (("column_wise", "column_wise"), 2, 0),
        (("row_wise", "column_wise"), 2, 0),
        (("data_parallel", "row_wise"), 2, 0),
    ],
)
@pytest.mark.sample(2)
def test_a_step_by_kernels_is_xlas(one_in_flight, shardings, devices, capacity):
    """Row-wise too, whose rows travel, in rounds where few fit; split columns are XLA's, as their rows are not whole.

    A gradient that is no number is counted where kernels look at all.
    """
    tables = tuple(TableConfig(f"t{i}", rows, 8) for i, rows in enumerate((3, 50)))
    features = tuple(FeatureConfig(f"f{i}", f"t{i}", 3 - 2 * i) for i in range(2))
    model = tiny_model(tables=tables, features=features, bottom_mlp=(8,))
    settings, shape = optimizer("rowwise_adagrad"), MeshShape(1, devices)
    plan = make_plan(model, shape, dict(zip(("t0", "t1"), shardings, strict=True)))
    mesh, stacks = make_mesh(shape), place_stacks(model, plan)
    options = ExchangeOptions(capacity={stack.name: capacity for stack in stacks if capacity})
    rng = np.random.default_rng(0)
    ids = np.concatenate([rng.integers(-1, 3, (16, 3)), rng.integers(0, 50, (16, 1))], axis=1).astype(np.int32)
    d_pooled = rng.normal(size=(16, 2, 8)).astype(np.float32)

    def step(fused, d_pooled=d_pooled):
        tables, states = {}, {}
        for stack in stacks:
            tables |= init_stack(model, stack, mesh, 0)
            states |= init_slots(settings, model, stack)
        ops = placed_ops(model, settings, stacks, mesh, options, fused)

        def run(tables, states):
            pooled, routes = ops.lookup(tables, ops.route(ids, None))
            return pooled, ops.update(tables, states, routes, d_pooled, jnp.float32(0.1), jnp.int32(1))

        return jax.jit(run)(tables, states)

    asked = []

    def pool(stack, *args):
        asked.append("pool")
        return pool_bags(stack.dtype, *args, interpret=True)

    def segments(*args):
        asked.append("segments")
        return update_segments(*args, interpret=True)

    (*ours, counted), (*theirs, none) = (
        (pooled, *after) for pooled, after in map(step, (Fused(pool, segments), Fused()))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)
    assert NOT_FINITE not in none and counted.get(NOT_FINITE, 0) == 0
    assert counted.get(OVERFLOWS, 0) == bool(capacity)
    d_pooled[:, 1, 3] = np.where(ids[:, 3] == ids[0, 3], np.nan, d_pooled[:, 1, 3])
    bad = step(Fused(pool, segments), d_pooled)[1][2]
    assert (NOT_FINITE in bad and bad[NOT_FINITE] > 0) == ("column_wise" not in shardings)
    assert bool(asked) == (set(shardings) != {"column_wise"})
    assert ("pool" in asked) == ("data_parallel" in shardings)


def mesh_of(platform, size=1):
    return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)] * size), size=size)


def with_bags(hotness):
    return tiny_model(
        tables=(TableConfig("t", 50, 4),), features=(FeatureConfig("a", "t"), FeatureConfig("b", "t", hotness))
    )


@needs_compiler
def test_auto_takes_native_kernels_where_they_are_faster_and_there_is_a_compiler(monkeypatch, caplog):
    """Others keep XLA's bits: SGD without bags or of short ones, rules and models that C++ does not have."""
    cpu, adagrad = mesh_of("cpu"), optimizer("adagrad")
    build.register()  # Compiled before the log is read, as the first of a machine tells that it compiles.
    caplog.set_level("INFO", logger="dlrm_jax")
    assert chosen("auto", with_bags(7), adagrad, cpu) == Kernels("native", "native")
    assert chosen("auto", with_bags(7), optimizer("adam"), cpu) == Kernels("native", "xla")
    for short in (1, 6):
        assert chosen("auto", with_bags(short), adagrad, cpu) == Kernels("native", "native")
    assert chosen("auto", with_bags(7), optimizer("sgd"), cpu) == Kernels("native", "native")
    for model, settings, mesh in (
        (with_bags(6), optimizer("sgd"), cpu),
        (with_bags(1), optimizer("sgd"), cpu),
        (with_bags(6), optimizer("adam"), cpu),
        (dataclasses.replace(with_bags(1), learned_pooling=True), adagrad, cpu),
        (dataclasses.replace(with_bags(7), learned_pooling=True), adagrad, cpu),
        (with_bags(7), adagrad, mesh_of("cpu", 2)),
        (with_bags(7), adagrad, mesh_of("tpu")),
    ):
        assert chosen("auto", model, settings, mesh) == ALL_XLA
    assert not caplog.text

    def no_compiler():
        raise ConfigError("no C++ compiler was found")

    monkeypatch.setattr(build, "register", no_compiler)
    assert chosen("auto", with_bags(7), adagrad, cpu) == ALL_XLA
    assert "XLA looks up and updates tables, slower here than C++ would: no C++ compiler was found" in caplog.text


def test_on_a_gpu_auto_takes_the_update_that_was_measured_where_it_works(monkeypatch, caplog):
    gpu, model = mesh_of("gpu"), with_bags(7)
    monkeypatch.setattr(check, "differs", lambda *case: "")
    assert chosen("auto", model, optimizer("adagrad"), gpu) == Kernels("xla", "pallas")
    assert chosen("auto", model, optimizer("sgd"), gpu) == ALL_XLA
    assert chosen("pallas", model, optimizer("sgd"), gpu) == Kernels("pallas", "pallas")
    assert chosen("xla", model, optimizer("adagrad"), gpu) == ALL_XLA
    monkeypatch.setattr(check, "differs", lambda *case: 1 / 0)
    assert chosen("auto", model, optimizer("adagrad"), gpu) == ALL_XLA
    assert caplog.messages == [
        "XLA updates rows of 4 float32 by Adagrad, as the Pallas kernel does not work here: "
        "ZeroDivisionError: division by zero"
    ]


@pytest.mark.parametrize(
    ("name", "mesh", "model", "message"),
    [
        ("pallas", mesh_of("cpu"), with_bags(2), "--kernels=pallas is for GPUs; tables are on a cpu here"),
        ("native", mesh_of("gpu"), with_bags(2), "--kernels=native is for CPUs; tables are on a gpu here"),
        ("native", mesh_of("cpu", 2), with_bags(2), "--kernels=native works on one device; this run has 2"),
        (
            "native",
            mesh_of("cpu"),
            dataclasses.replace(with_bags(2), learned_pooling=True),
            "--kernels=native has no --learned_pooling",
        ),
    ],
)
def test_kernels_that_cannot_be_here_are_refused(name, mesh, model, message):
    with pytest.raises(ConfigError, match=message):
        choice.chosen(name, model, optimizer("sgd"), mesh)
