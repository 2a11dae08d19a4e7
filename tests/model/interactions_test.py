"""Tests `dlrm_jax/model/interactions.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.model import interactions
from tests.helpers import ROOT


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
def test_pairwise_dots_equal_the_plain_form_with_gradient(num_vectors, with_diagonal):
    vectors = jax.random.normal(jax.random.key(0), (3, num_vectors, 4))
    expected, plain_vjp = jax.vjp(lambda v: plain_pairs(v, with_diagonal), vectors)
    actual, our_vjp = jax.vjp(lambda v: interactions.pairwise_dots(v, with_diagonal), vectors)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    cotangent = jax.random.normal(jax.random.key(1), expected.shape)
    np.testing.assert_allclose(our_vjp(cotangent)[0], plain_vjp(cotangent)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("with_diagonal", "width"), [(False, 16 + 351), (True, 16 + 378)])
def test_dot_interaction_of_criteo_has_the_reference_width(with_diagonal, width):
    output = interactions.dot_interaction(jnp.ones((2, 16)), jnp.ones((2, 26, 16)), with_diagonal)
    assert output.shape == (2, width)


def test_dot_interaction_starts_with_the_bottom_output():
    bottom, pooled = jax.random.normal(jax.random.key(0), (2, 4)), jax.random.normal(jax.random.key(1), (2, 3, 4))
    np.testing.assert_array_equal(interactions.dot_interaction(bottom, pooled)[:, :4], bottom)


def test_cat_interaction_keeps_feature_order():
    bottom, pooled = jnp.zeros((1, 2)), jnp.arange(1.0, 7.0).reshape(1, 3, 2)
    np.testing.assert_array_equal(interactions.cat_interaction(bottom, pooled), [[0, 0, 1, 2, 3, 4, 5, 6]])


@pytest.mark.golden
def test_low_rank_cross_equals_torchrec_forward_and_gradients():
    with np.load(ROOT / "tests" / "fixtures" / "torchrec_lowrank_crossnet.npz") as recorded:
        golden = dict(recorded)
    names = {
        f"{ours}_{layer}": f"{theirs}{layer}" for layer in range(3) for ours, theirs in zip("vwb", "VWb", strict=True)
    }
    params = {ours: golden[theirs] if ours[0] == "b" else golden[theirs].T for ours, theirs in names.items()}
    cross = interactions.LowRankCross(layers=3, rank=4)
    with jax.default_matmul_precision("highest"):
        output, vjp = jax.vjp(lambda p, x: cross.apply({"params": p}, x), params, golden["x"])
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
