"""Tests `dlrm_jax/model/interactions/`: every interaction computes, trains, exports, plans and is written down."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.config import (
    ConfigError,
    FeatureConfig,
    InteractionConfig,
    LossConfig,
    ModelConfig,
    TableConfig,
    differences,
    model_from_dict,
    to_dict,
)
from dlrm_jax.host.mesh import MeshShape
from dlrm_jax.model import interactions
from dlrm_jax.model.interactions.dot import pairwise_dots
from dlrm_jax.planning.cost import Load, estimate
from dlrm_jax.planning.dense_work import dense_work
from dlrm_jax.planning.hardware import HARDWARE
from dlrm_jax.serving.artifact.loaded import load
from dlrm_jax.tables.by_name import named_tables
from dlrm_jax.tables.plan import make_plan
from dlrm_jax.training.run_config import ModelOptions, identity_of
from dlrm_jax.training.state import init_dense
from dlrm_jax.training.step import logits
from tests import oracle
from tests.helpers import ROOT, optimizer, random_batch, tiny_model
from tests.random_models import Case, make_trainer
from tests.serving_helpers import export_tiny, lively_state

CROSS = {"cross_layers": 2, "cross_rank": 3}
BRANCHES = {"projection_branch1": (5, 8), "projection_branch2": (12,)}
# name -> (the interaction and its options, the width that comes out for F = 4 features of D = 4, and the numbers)
TABLE = {
    "dot": ({}, 4 + 10),
    "dot with itself": ({"interaction": "dot", "self_interaction": True}, 4 + 15),
    "cat": ({"interaction": "cat"}, 20),
    "cross": ({"interaction": "cross", **CROSS}, 20),
    "full_cross": ({"interaction": "full_cross", "cross_layers": 2}, 20),
    "parallel_cross": ({"interaction": "parallel_cross", **CROSS, "tower_mlp": (6, 3)}, 20 + 3),
    "parallel_full_cross": ({"interaction": "parallel_full_cross", "cross_layers": 2, "tower_mlp": (6, 3)}, 20 + 3),
    "fm": ({"interaction": "fm"}, 8),
    "projection": ({"interaction": "projection", **BRANCHES}, 4 + 2 * 3),
}
NO_NUMBERS = {"num_dense": 0, "bottom_mlp": ()}
# The same, where each of the three numbers is a vector among those that meet.
EMBEDDED = {
    "dot, numbers embedded": ({"embed_numbers": True}, 4 + 28),
    "dot, a number embedded": ({"embedded_columns": (1,)}, 4 + 15),
    "full_cross, numbers embedded": (
        {"interaction": "full_cross", "cross_layers": 1, "embed_numbers": True, "bottom_mlp": ()},
        28,
    ),
}
CASES = {
    **{name: fields for name, (fields, _) in EMBEDDED.items()},
    **{name: fields for name, (fields, _) in TABLE.items()},
    **{f"{name}, no numbers": fields | NO_NUMBERS for name, (fields, _) in TABLE.items()},
}
every_case = pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())


def test_every_interaction_is_in_the_table():
    assert {tiny_model(**fields).interaction.name for fields in CASES.values()} == set(interactions.registered())


def plain_pairs(vectors: jax.Array, with_diagonal: bool) -> jax.Array:
    """The oracle: one dot product after the other, differentiated by JAX."""
    columns = [
        (vectors[:, i] * vectors[:, j]).sum(axis=1)
        for i in range(vectors.shape[1])
        for j in range(i + 1 if with_diagonal else i)
    ]
    return jnp.stack(columns, axis=1)


@pytest.mark.parametrize("with_diagonal", [False, True])
@pytest.mark.parametrize("num_vectors", [2, 5])
@pytest.mark.sample(2)
def test_pairwise_dots_equal_the_plain_form_with_gradient(num_vectors, with_diagonal):
    vectors = jax.random.normal(jax.random.key(0), (3, num_vectors, 4))
    plain, ours, in_bfloat16 = (
        jax.jit(with_gradient(function))
        for function in (
            lambda v: plain_pairs(v, with_diagonal),
            lambda v: pairwise_dots(v, with_diagonal),
            lambda v: pairwise_dots(v, with_diagonal, "bfloat16"),
        )
    )
    num_pairs = num_vectors * (num_vectors + (1 if with_diagonal else -1)) // 2
    cotangent = jax.random.normal(jax.random.key(1), (3, num_pairs))
    expected, plain_gradient = plain(vectors, cotangent)
    actual, our_gradient = ours(vectors, cotangent)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(our_gradient, plain_gradient, rtol=1e-5, atol=1e-5)
    found, gradient = in_bfloat16(vectors, cotangent)
    assert found.dtype == gradient.dtype == np.float32  # Of numbers with 8 bits, which are not added up in as few.
    np.testing.assert_allclose(found, expected, rtol=2**-7, atol=0.02)
    np.testing.assert_allclose(gradient, plain_gradient, rtol=2**-7, atol=0.05)
    text = in_bfloat16.lower(vectors, cotangent).as_text()
    assert [line.count("bf16>") for line in text.splitlines() if "dot_general" in line] == [2, 2]


def meet(bottom, pooled, name: str = "dot", **options):
    """What comes out of an interaction that has no weights."""
    return interactions.make(InteractionConfig(name, options)).apply({}, bottom, pooled)


@pytest.mark.parametrize(("with_diagonal", "width"), [(False, 16 + 351), (True, 16 + 378)])
def test_dot_interaction_of_criteo_has_the_reference_width(with_diagonal, width):
    output = meet(jnp.ones((2, 16)), jnp.ones((2, 26, 16)), self_interaction=with_diagonal)
    assert output.shape == (2, width)


def test_dot_interaction_starts_with_the_bottom_output():
    bottom, pooled = jax.random.normal(jax.random.key(0), (2, 4)), jax.random.normal(jax.random.key(1), (2, 3, 4))
    np.testing.assert_array_equal(meet(bottom, pooled)[:, :4], bottom)


def test_cat_interaction_keeps_feature_order():
    bottom, pooled = jnp.zeros((1, 2)), jnp.arange(1.0, 7.0).reshape(1, 3, 2)
    np.testing.assert_array_equal(meet(bottom, pooled, "cat"), [[0, 0, 1, 2, 3, 4, 5, 6]])


@pytest.mark.golden
def test_low_rank_cross_equals_torchrec_forward_and_gradients():
    with np.load(ROOT / "tests" / "fixtures" / "torchrec_lowrank_crossnet.npz") as recorded:
        golden = dict(recorded)
    names = {
        f"{ours}_{layer}": f"{theirs}{layer}" for layer in range(3) for ours, theirs in zip("vwb", "VWb", strict=True)
    }
    params = {ours: golden[theirs] if ours[0] == "b" else golden[theirs].T for ours, theirs in names.items()}
    cross = interactions.make(InteractionConfig("cross", {"cross_layers": 3, "cross_rank": 4}))
    with jax.default_matmul_precision("highest"):
        # As if all were of one feature.
        output, vjp = jax.vjp(lambda p, x: cross.apply({"params": p}, None, x[:, None]), params, golden["x"])
        np.testing.assert_allclose(output, golden["y"], rtol=1e-5, atol=1e-6)
        d_params, d_x = vjp(cotangent_of(golden))
    np.testing.assert_allclose(d_x, golden["dx"], rtol=1e-4, atol=1e-5)
    for ours, theirs in names.items():
        expected = golden["d" + theirs] if ours[0] == "b" else golden["d" + theirs].T
        np.testing.assert_allclose(d_params[ours], expected, rtol=1e-4, atol=1e-5, err_msg=ours)


def cotangent_of(golden: dict[str, np.ndarray]) -> jax.Array:
    """The recorded gradients belong to the loss `(y ** 2).sum()` or `y.sum()`; the last layer's bias tells which."""
    last_bias_gradient = golden["db2"]
    if np.allclose(last_bias_gradient, (golden["x"] * 2 * golden["y"]).sum(axis=0), rtol=1e-4):
        return jnp.asarray(2 * golden["y"])
    assert np.allclose(last_bias_gradient, golden["x"].sum(axis=0), rtol=1e-4)
    return jnp.ones_like(golden["y"])


def drawn(model: ModelConfig) -> tuple[interactions.Interaction, dict, jax.Array | None, np.ndarray]:
    """An interaction, parameters none of which is 0, and its inputs for three examples, in float64."""
    rng = np.random.default_rng(0)
    module = interactions.make(model.interaction)
    pooled = rng.normal(size=(3, len(model.features), model.embedding_dim))
    bottom = rng.normal(size=(3, model.embedding_dim)) if model.num_dense else None
    shapes = jax.eval_shape(module.init, jax.random.key(0), bottom, pooled).get("params", {})
    return module, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes), bottom, pooled


def with_gradient(function):
    """A function of its inputs and a cotangent: what it gives, and the gradients."""

    def both(*inputs):
        found, vjp = jax.vjp(function, *inputs[:-1])
        return found, *vjp(inputs[-1])

    return both


@every_case
@pytest.mark.sample(7)
def test_output_and_gradients_are_those_of_the_plain_form_in_float64(changes, monkeypatch):
    model = dataclasses.replace(tiny_model(**changes), compute_dtype="float32")
    with jax.enable_x64(True):
        monkeypatch.setattr(jnp, "float32", jnp.float64)
        module, params, bottom, pooled = drawn(model)
        module = module.clone(dtype="float64")

        def plain(params, bottom, pooled):
            numbers = [] if bottom is None else [bottom]
            vectors = numbers + [pooled[:, i] for i in range(pooled.shape[1])]
            return oracle.interaction(model, {model.interaction.name: params}, numbers, vectors)

        def ours(params, *inputs):
            return module.apply({"params": params}, *inputs)

        shape = jax.eval_shape(plain, params, bottom, pooled).shape
        inputs = params, bottom, pooled, np.random.default_rng(1).normal(size=shape)
        (wanted, *plain_gradients), (found, *gradients) = (jax.jit(with_gradient(f))(*inputs) for f in (plain, ours))
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
        near = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
        jax.tree.map(near, gradients, plain_gradients)


_BY_DEFAULT = ("dot", "dot, no numbers", "dot, a number embedded", "parallel_cross", "projection")
WHOLE_MODELS = {name: CASES[name] for name in _BY_DEFAULT}
"""For what compiles whole programs: by default a few that are made of what the others are made of."""
MORE_MODELS = {name: CASES[name] for name in (*TABLE, *EMBEDDED, "projection, no numbers") if name not in _BY_DEFAULT}
SMALL = {"tables": (TableConfig("t", 9, 4),), "features": (FeatureConfig("f", "t", 2), FeatureConfig("g", "t"))}
whole_models = pytest.mark.parametrize(
    "changes",
    [
        *(pytest.param(fields, id=name) for name, fields in WHOLE_MODELS.items()),
        *(pytest.param(fields, id=name, marks=pytest.mark.exhaustive) for name, fields in MORE_MODELS.items()),
    ],
)


@whole_models
@pytest.mark.sample(2)
def test_a_step_on_two_devices_is_that_on_one(changes):
    case = Case(
        *(0, tiny_model(**SMALL, **changes), LossConfig(), optimizer("rowwise_adagrad", "adagrad"), 8, 2, False),
        *(MeshShape(1, 2), {"t": "row_wise"}, 0, False),
    )
    two, one = (make_trainer(each)(case, 2) for each in (case, case.on_one_device()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), two, one)
    before, after = (jax.tree.leaves(params) for params in (case.params(), one[-1]))
    assert all((a != b).any() for a, b in zip(before, after, strict=True))


@whole_models
@pytest.mark.sample(1)
def test_an_export_gives_the_logits_of_training(tmp_path, changes):
    model = tiny_model(**changes)
    version, batch = export_tiny(tmp_path, model), random_batch(model, 16)  # As large as the self check's.
    got = load(tmp_path).score(batch.dense_BxN, batch.ids_BxK).logit
    np.testing.assert_array_equal(got, jax.jit(lambda *inputs: logits(model, *inputs))(lively_state(model), batch))
    assert model_from_dict(json.loads((version.directory / "model.json").read_text())["model"]) == model


@pytest.mark.parametrize("changes", [fields for fields, _ in EMBEDDED.values()], ids=EMBEDDED)
@pytest.mark.sample(1)
def test_an_embedded_number_meets_the_features_as_its_multiple_of_a_vector(changes):
    model = tiny_model(**changes)
    state, batch = lively_state(model), random_batch(model, 8)
    params = {"dense": state.dense_params, "tables": dict(named_tables(model, state.tables))}
    found, wanted = (
        jax.jit(functools.partial(function, model))(given, batch)
        for function, given in ((logits, state), (oracle.logits, params))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    vectors_ExD = np.asarray(state.dense_params["numbers"]["vectors"])
    assert vectors_ExD.shape == (len(model.embedded), 4) and len(set(vectors_ExD.flat)) == vectors_ExD.size


@every_case
def test_it_is_planned_with_the_width_and_the_weights_that_it_has(changes):
    model = tiny_model(**changes)
    cost = estimate(model, optimizer(), make_plan(model, MeshShape(1, 2), "row_wise"), Load(64), HARDWARE["cpu"])
    params = jax.eval_shape(lambda: init_dense(model, 0))
    assert cost.memory["dense parameters"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    work = dense_work(model)
    assert work.interaction_width == params["top_mlp"]["layer_0"]["kernel"].shape[0]
    if model.num_dense:
        known = (*TABLE.values(), *EMBEDDED.values())
        assert work.interaction_width == next(width for fields, width in known if fields == changes)


@every_case
def test_settings_survive_json(changes):
    model = tiny_model(**changes)
    assert model_from_dict(json.loads(json.dumps(to_dict(model)))) == model
    assert hash(model_from_dict(to_dict(model))) == hash(model)


@pytest.mark.parametrize(
    ("flat", "name", "options"),
    [
        ({"interaction": "dot", "self_interaction": True}, "dot", {"self_interaction": True}),
        ({"interaction": "cat", "self_interaction": True}, "cat", {}),
        ({"interaction": "cross", "self_interaction": True}, "cross", {"cross_layers": 5, "cross_rank": 7}),
    ],
)
def test_files_of_before_mean_the_same(flat, name, options):
    """Options stood beside the interaction's name, whether it had them or not."""
    today = tiny_model(interaction=name, **options)
    before = to_dict(today) | {"self_interaction": False, "cross_layers": 5, "cross_rank": 7} | flat
    assert model_from_dict(json.loads(json.dumps(before))) == today
    written = to_dict(dataclasses.replace(today, interaction=interactions.complete(today.interaction)))
    identity = identity_of({"identity": {"model": before, "ids_out_of_range": "error"}})
    assert not differences(written, identity["model"]) and "ids_out_of_range" not in identity


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("sum", {}, "interaction is 'sum'; choose one of cat, cross, dot, fm"),
        ("dot", {"cross_rank": 3}, "interaction 'dot' has no option 'cross_rank'; it has self_interaction"),
        ("cross", {"cross_layers": 0}, "cross_layers is 0; it must be at least 1"),
        ("cross", {"cross_rank": "3"}, "cross_rank is '3'; it must be of type int"),
        ("full_cross", {"cross_layers": -1}, "cross_layers is -1"),
        ("parallel_cross", {"tower_mlp": []}, "tower_mlp is (); give widths of at least 1"),
        ("parallel_cross", {"cross_rank": 0}, "cross_rank is 0"),
        ("projection", {"projection_branch2": (4, 0)}, "projection_branch2 is (4, 0)"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value(name, options, words):
    with pytest.raises(ConfigError) as error:
        ModelOptions(embedding_dim=4, bottom_mlp=(4,), top_mlp=(1,), interaction=InteractionConfig(name, options))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"interaction": "projection", "projection_branch1": (6,)},
            "projection_branch1 ends in 6, no multiple of embedding_dim, 4; the last width must be one",
        ),
        (
            {"features": (FeatureConfig("f", "t"),), "tables": (TableConfig("t", 3, 4),), **NO_NUMBERS},
            "interaction 'dot' gives nothing for 1 sparse and 0 dense features; choose another --interaction",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_is_made(changes, words):
    model = tiny_model(**changes)
    for use in (dense_work, lambda model: init_dense(model, 0)):
        with pytest.raises(ConfigError) as error:
            use(model)
        assert words in str(error.value)
