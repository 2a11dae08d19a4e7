"""Losses on logits, and the one place where a logit becomes a probability."""

import jax
import jax.numpy as jnp

from dlrm_jax.config import LossConfig


def probability(logits_B: jax.Array, threshold: float = 0.0) -> jax.Array:
    """sigmoid(logits), clipped to [threshold, 1 - threshold] when threshold > 0 (the reference's --loss-threshold)."""
    prob_B = jax.nn.sigmoid(logits_B)
    return jnp.clip(prob_B, threshold, 1 - threshold) if threshold > 0 else prob_B


def binary_cross_entropy(logits_B: jax.Array, label_B: jax.Array) -> jax.Array:
    """-label log p - (1 - label) log(1 - p), without overflow or cancellation for any logit; labels in [0, 1]."""
    return jnp.maximum(logits_B, 0) - label_B * logits_B + jnp.log1p(jnp.exp(-jnp.abs(logits_B)))


def example_losses(config: LossConfig, logits_B: jax.Array, label_B: jax.Array) -> jax.Array:
    """Unreduced training loss of each example.

    `wbce` weighs with class_weights[int(label)], so that a fractional label counts as class 0, as in the reference.
    """
    if config.name == "mse":
        return jnp.square(probability(logits_B, config.threshold) - label_B)
    if config.threshold > 0:
        prob_B = probability(logits_B, config.threshold)
        losses_B = -label_B * jnp.log(prob_B) - (1 - label_B) * jnp.log1p(-prob_B)
    else:
        losses_B = binary_cross_entropy(logits_B, label_B)
    if config.name == "wbce":
        losses_B = jnp.asarray(config.class_weights, losses_B.dtype)[label_B.astype(jnp.int32)] * losses_B
    return losses_B
