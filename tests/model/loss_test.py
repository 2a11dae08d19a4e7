"""Tests `dlrm_jax/model/loss.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.config import LossConfig
from dlrm_jax.model.loss import binary_cross_entropy, example_losses, probability

LOGITS = jnp.array([-30.0, -2.0, 0.0, 0.3, 4.0, 30.0])
LABELS = jnp.array([1.0, 0.0, 1.0, 0.25, 1.0, 0.0])


def test_binary_cross_entropy_equals_the_formula_in_float64():
    z, t = np.asarray(LOGITS, np.float64), np.asarray(LABELS, np.float64)
    expected = t * np.logaddexp(0, -z) + (1 - t) * np.logaddexp(0, z)
    np.testing.assert_allclose(binary_cross_entropy(LOGITS, LABELS), expected, rtol=1e-6)


def test_binary_cross_entropy_is_finite_with_gradient_at_extreme_logits():
    logits = jnp.array([-1e4, 1e4])
    value, gradient = jax.value_and_grad(lambda z: binary_cross_entropy(z, jnp.array([1.0, 0.0])).sum())(logits)
    assert float(value) == pytest.approx(2e4)
    np.testing.assert_allclose(gradient, [-1, 1])


def test_weighted_loss_takes_the_weight_of_the_label():
    losses = example_losses(LossConfig("wbce", (0.5, 2.0)), LOGITS, LABELS)
    weights = np.array([2, 0.5, 2, 0.5, 2, 0.5])
    np.testing.assert_allclose(losses, weights * binary_cross_entropy(LOGITS, LABELS), rtol=1e-6)


def test_mse_is_on_probabilities():
    expected = (1 / (1 + np.exp(-np.asarray(LOGITS, np.float64))) - np.asarray(LABELS)) ** 2
    np.testing.assert_allclose(example_losses(LossConfig("mse"), LOGITS, LABELS), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["bce", "wbce", "mse"])
def test_threshold_stops_the_gradient_outside(name):
    config = LossConfig(name, threshold=0.2)
    gradient = jax.grad(lambda z: example_losses(config, z, LABELS).sum())(LOGITS)
    inside = np.abs(np.asarray(LOGITS)) < np.log(4)
    assert (np.asarray(gradient)[~inside] == 0).all()
    assert (np.asarray(gradient)[inside] != 0).all()


@pytest.mark.parametrize("name", ["bce", "wbce", "mse"])
@pytest.mark.parametrize("threshold", [0.0, 1e-12, 1e-7, 1e-4, 0.2])
def test_value_and_gradient_keep_their_digits_near_certainty(name, threshold):
    """Where p is near 1, log(1 - p), p - 1 and p (1 - p) made of p itself are rounding; beyond 1 - 6e-8 inf and NaN."""
    config = LossConfig(name, (0.5, 2.0), threshold)
    logits = np.float32([-40, -17, -12, -9, -3, -0.5, 0, 0.5, 3, 9, 12, 17, 40])
    limit = np.log((1 - threshold) / threshold) if threshold else np.inf
    z = np.clip(logits.astype(np.float64), -limit, limit)
    for label in (0.0, 1.0):
        sign = 1 - 2 * label
        wrong = 1 / (1 + np.exp(-sign * z))  # The probability of the other label.
        loss = wrong**2 if name == "mse" else np.logaddexp(0, sign * z)
        slope = sign * (2 * wrong**2 / (1 + np.exp(sign * z)) if name == "mse" else wrong)
        scale = config.class_weights[int(label)] if name == "wbce" else 1.0
        labels = jnp.full(len(logits), label)
        value = example_losses(config, logits, labels)
        gradient = jax.grad(lambda x, labels=labels: example_losses(config, x, labels).sum())(logits)
        np.testing.assert_allclose(value, scale * loss, rtol=2e-6)
        np.testing.assert_allclose(gradient, scale * np.where(np.abs(logits) < limit, slope, 0), rtol=2e-6, atol=1e-30)


def test_probability_is_clipped_only_when_asked():
    assert float(probability(jnp.array(30.0))) > 0.99
    assert float(probability(jnp.array(30.0), 0.1)) == pytest.approx(0.9)
