"""Tests `dlrm_jax/model/mlp.py`: hidden layers are their formulas, and dropout is a function of where a number is."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.config import ACTIVATIONS, NORMS, HiddenConfig
from dlrm_jax.model.mlp import ACTIVATED, HIDDEN, MLP, PRODUCT, Training, _dropped

ACTIVATION = {
    "relu": lambda x, _: np.maximum(x, 0),
    "gelu": lambda x, _: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2,
    "silu": lambda x, _: x / (1 + np.exp(-x)),
    "prelu": lambda x, slope: np.where(x > 0, x, slope * x),
}
ROWS = 9


def normalised(x, mean, variance, params):
    return (x - mean) / np.sqrt(variance + 1e-5) * params["scale"] + params["bias"]


def plain(hidden: HiddenConfig, last: str, variables, x, counts=None):
    """The formulas in float64, without dropout; `counts` are the rows that a batch in training is normalised by."""
    params, stats = variables["params"], variables.get("batch_stats", {})
    depth = sum(name.startswith("layer_") for name in params)
    for i in range(depth):
        kind = HIDDEN if i < depth - 1 else last
        x = x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"].get("bias", 0)
        if kind == HIDDEN and hidden.norm == "layer":
            x = normalised(x, x.mean(axis=1)[:, None], x.var(axis=1)[:, None], params[f"norm_{i}"])
        elif kind == HIDDEN and hidden.norm == "batch":
            now = stats[f"norm_{i}"]
            mean, var = (now["mean"], now["var"]) if counts is None else (x[counts].mean(axis=0), x[counts].var(axis=0))
            x = normalised(x, mean, var, params[f"norm_{i}"])
        if kind != PRODUCT:
            x = ACTIVATION[hidden.activation](x, params.get(f"activation_{i}", {}).get("negative_slope"))
    return x


def drawn(mlp: MLP):
    """(variables none of which is 0 or 1, inputs that are not centred), in float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 5)) + 1
    shapes = jax.eval_shape(mlp.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: np.abs(rng.normal(size=leaf.shape)) - 0.3 * (leaf.ndim == 2), shapes), x


@pytest.mark.parametrize("last", [PRODUCT, ACTIVATED, HIDDEN])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_layer_is_product_norm_activation(activation, norm, last):
    hidden = HiddenConfig(activation, norm, dropout=0.5)
    mlp = MLP((6, 4), last, hidden=hidden)
    variables, x = drawn(mlp)
    found = mlp.apply(variables, x)
    np.testing.assert_allclose(found, plain(hidden, last, variables, x), rtol=2e-5, atol=2e-6)
    assert ("batch_stats" in variables) == (norm == "batch")


def test_in_training_a_batch_is_normalised_by_its_examples_that_count():
    hidden, counts = HiddenConfig(norm="batch"), np.arange(ROWS) % 3 > 0
    mlp = MLP((6, 4), hidden=hidden, training=Training(jnp.arange(ROWS), counts))
    variables, x = drawn(mlp)
    x[~counts] = 1e3
    found, new = mlp.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(found[counts], plain(hidden, PRODUCT, variables, x, counts)[counts], rtol=2e-5)
    assert variables["params"]["layer_0"].keys() == {"kernel"}, "a bias there would have no gradient but rounding"
    products = (x @ variables["params"]["layer_0"]["kernel"])[counts]
    for name, now in (("mean", products.mean(axis=0)), ("var", products.var(axis=0))):
        before = variables["batch_stats"]["norm_0"][name]
        np.testing.assert_allclose(new["batch_stats"]["norm_0"][name], 0.9 * before + 0.1 * now, rtol=1e-5)


def test_variance_is_right_where_the_mean_is_large():
    mlp = MLP((1,), HIDDEN, hidden=HiddenConfig(norm="batch"), training=Training(jnp.arange(4), np.ones(4, bool)))
    norm = {"scale": np.ones(1), "bias": np.full(1, 2.0)}
    params = {"layer_0": {"kernel": np.ones((1, 1))}, "norm_0": norm}
    variables = {"params": params, "batch_stats": {"norm_0": {"mean": np.zeros(1), "var": np.ones(1)}}}
    found, _ = mlp.apply(variables, np.float32([[-1], [0], [0], [1]]) + 1e4, mutable=["batch_stats"])
    np.testing.assert_allclose(found[:, 0], [2 - 2**0.5, 2, 2, 2 + 2**0.5], atol=1e-3)


def dropped(row_B, rate=0.25, seed=0, width=400):
    """What a layer leaves of ones, (B, width)."""
    training = Training(jnp.asarray(row_B), np.ones(len(row_B), bool))
    mlp = MLP((width,), HIDDEN, hidden=HiddenConfig(dropout=rate), training=training)
    params = {"layer_0": {"kernel": np.zeros((1, width)), "bias": np.ones(width)}}
    return np.asarray(mlp.apply({"params": params}, np.ones((len(row_B), 1)), rngs={"dropout": jax.random.key(seed)}))


def test_dropout_draws_its_bits_by_hash_as_threefry_costs_as_much_as_a_product():
    drop = lambda key: _dropped(jnp.ones((3, 5)), 0.4, key, jnp.arange(3))  # noqa: E731
    text = str(jax.make_jaxpr(drop)(jax.random.key(0)))
    assert text.count("random_bits") == 1 and "key<hash>[3] = random_wrap" in text


def test_dropout_follows_from_key_layer_row_and_column():
    whole = dropped(range(8))
    assert set(np.unique(whole)) == {0, np.float32(1 / 0.75)}
    assert abs((whole == 0).mean() - 0.25) < 4 * (0.25 * 0.75 / whole.size) ** 0.5
    np.testing.assert_array_equal(dropped([5, 2]), whole[[5, 2]])
    others = [whole[1:], whole[:-1]], [whole, dropped(range(8), seed=1)]
    for a, b in others:
        agreeing = (a == b).mean()
        assert abs(agreeing - (0.75**2 + 0.25**2)) < 0.05
    training = Training(jnp.arange(8), np.ones(8, bool))
    two = MLP((400, 400), HIDDEN, hidden=HiddenConfig(dropout=0.25), training=training)
    layer = {"kernel": np.zeros((400, 400)), "bias": np.ones(400)}
    params = {"layer_0": {"kernel": np.zeros((1, 400)), "bias": np.ones(400)}, "layer_1": layer}
    second = two.apply({"params": params}, np.ones((8, 1)), rngs={"dropout": jax.random.key(0)})
    assert abs((second == whole).mean() - (0.75**2 + 0.25**2)) < 0.05
