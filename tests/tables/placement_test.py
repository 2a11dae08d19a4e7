"""Promise 3: one meaning, any placement. Every sharding type and mixes of them equal one device."""

import functools

import jax
import numpy as np
import pytest

from dlrm_jax.config import FeatureConfig, LossConfig, TableConfig
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.tables.collective import ExchangeOptions
from dlrm_jax.tables.exchange import OVERFLOWS
from dlrm_jax.tables.forms.table_wise import parcels
from dlrm_jax.tables.layout import place_stacks
from dlrm_jax.tables.plan import Placement, Plan, make_plan
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.state import init_state
from dlrm_jax.training.step import logits, make_pipelined_step, make_train_step
from tests.helpers import RULES, SHARDINGS, optimizer, random_batch, tiny_model
from tests.placement_helpers import by_name, difference, local, pad, whole

NUM_STEPS, BATCH = 20, 22  # Divided by none of the meshes.
TOLERANCE = {"sgd": 1e-6}
OTHERS = 1e-5
MESHES = [(1, 2), (1, 3), (1, 4), (1, 8), (2, 2), (2, 4), (8, 1)]
OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad")
MORE_RULES = [name.replace("l1=0.5,", "") for name in RULES if name not in OPTIMIZERS]
"""With FTRL's l1 nearly all weights would be 0."""


def model(learned: bool = False):
    """Tables of 1, 7 and 61 rows, shared by features, in bags of 1 to 3 with sums and means."""
    base = tiny_model(learned_pooling=learned)
    more = (FeatureConfig("page", "page", hotness=2, pooling="mean"), FeatureConfig("site", "page"))
    return tiny_model(
        tables=(*base.tables, TableConfig("page", 61, 4)), features=(*base.features, *more), learned_pooling=learned
    )


def batch(step: int, weighted: bool):
    """A third of the ids of `page` from two rows, so that they repeat within and across devices."""
    made = random_batch(model(), BATCH, seed=step, weighted_ids=weighted)
    ids = made.ids_BxK.copy()
    ids[::3, -3:] = step % 2
    return made.replace(ids_BxK=ids)


@functools.cache
def one_device(table: str, learned: bool, weighted: bool):
    """(initial tables, first logits, tables after the steps, losses) of the plain version."""
    config = optimizer(table)
    state = init_state(model(learned), config, 3)
    born = {name: np.asarray(rows) for name, rows in named_tables(model(learned), state.tables)}
    first = np.asarray(jax.jit(functools.partial(logits, model(learned)))(state, batch(0, weighted)))
    step, losses = jax.jit(make_train_step(model(learned), LossConfig(), config)), []
    for i in range(NUM_STEPS):
        state, metrics = step(state, batch(i, weighted))
        losses.append(float(metrics["loss"]))
    trained = {name: np.asarray(rows) for name, rows in named_tables(model(learned), state.tables)}
    return born, first, trained, losses


def place(mesh, sharding, table, learned=False, capacity=0, packed=False, dtype=""):
    shape, config = MeshShape(*mesh), model(learned)
    if sharding == "mix":
        sharding = {t.name: SHARDINGS[(i + shape.model) % len(SHARDINGS)] for i, t in enumerate(config.tables)}
    plan = make_plan(config, shape, sharding)
    options = ExchangeOptions(dtype, {"routed_0": capacity} if capacity else {})
    return Placed(config, optimizer(table), plan, make_mesh(shape), options, packed)


def assert_equals_one_device(placed, table, learned=False, weighted=False, micro_batches=1):
    born, first, trained, losses = one_device(table, learned, weighted)
    state = placed.init_state(3)
    for name, rows in by_name(placed, state.tables).items():
        np.testing.assert_array_equal(rows, born[name], err_msg=name)
    batches = [pad(batch(i, weighted), placed.num_devices * micro_batches) for i in range(NUM_STEPS)]
    score = jax.jit(functools.partial(logits, placed.model, ops=placed.ops))
    scores = whole(score(state, placed.put(local(batches[0]))))
    np.testing.assert_allclose(scores[:BATCH], first, rtol=0, atol=1e-6)
    train_step = placed.jit_step(
        make_train_step(placed.model, LossConfig(), placed.optimizer, micro_batches, placed.ops)
    )
    counters = []
    for i in range(NUM_STEPS):
        state, metrics = train_step(state, placed.put(local(batches[i])))
        assert abs(float(metrics["loss"]) - losses[i]) < 1e-6
        counters.append(float(metrics.get(OVERFLOWS, 0)))
    assert difference(by_name(placed, state.tables), trained) < TOLERANCE.get(table, OTHERS)
    return state, counters


CASES = [
    (mesh, sharding, OPTIMIZERS[(i + j) % 3])
    for i, mesh in enumerate(MESHES)
    for j, sharding in enumerate((*SHARDINGS, "mix"))
]
DAILY = {(2, 2), (1, 8)}
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)
MIX_AND_OTHERS = ["mix", *(pytest.param(kind, marks=EXHAUSTIVE) for kind in SHARDINGS)]
"""A mix has every kind of placement in one model."""


@pytest.mark.parametrize(
    ("mesh", "sharding", "table"),
    [pytest.param(*case, marks=() if case[0] in DAILY else EXHAUSTIVE) for case in CASES],
)
@pytest.mark.sample(2)
def test_every_placement_equals_one_device(mesh, sharding, table):
    assert_equals_one_device(place(mesh, sharding, table), table)


@pytest.mark.slow
@pytest.mark.parametrize("table", [*(pytest.param(one, marks=EXHAUSTIVE) for one in OPTIMIZERS[:2]), OPTIMIZERS[2]])
@pytest.mark.parametrize("sharding", MIX_AND_OTHERS)
def test_every_placement_with_every_optimizer(sharding, table):
    assert_equals_one_device(place((2, 2), sharding, table), table, weighted=True)


@pytest.mark.slow
@pytest.mark.parametrize("table", [*MORE_RULES[:2], *(pytest.param(rule, marks=EXHAUSTIVE) for rule in MORE_RULES[2:])])
@pytest.mark.parametrize("mesh", [(2, 2), *(pytest.param(mesh, marks=EXHAUSTIVE) for mesh in ((1, 2), (1, 8), (2, 4)))])
@pytest.mark.sample(1)
@pytest.mark.exhaustive
def test_further_rules_under_a_mix_of_placements(mesh, table):
    assert_equals_one_device(place(mesh, "mix", table), table)


@pytest.mark.parametrize("sharding", MIX_AND_OTHERS)
@pytest.mark.exhaustive
def test_learned_pooling_weights_are_placed_too(sharding):
    assert_equals_one_device(place((1, 4), sharding, "rowwise_adagrad", learned=True), "rowwise_adagrad", learned=True)


@pytest.mark.parametrize(
    ("mesh", "sharding"),
    [
        ((2, 2), "mix"),
        pytest.param((1, 4), "row_wise", marks=EXHAUSTIVE),
        pytest.param((1, 4), "table_row_wise", marks=EXHAUSTIVE),
    ],
)
def test_what_does_not_fit_the_buffers_is_exchanged_in_further_rounds(mesh, sharding):
    small, counters = assert_equals_one_device(place(mesh, sharding, "rowwise_adagrad", capacity=1), "rowwise_adagrad")
    ample, none = assert_equals_one_device(place(mesh, sharding, "rowwise_adagrad"), "rowwise_adagrad")
    assert all(counters) and not any(none)
    jax.tree.map(np.testing.assert_array_equal, small, ample)


@pytest.mark.parametrize("sharding", MIX_AND_OTHERS)
def test_rows_packed_in_lines_are_the_same_rows(sharding):
    placed = place((2, 2), sharding, "rowwise_adagrad", learned=True, packed=True)
    assert all(stack.pack >= 32 and stack.local_shape[1] == 128 for stack in placed.stacks)
    assert_equals_one_device(placed, "rowwise_adagrad", learned=True)


@pytest.mark.exhaustive
def test_slots_packed_in_lines_are_the_same_slots():
    """A row's moments are replaced, and its count is added to, in lines that other rows share."""
    placed = place((2, 2), "mix", "adam,correct_by=row", packed=True)
    assert_equals_one_device(placed, "adam,correct_by=row")


@pytest.mark.parametrize("sharding", MIX_AND_OTHERS)
def test_micro_batches_on_a_mesh(sharding):
    assert_equals_one_device(place((1, 2), sharding, "sgd"), "sgd", micro_batches=2)


def test_the_pipelined_step_is_bit_equal():
    placed = place((2, 2), "mix", "rowwise_adagrad", capacity=2)
    batches = [placed.put(pad(batch(i, False), 4)) for i in range(6)]
    plain = placed.jit_step(make_train_step(placed.model, LossConfig(), placed.optimizer, 1, placed.ops))
    piped = jax.jit(make_pipelined_step(placed.model, LossConfig(), placed.optimizer, 1, placed.ops))
    a, b = placed.init_state(3), placed.init_state(3)
    routes = jax.jit(placed.ops.route)(batches[0].ids_BxK, None)
    for i in range(5):
        a, _ = plain(a, batches[i])
        b, _, routes = piped(b, batches[i], routes, batches[i + 1])
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "sharding", ["mix", *(pytest.param(f"{by}_wise", marks=EXHAUSTIVE) for by in ("table", "row", "column"))]
)
def test_vectors_sent_as_bfloat16_lose_little(sharding):
    exact, short = (place((1, 4), sharding, "sgd", dtype=dtype) for dtype in ("", "bfloat16"))
    scores = []
    for placed in (exact, short):
        score = jax.jit(functools.partial(logits, placed.model, ops=placed.ops))
        scores.append(np.asarray(score(placed.init_state(3), placed.put(pad(batch(0, False), 4)))))
    assert 0 < np.abs(scores[0] - scores[1]).max() < 0.02 * np.abs(scores[0]).max()
    text = jax.jit(short.ops.lookup).lower(short.init_state(0).tables, _routes(short)).as_text()
    assert "bf16" in text


def _routes(placed):
    return jax.jit(placed.ops.route)(placed.put(pad(batch(0, False), 4)).ids_BxK, None)


def test_parcels_of_table_wise_are_as_small_as_shards_allow():
    """Bags of 20 and 3 ids on one shard, of 5 and 5 on the other: 20 + 5 slots, and the order of the ids is kept."""
    tables = tuple(TableConfig(name, 9, 4) for name in "abcd")
    features = tuple(FeatureConfig(name, name, h) for name, h in zip("abcd", (3, 5, 20, 5), strict=True))
    config = tiny_model(tables=tables, features=features)
    first = {"a": 0, "b": 1, "c": 0, "d": 1}
    plan = Plan(MeshShape(1, 2), {name: Placement("table_wise", shard, 1) for name, shard in first.items()})
    (stack,) = place_stacks(config, plan)
    parcel = parcels(stack)
    assert parcel.hotness == (20, 5)
    assert parcel.feature_SxF.tolist() == [[2, 0], [1, 3]]
    assert parcel.slot_SxK[0].tolist() == [*range(8, 28), 0, 1, 2, -1, -1]
    assert parcel.slot_SxK[1].tolist() == [3, 4, 5, 6, 7, *[-1] * 15, *range(28, 33)]
