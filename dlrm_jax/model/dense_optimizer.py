"""Optimizers of the dense parameters: optax transformations without a learning rate, which the step applies."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dlrm_jax.config import OptimizerConfig


def scale_by_dlrm_adagrad(eps: float) -> optax.GradientTransformation:
    """Adagrad as PyTorch and the reference have it: s += g^2, update g / (sqrt(s) + eps), s from 0.

    optax.scale_by_rss divides by sqrt(s + eps) instead, which differs as long as s is small.
    """

    def init(params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params)

    def update(grads: Any, sums: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        sums = jax.tree.map(lambda s, g: s + g * g, sums, grads)
        return jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + eps), grads, sums), sums

    return optax.GradientTransformation(init, update)


def make_dense_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The transformation named `config.dense`; its updates still have to be multiplied by -learning_rate.

    `clip_value` bounds what it is given.
    """
    return optax.chain(optax.clip(config.clip_value), _rule(config)) if config.clip_value else _rule(config)


def regularised(config: OptimizerConfig, gradient: Any, params: Any) -> Any:
    """The gradient with `dense_l2` times each weight."""
    return jax.tree.map(lambda g, w: g + config.dense_l2 * w, gradient, params) if config.dense_l2 else gradient


def norm_factor(most: float, squares: jax.Array) -> jax.Array:
    """What gradients whose squares add up to `squares` are multiplied with, so that their norm is at most `most`.

    As torch.nn.utils.clip_grad_norm_, with its 1e-6.
    """
    return jnp.minimum(1.0, most / (jnp.sqrt(squares) + 1e-6))


def _rule(config: OptimizerConfig) -> optax.GradientTransformation:
    match config.dense:
        case "sgd":
            return optax.identity()
        case "momentum":
            return optax.trace(config.momentum)
        case "adagrad":
            return scale_by_dlrm_adagrad(config.eps)
        case "adam":
            return optax.scale_by_adam()
        case "adamw":
            return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(config.weight_decay))
        case name:
            raise ValueError(f"unknown dense optimizer {name!r}")
