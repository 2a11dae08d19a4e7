"""Promise 6: what a step sends and holds is known beforehand, and agrees with the compiled step."""

import dataclasses
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.config import FeatureConfig, HiddenConfig, LossConfig, ModelConfig, TableConfig
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.model import interactions
from dlrm_jax.model.interactions import base
from dlrm_jax.planning.cost import Load, dense_parameters, estimate
from dlrm_jax.planning.dense_work import DenseWork, dense_work
from dlrm_jax.planning.hardware import HARDWARE
from dlrm_jax.planning.hlo import collectives, largest_result, totals
from dlrm_jax.planning.skew import expected_distinct, fitted_skew
from dlrm_jax.tables.collective import ExchangeOptions
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.state import init_dense
from dlrm_jax.training.step import make_train_step
from tests.helpers import RULES, SHARDINGS, meeting, optimizer

BATCH = 512
SIZES = (1_000_000, 333_333, 1000, 40, 3, 500_000)
KINDS = (*SHARDINGS, "mix")
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)


def model(interaction: str = "dot", pooling: str = "sum", **options) -> ModelConfig:
    tables = tuple(TableConfig(f"t{i}", rows, 16) for i, rows in enumerate(SIZES))
    features = tuple(FeatureConfig(f"f{i}", f"t{i}", 1 if i else 3, pooling) for i in range(len(SIZES)))
    fields = {"num_dense": 13, "tables": tables, "features": features, "bottom_mlp": (64, 16), "top_mlp": (64, 1)}
    return ModelConfig(**meeting(fields | {"interaction": interaction, "cross_rank": 8, **options}))


def predicted_and_compiled(mesh, sharding, table="rowwise_adagrad", dtype="", parts=1, **changes):
    config, shape = model(**changes), MeshShape(*mesh)
    if sharding == "mix":
        sharding = {t.name: SHARDINGS[i % len(SHARDINGS)] for i, t in enumerate(config.tables)}
    plan = make_plan(config, shape, sharding)
    load = Load(BATCH, exchange_dtype=dtype, num_micro_batches=parts)
    cost = estimate(config, optimizer(table), plan, load, HARDWARE["cpu"])
    placed = Placed(config, optimizer(table), plan, make_mesh(shape), cost.options)
    step = placed.jit_step(make_train_step(config, LossConfig(), placed.optimizer, parts, placed.ops))
    return cost, step.lower(placed.abstract_state, placed.abstract_batch(BATCH)).compile()


def held(compiled) -> int:
    """Bytes on a device, by XLA's account."""
    memory = compiled.memory_analysis()
    not_aliased = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + not_aliased


def step_of(num_tables: int, dim: int, hotness: int, bottom: tuple, top: tuple, **changes) -> ModelConfig:
    tables = tuple(TableConfig(f"t{i}", 1000, dim) for i in range(num_tables))
    features = tuple(FeatureConfig(f"f{i}", f"t{i}", hotness) for i in range(num_tables))
    fields = {"num_dense": 13, "tables": tables, "features": features, "bottom_mlp": (*bottom, dim), "top_mlp": top}
    return ModelConfig(**meeting(fields | changes))


KAGGLE = ((512, 256), (512, 256, 1))
MANY = (1, 4)
SHAPES = [
    (step_of(26, 16, 1, *KAGGLE), (1, 1), "data_parallel", "rowwise_adagrad", 2048, 1),
    (step_of(26, 16, 5, *KAGGLE), (1, 1), "data_parallel", "rowwise_adagrad", 16384, 1),
    (step_of(26, 16, 5, *KAGGLE), (1, 1), "data_parallel", "sgd", 16384, 4),
    (step_of(26, 16, 1, (2048, 1024), (4096, 4096, 1)), (1, 1), "data_parallel", "sgd", 512, 1),
    (step_of(26, 16, 2, (8,), (8, 1), learned_pooling=True), (1, 1), "data_parallel", "rowwise_adagrad", 8192, 1),
    (step_of(8, 128, 1, (256,), (512, 1), interaction="cross", cross_rank=64), (1, 1), "data_parallel", "sgd", 2048, 1),
    (step_of(26, 16, 1, *KAGGLE), (1, 1), "data_parallel", "adagrad", 2048, 1),
    (step_of(26, 16, 5, *KAGGLE), MANY, "row_wise", "rowwise_adagrad", 16384, 1),
    (step_of(26, 16, 5, *KAGGLE), MANY, "table_wise", "adagrad", 16384, 1),
    (step_of(26, 16, 1, *KAGGLE), MANY, "column_wise", "momentum", 8192, 1),
    (step_of(26, 16, 1, *KAGGLE), (1, 1), "data_parallel", "momentum", 2048, 1),
]
NORMED, FREE = HiddenConfig(norm="batch", dropout=0.2), HiddenConfig("prelu", "layer", 0.5)
SHAPES += [
    (
        step_of(10, 10, 1, (), (400, 400, 1), interaction="cat", top_hidden=NORMED),
        (1, 1),
        "data_parallel",
        "sgd",
        4096,
        1,
    ),
    (step_of(26, 16, 5, *KAGGLE, bottom_hidden=NORMED, top_hidden=FREE), (1, 1), "data_parallel", "sgd", 8192, 4),
    (step_of(26, 16, 1, *KAGGLE, embed_numbers=True), (1, 1), "data_parallel", "sgd", 2048, 1),
    (
        step_of(10, 16, 1, (), (400, 1), interaction="cat", num_dense=100, embed_numbers=True, bottom_mlp=()),
        (1, 1),
        "data_parallel",
        "sgd",
        4096,
        1,
    ),
]
ALONE = [
    *(
        (step_of(26, 16, hotness, *KAGGLE), rule, batch, 1)
        for hotness in (1, 5)
        for batch in (2048, 16384)
        for rule in ("sgd", "rowwise_adagrad", "adagrad", "momentum", "rmsprop")
    ),
    (step_of(26, 16, 1, *KAGGLE), "adam", 4096, 1),
    (step_of(26, 16, 1, *KAGGLE), "sgd", 16384, 4),
    (step_of(26, 16, 5, *KAGGLE), "rowwise_adagrad", 16384, 4),
    *((step_of(26, 64 * hotness, hotness, *KAGGLE), "rowwise_adagrad", 4096, 1) for hotness in (1, 2)),
    *((step_of(8, 16, hotness, (8,), (8, 1)), "rowwise_adagrad", 8192, 1) for hotness in (1, 10)),
    (step_of(26, 16, 5, *KAGGLE, interaction="cat"), "rowwise_adagrad", 8192, 1),
    (step_of(26, 16, 5, *KAGGLE, interaction="cross", cross_rank=64), "sgd", 8192, 1),
    (step_of(26, 16, 4, (8,), (8, 1)), "rowwise_adagrad", 8192, 1),
    (step_of(12, 32, 1, (1024,), (2048, 1024, 1)), "rowwise_adagrad", 4096, 1),
    (step_of(40, 8, 3, (256, 64), (256, 64, 1)), "adagrad", 4096, 1),
]
MORE_SHAPES = [
    *((config, (1, 1), "data_parallel", *others) for config, *others in ALONE),
    *((step_of(26, 16, 5, *KAGGLE), MANY, kind, table, 16384, 1) for kind in SHARDINGS for table in ("sgd", "adagrad")),
    *((step_of(26, 16, 2, *KAGGLE), (2, 2), kind, "rowwise_adagrad", 8192, 2) for kind in SHARDINGS),
    *((step_of(26, 16, 4, (8,), (8, 1)), MANY, kind, "rowwise_adagrad", 8192, 1) for kind in SHARDINGS),
    *((step_of(12, 64, 1, (1024,), (2048, 1024, 1)), MANY, kind, "sgd", 4096, 1) for kind in SHARDINGS),
]


@pytest.mark.parametrize(
    ("config", "mesh", "sharding", "table", "batch_size", "parts"),
    [*SHAPES[::2], *(pytest.param(*shape, marks=EXHAUSTIVE) for shape in (*SHAPES[1::2], *MORE_SHAPES))],
)
@pytest.mark.sample(3)
def test_memory_is_that_of_the_compiled_step_where_tables_are_small(config, mesh, sharding, table, batch_size, parts):
    plan, load = make_plan(config, MeshShape(*mesh), sharding), Load(batch_size, num_micro_batches=parts)
    cost = estimate(config, optimizer(table), plan, load, HARDWARE["cpu"])
    placed = Placed(config, optimizer(table), plan, make_mesh(MeshShape(*mesh)), cost.options)
    step = placed.jit_step(make_train_step(config, LossConfig(), placed.optimizer, parts, placed.ops))
    fused = {"xla_cpu_use_fusion_emitters": True} if jax.__version__.startswith("0.10.") else None
    compiled = step.lower(placed.abstract_state, placed.abstract_batch(batch_size)).compile(fused)
    # On several devices XLA leaves gaps in the memory, of up to a fifth of it, which no sum of what lives together has.
    assert abs(cost.bytes_held / held(compiled) - 1) < (0.05 if mesh == (1, 1) else 0.15)


CASES = [
    *(((1, 8), kind, "rowwise_adagrad") for kind in KINDS),
    *(((2, 4), kind, "adagrad") for kind in ("table_wise", "column_wise", "mix")),
]
MORE = [
    *(((2, 4), kind, table) for kind in KINDS for table in ("sgd", "rowwise_adagrad")),
    *(((1, 8), kind, "sgd") for kind in KINDS),
]


@pytest.mark.parametrize(
    ("mesh", "sharding", "table"), [*CASES, *(pytest.param(*case, marks=EXHAUSTIVE) for case in MORE)]
)
@pytest.mark.sample(3)
def test_bytes_and_memory_are_those_of_the_compiled_step(mesh, sharding, table):
    cost, compiled = predicted_and_compiled(mesh, sharding, table)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert totals(collectives(text)) == dict(cost.sent.bytes_by_kind)
    assert abs(cost.bytes_held / held(compiled) - 1) < 0.05
    # No table is gathered, reduced or copied, and none has a temporary of its size.
    smallest_big_table = 333_333 * 16 * 4 // 8
    moving = ("copy", "all-gather", "all-gather-start", "all-reduce", "all-reduce-start", "reduce-scatter")
    assert largest_result(text, moving) < smallest_big_table
    assert memory.temp_size_in_bytes < 2 * smallest_big_table
    assert memory.alias_size_in_bytes > 0.98 * memory.output_size_in_bytes


@pytest.mark.parametrize("rule", ["rowwise_adagrad", "adam"])
@pytest.mark.sample(1)
def test_memory_of_an_update_of_all_rows_is_predicted(rule):
    settings = dataclasses.replace(optimizer(rule), table_update="all", table_l2=0.1)
    plan = make_plan(model(), MeshShape(1, 2), "row_wise")
    cost = estimate(model(), settings, plan, Load(BATCH), HARDWARE["cpu"])
    placed = Placed(model(), settings, plan, make_mesh(MeshShape(1, 2)), cost.options)
    step = placed.jit_step(make_train_step(model(), LossConfig(), settings, 1, placed.ops))
    compiled = step.lower(placed.abstract_state, placed.abstract_batch(BATCH)).compile()
    assert cost.bytes_held == pytest.approx(held(compiled), rel=0.05)


@pytest.mark.parametrize("sharding", KINDS)
@pytest.mark.parametrize("table", RULES)
@pytest.mark.sample(14)
def test_memory_of_every_rules_slots_is_predicted(table, sharding):
    config, shape = model(), MeshShape(2, 4)
    if sharding == "mix":
        sharding = {t.name: SHARDINGS[i % len(SHARDINGS)] for i, t in enumerate(config.tables)}
    plan = make_plan(config, shape, sharding)
    cost = estimate(config, optimizer(table), plan, Load(BATCH), HARDWARE["cpu"])
    placed = Placed(config, optimizer(table), plan, make_mesh(shape))
    leaves = jax.tree.leaves(placed.abstract_state.table_opt_state)
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    assert cost.memory["optimizer state"] == held


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "column_wise"])
@pytest.mark.sample(1)
def test_bfloat16_halves_what_is_sent_on_every_backend(sharding):
    cost, compiled = predicted_and_compiled((1, 4), sharding, dtype="bfloat16")
    sent = totals(collectives(compiled.as_text()))
    assert sent == dict(cost.sent.bytes_by_kind)
    full, _ = predicted_and_compiled((1, 4), sharding)
    assert sent["all-to-all"] < 0.6 * full.sent.bytes_by_kind["all-to-all"]


def test_rows_of_two_bytes_travel_as_they_are_stored():
    halves = tuple(dataclasses.replace(table, dtype="bfloat16") for table in model().tables)
    cost, compiled = predicted_and_compiled((1, 4), "row_wise", tables=halves)
    sent = totals(collectives(compiled.as_text()))
    assert sent == dict(cost.sent.bytes_by_kind)
    (capacity,) = cost.options.capacity.values()
    assert sent["all-to-all"] == 4 * capacity * (4 + 16 * (2 + 4))  # Numbers, rows there, gradients back.


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.sample(1)
def test_what_batch_norms_send_is_counted(parts):
    """Theirs are of many columns each: what has few is control."""
    hidden = HiddenConfig(norm="batch", dropout=0.1)
    changes = {"bottom_mlp": (128, 16), "top_mlp": (256, 1), "bottom_hidden": hidden, "top_hidden": hidden}
    cost, compiled = predicted_and_compiled((1, 2), "data_parallel", table="sgd", parts=parts, **changes)
    found = collectives(compiled.as_text())
    sent = (parts * totals(found, in_loop=True)["all-reduce"] if parts > 1 else totals(found)["all-reduce"]) / 4
    assert dense_work(model(**changes)).averages == 2 * (128 + 256)
    assert abs(cost.sent.bytes_by_kind["all-reduce"] / 4 - sent) <= parts


@pytest.mark.parametrize("sharding", ["row_wise", "column_wise"])
@pytest.mark.sample(1)
@pytest.mark.exhaustive
def test_gradients_of_micro_batches_are_added_before_they_are_sent(sharding):
    sent, counts = [], []
    for parts in (1, 4):
        cost, compiled = predicted_and_compiled((2, 2), sharding, parts=parts)
        found = collectives(compiled.as_text())
        assert totals(found) == dict(cost.sent.bytes_by_kind)
        assert "all-reduce" not in totals(found, in_loop=True)
        sent.append(cost.sent)
        counts.append(sum(one.kind == "all-reduce" for one in found))
    assert sent[0] == sent[1] and counts[0] == counts[1]


def test_scales_that_travel_are_counted():
    for sharding in ("table_wise", "column_wise"):
        cost, compiled = predicted_and_compiled((1, 4), sharding, pooling="mean")
        assert totals(collectives(compiled.as_text())) == dict(cost.sent.bytes_by_kind)


def test_row_wise_sends_little_more_than_each_needed_row_once_each_way():
    """Against what was needed of a drawn batch, and against partial sums of pooled vectors sent by every owner."""
    config, shape, devices = model(), MeshShape(1, 8), 8
    cost = estimate(config, optimizer(), make_plan(config, shape, "row_wise"), Load(4096), HARDWARE["cpu"])
    rng, ideal = np.random.default_rng(0), 0.0
    for _ in range(devices):
        for rows, hotness in zip(SIZES, (3, 1, 1, 1, 1, 1), strict=True):
            weight = np.arange(1, rows + 1) ** -1.05
            ids = np.searchsorted(np.cumsum(weight) / weight.sum(), rng.random(4096 // devices * hotness))
            ideal += 2 * len(np.unique(ids)) * 16 * 4 / devices
    sent = cost.sent.bytes_by_kind["all-to-all"]
    scattered = 2 * 4096 * len(SIZES) * 16 * 4  # (S, b, F, D) partial sums reduced, and their gradients gathered.
    assert sent < 1.5 * ideal
    assert scattered > 4 * ideal


def test_agreeing_where_a_round_ends_is_counted_on_large_meshes():
    config, cpu = model(), HARDWARE["cpu"]

    def reduced(shards: int, **options: ExchangeOptions) -> int:
        plan = make_plan(config, MeshShape(1, shards), "row_wise")
        cost = estimate(config, optimizer(), plan, Load(64 * shards), cpu, **options)
        return cost.sent.bytes_by_kind["all-reduce"] - 4 * (dense_parameters(config) + 1)

    assert reduced(8) == 0
    assert reduced(128) == 128 * 4
    assert reduced(128, options=ExchangeOptions()) == 0, "whoever may ask for all at once needs one round"


def counted_by_hand(config: ModelConfig) -> DenseWork:
    """The oracle: the layers of the MLPs, dots and low-rank cross layers, written down one by one."""
    vectors, dim, options = len(config.features) + 1, config.embedding_dim, config.interaction.options
    pairs = vectors * (vectors - 1) // 2 + vectors * options.get("self_interaction", False)
    width = dim + pairs if config.interaction.name == "dot" else vectors * dim
    cross = options.get("cross_layers", 0) * (2 * width * options.get("cross_rank", 0) + width)
    mlps = (config.num_dense, *config.bottom_mlp), (width, *config.top_mlp)
    layers = [pair for widths in mlps for pair in itertools.pairwise(widths)]
    return DenseWork(
        parameters=sum((i + 1) * o for i, o in layers) + cross,
        flops=2 * (sum(i * o for i, o in layers) + cross + (config.interaction.name == "dot") * vectors**2 * dim),
        outputs=sum(o for _, o in layers),
        interaction_width=width,
    )


@pytest.mark.parametrize(
    ("interaction", "options"),
    [
        ("dot", {}),
        ("dot", {"self_interaction": True}),
        ("cat", {}),
        ("cross", {"cross_layers": 1, "cross_rank": 5}),
        ("cross", {"cross_layers": 3, "cross_rank": 8}),
        ("dot", {"compute_dtype": "bfloat16"}),
    ],
)
def test_the_traced_program_has_the_work_that_is_counted_by_hand(interaction, options):
    config = model(interaction, **options)
    assert dense_work(config) == counted_by_hand(config)
    shapes = jax.eval_shape(lambda: init_dense(config, 0))
    assert dense_parameters(config) == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_work_in_a_loop_is_counted_as_often_as_it_is_done(monkeypatch):
    class Twice(interactions.Interaction):
        @nn.compact
        def __call__(self, bottom_BxD, pooled_BxFxD):
            matrix = jnp.ones((16, 16))
            return jax.lax.scan(lambda x, _: (x @ matrix, None), bottom_BxD, None, length=3)[0]

    monkeypatch.setattr(base.INTERACTIONS, "_known", base.registered() | {"twice": Twice})
    work = dense_work(model("twice"))
    assert work.flops == 2 * (13 * 64 + 64 * 16 + 3 * 16 * 16 + 16 * 64 + 64)


def test_expected_distinct_agrees_with_drawing():
    rng = np.random.default_rng(1)
    for rows, skew in ((50, 0.0), (10_000, 1.05), (100_000, 0.6)):
        weight = np.arange(1, rows + 1) ** -skew
        cumulative = np.cumsum(weight) / weight.sum()
        drawn = [len(np.unique(np.searchsorted(cumulative, rng.random(3000)))) for _ in range(10)]
        assert expected_distinct(rows, 3000, skew) == pytest.approx(np.mean(drawn), rel=0.05)
    assert expected_distinct(1, 100, 1.0) == pytest.approx(1)


def test_the_exponent_is_found_again_from_the_top_share():
    for rows, skew in ((1000, 0.3), (1_000_000, 1.1)):
        weight = np.arange(1, rows + 1) ** -skew
        assert fitted_skew(rows, float(weight[0] / weight.sum())) == pytest.approx(skew, abs=0.03)
