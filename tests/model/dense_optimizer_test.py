"""Tests `dlrm_jax/model/dense_optimizer.py`: what bounds a gradient before the optimizer sees it."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from dlrm_jax.model.dense_optimizer import make_dense_optimizer, regularised
from tests.helpers import optimizer


def test_weights_are_added_to_the_gradient_which_is_then_bounded():
    settings = dataclasses.replace(optimizer(dense="sgd"), dense_l2=0.5, clip_value=1.2)
    weights, gradient = jnp.array([1.0, -2.0, 4.0]), jnp.array([0.5, 0.5, 0.5])
    transformation = make_dense_optimizer(settings)
    updates, _ = transformation.update(regularised(settings, gradient, weights), transformation.init(weights), weights)
    np.testing.assert_allclose(updates, [1.0, -0.5, 1.2])
