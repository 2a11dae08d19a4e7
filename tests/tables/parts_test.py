"""Features of parts, and tables of several dims: what they mean, under every placement, exported, and their limits."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.config import ConfigError, LossConfig, Part, TableConfig, model_from_dict
from dlrm_jax.data.batch import check_ids
from dlrm_jax.host.mesh import MeshShape, make_mesh
from dlrm_jax.model.vectors import FeatureVectors
from dlrm_jax.serving import load
from dlrm_jax.serving.artifact.native import NativeCpu
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.tables.compress import compressed, mixed_dims
from dlrm_jax.tables.exchange import local_ops
from dlrm_jax.tables.id_maps import ID_MAPS, row_numbers
from dlrm_jax.tables.init import init_tables
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.state import init_state
from dlrm_jax.training.step import logits, make_train_step
from tests.helpers import SHARDINGS, optimizer, random_batch, tiny_model
from tests.placement_helpers import by_name, difference, pad
from tests.serving_helpers import export_tiny, lively_state

WAYS = [
    "qr,threshold=5,collisions=3",
    "qr,threshold=5,combine=sum",
    "qr,threshold=5,combine=concat",
    "mixed,threshold=2,temperature=0.5",
    "modulo,threshold=3,rows=4",
    "two_hashes,threshold=3,rows=3",
]


def everything():
    """Quotients and remainders of `user`, two hashes of `item`, and dims of 4, 2 and 1."""
    model = compressed(compressed(tiny_model(), "qr,threshold=8"), "two_hashes,threshold=6,rows=5")
    tables = [dataclasses.replace(t, embedding_dim={"item": 2, "flag": 1}.get(t.name, 4)) for t in model.tables]
    return dataclasses.replace(model, tables=tuple(tables))


def plain_vectors(model, named, projections, ids):
    """(B, F, D) by loops in float64."""
    out = np.zeros((len(ids), len(model.features), model.embedding_dim))
    for b in range(len(ids)):
        first = 0
        for f, feature in enumerate(model.features):
            pooled = []
            for part in feature.parts or (Part(feature.table),):
                table = np.asarray(named[part.table], np.float64)
                vector = np.zeros(table.shape[1])
                for i in ids[b, first : first + feature.hotness]:
                    if i >= 0:
                        row = {"quotient": i // part.number, "remainder": i % part.number, "same": i}.get(part.id_map)
                        vector += table[int(row_numbers(part, len(table), np.array([i]))[0]) if row is None else row]
                pooled.append(vector)
            first += feature.hotness
            vector = {"mul": np.prod, "sum": np.sum}.get(feature.combine, lambda x, axis: np.concatenate(x))(
                pooled, axis=0
            )
            if len(vector) < model.embedding_dim:
                table = (feature.parts or (Part(feature.table),))[0].table
                vector = vector @ projections[f"table_{[t.name for t in model.tables].index(table)}"]
            out[b, f] = vector
    return out


@pytest.mark.parametrize("model", [*(compressed(tiny_model(), way) for way in WAYS), everything()], ids=[*WAYS, "all"])
@pytest.mark.sample(1)
def test_vectors_are_those_of_loops_and_their_gradient_is_the_updates(model):
    batch, ops = random_batch(tiny_model(), 9), local_ops(model, optimizer("sgd"))
    state = init_state(model, optimizer("sgd"), 0)
    tables = {name: jax.random.normal(jax.random.key(1), table.shape) for name, table in state.tables.items()}
    projections = state.dense_params.get("vectors", {})

    @jax.jit
    def vectors(tables):
        pooled, _ = ops.lookup(tables, ops.route(batch.ids_BxK, None))
        return FeatureVectors(model).apply({"params": projections}, pooled), pooled

    want = plain_vectors(model, dict(named_tables(model, tables)), projections, batch.ids_BxK)
    np.testing.assert_allclose(vectors(tables)[0], want, rtol=1e-5, atol=1e-5)

    weights = jax.random.normal(jax.random.key(2), want.shape)
    d_tables = jax.jit(jax.grad(lambda tables: (vectors(tables)[0] * weights).sum()))(tables)

    def from_pooled(pooled):
        return (FeatureVectors(model).apply({"params": projections}, pooled) * weights).sum()

    @jax.jit
    def updated(tables):
        d_pooled = jax.grad(from_pooled)(vectors(tables)[1])
        routes = ops.route(batch.ids_BxK, None)
        return ops.update(tables, state.table_opt_state, routes, d_pooled, jnp.float32(-1), jnp.int32(1))[0]

    new = updated(tables)
    for name, d_table in d_tables.items():
        np.testing.assert_allclose(new[name] - tables[name], d_table, rtol=1e-4, atol=1e-5, err_msg=name)


@functools.cache
def one_device():
    model, settings = everything(), optimizer("rowwise_adagrad")
    state, step = init_state(model, settings, 3), jax.jit(make_train_step(model, LossConfig(), settings))
    for i in range(10):
        state, _ = step(state, random_batch(tiny_model(), 16, seed=i))
    return {name: np.asarray(rows) for name, rows in named_tables(model, state.tables)}


@pytest.mark.parametrize("mesh", [(2, 2), pytest.param((1, 8), marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("sharding", ["mix", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in SHARDINGS)])
def test_parts_and_dims_mean_the_same_under_every_placement(sharding, mesh):
    model, settings, shape = everything(), optimizer("rowwise_adagrad"), MeshShape(*mesh)
    kinds = (
        {t.name: SHARDINGS[i % len(SHARDINGS)] for i, t in enumerate(model.tables)} if sharding == "mix" else sharding
    )
    placed = Placed(model, settings, make_plan(model, shape, kinds), make_mesh(shape))
    step = placed.jit_step(make_train_step(model, LossConfig(), settings, 2, placed.ops))
    state = placed.init_state(3)
    for i in range(10):
        state, _ = step(state, placed.put(pad(random_batch(tiny_model(), 16, seed=i), 2 * placed.num_devices)))
    assert difference(by_name(placed, state.tables), one_device()) < 1e-5


@pytest.mark.parametrize("id_map", ID_MAPS.all())
def test_id_maps_are_alike_for_numpy_and_jax_and_keep_empty_slots(id_map):
    ids = np.array([[0, 1, 6, -1, 10]], np.int32)
    part, rows = Part("t", id_map, 3), 11
    got = row_numbers(part, rows, ids)
    np.testing.assert_array_equal(got, row_numbers(part, rows, jnp.asarray(ids)))
    assert got.dtype == np.int32 and got[0, 3] == -1
    assert (np.delete(got, 3) >= 0).all() and (got < rows).all()


def test_quotient_and_remainder_tell_all_ids_apart_and_two_hashes_nearly_all():
    ids = np.arange(1000, dtype=np.int32)
    pairs = {tuple(pair) for pair in zip(ids // 7, row_numbers(Part("t", "remainder", 7), 7, ids), strict=True)}
    assert len(pairs) == 1000
    hashed = [row_numbers(Part("t", "hash", salt), 200, ids) for salt in (1, 2)]
    counts = np.bincount(hashed[0], minlength=200)
    assert ((counts - 5) ** 2 / 5).sum() < 300  # Chi-square of 199 degrees: 0.999 lies at 267.
    assert len(set(zip(*hashed, strict=True))) > 980


def test_mixed_dims_are_the_references():
    rows = [1460, 583, 10131227, 2202608, 305, 24]
    assert mixed_dims(rows, 16, 0.3, round_dims=False) == [5, 6, 1, 1, 7, 16]
    assert mixed_dims(rows, 16, 0.3, round_dims=True) == [4, 8, 1, 1, 8, 16]


@pytest.mark.parametrize("way", WAYS)
def test_compressed_tables_keep_what_was_said_of_them(way):
    own = {"dtype": "bfloat16", "optimizer": "adam", "rate": 0.5}
    plain = tiny_model()
    model = dataclasses.replace(plain, tables=tuple(dataclasses.replace(table, **own) for table in plain.tables))
    tables = compressed(model, way).tables
    assert tables != model.tables and all(getattr(table, key) == own[key] for table in tables for key in own)


def test_num_ids_bounds_raw_ids():
    model = compressed(tiny_model(), "qr,threshold=5,collisions=3")
    ids = random_batch(tiny_model(), 3).ids_BxK
    ids[1, 0] = 11
    with pytest.raises(ConfigError, match=r"'user', row 1: id 11 is outside table 'user' of 11 rows"):
        check_ids(model, ids)


def test_initial_quotients_and_remainders_combine_to_the_variance_of_a_plain_table():
    table = TableConfig("user", 10_000, 8)
    for way in ("mul", "sum"):
        features = tuple(f for f in tiny_model().features if f.table == "user")
        plain = tiny_model(tables=(table,), features=features, bottom_mlp=(8,))
        model = compressed(plain, f"qr,collisions=100,combine={way}")
        named = {name: np.asarray(rows) for name, rows in named_tables(model, init_tables(model, 0))}
        ids = np.arange(10_000)
        parts = named["user/quotient"][ids // 100], named["user/remainder"][ids % 100]
        whole = parts[0] * parts[1] if way == "mul" else parts[0] + parts[1]
        assert abs(whole.mean()) < 1e-3
        np.testing.assert_allclose(whole.var(), 1 / 30_000, rtol=0.2)
    reference = compressed(plain, "qr,init=dlrm")
    drawn = dict(named_tables(reference, init_tables(reference, 0)))["user/quotient"]
    assert drawn.min() >= 0.01 and drawn.max() <= 1 and abs(float(drawn.mean()) - 0.505) < 0.02


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.sample(1)
def test_an_export_scores_as_training_did_and_its_raw_ids_are_bounded(tmp_path, kind):
    model = everything()
    state, version = lively_state(model), export_tiny(tmp_path, model, kind=kind)
    servable, batch = load(tmp_path), random_batch(tiny_model(), 20)
    want = jax.nn.sigmoid(jax.jit(functools.partial(logits, model))(state, batch))
    got = servable.predict(batch.dense_BxN, batch.ids_BxK)
    np.testing.assert_allclose(got, want, atol=1e-6 if kind == "float32" else 0.02)
    assert [feature.rows for feature in servable.signature.features] == [11, 7, 7, 1]
    with pytest.raises(ConfigError, match="scores tables of one dim, one a feature"):
        NativeCpu(version)


def test_a_model_with_parts_is_the_same_through_json():
    model = everything()
    assert model_from_dict(json.loads(json.dumps(dataclasses.asdict(model)))) == model


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("squeeze", "compress_tables is 'squeeze'; choose one of qr, modulo, two_hashes, mixed"),
        ("qr,combine=max", "compress_tables: combine is 'max'; choose one of sum, mul, concat"),
        ("qr,rows=3", "qr has no option 'rows'; its options: threshold, collisions, combine, init"),
        ("qr,collisions=many", "collisions is 'many'; it must be a number"),
        ("qr,collisions=0", "collisions is 0; it must be at least 1"),
        ("mixed,temperature=-1", "temperature is -1; it must not be negative"),
        ("modulo,rows=0", "rows is 0; it must be at least 1"),
    ],
)
def test_a_way_that_cannot_be_is_one_line(described, message):
    with pytest.raises(ConfigError, match=message):
        compressed(tiny_model(), described)


def test_an_unknown_id_map_is_one_line():
    with pytest.raises(ConfigError, match="id_map is 'shuffle'; choose one of same, quotient"):
        row_numbers(Part("t", "shuffle"), 3, np.zeros((1, 1), np.int32))
