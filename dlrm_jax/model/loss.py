"""Losses on logits, and the one place where a logit becomes a probability."""

import math

import jax
import jax.numpy as jnp

from dlrm_jax.config import LossConfig


def probability(logits_B: jax.Array, threshold: float = 0.0) -> jax.Array:
    """sigmoid(logits), clipped to [threshold, 1 - threshold] when threshold > 0 (the reference's --loss-threshold)."""
    prob_B = jax.nn.sigmoid(logits_B)
    return jnp.clip(prob_B, threshold, 1 - threshold) if threshold > 0 else prob_B


def clipped(logits_B: jax.Array, threshold: float) -> jax.Array:
    """The logits whose probabilities are clipped to [threshold, 1 - threshold]; as they are where threshold is 0."""
    if threshold <= 0:
        return logits_B
    # Of the logit, as float32 has no number between 1 - 6e-8 and 1: log(1 - p) of a probability there is rounding, or
    # infinite.
    limit = math.log((1 - threshold) / threshold)
    return jnp.clip(logits_B, -limit, limit)


def binary_cross_entropy(logits_B: jax.Array, label_B: jax.Array) -> jax.Array:
    """-label log p - (1 - label) log(1 - p), without overflow or cancellation for any logit; labels in [0, 1]."""
    # Not by maximum and abs: at a logit of exactly 0, which a fresh model gives an empty row, their slopes add up to 0
    # or -1, where the loss has 1/2 - label. And 1 - label comes first, or a small slope would be rounded beside a 1.
    positive_B = logits_B > 0
    lesser_B = jnp.exp(jnp.where(positive_B, -logits_B, logits_B))
    return (positive_B - label_B) * logits_B + jnp.log1p(lesser_B)


def squared_error(logits_B: jax.Array, label_B: jax.Array) -> jax.Array:
    """(p - label)^2 of p = sigmoid(logits), value and gradient without cancellation for any logit."""
    positive_B = logits_B > 0
    # The lesser of p and 1 - p, which float32 holds in all its digits; of a p near 1 it holds few of 1 - p.
    lesser_B = jax.nn.sigmoid(jnp.where(positive_B, -logits_B, logits_B))
    return jnp.square(jnp.where(positive_B, (1 - label_B) - lesser_B, lesser_B - label_B))


def example_losses(config: LossConfig, logits_B: jax.Array, label_B: jax.Array) -> jax.Array:
    """Unreduced training loss of each example.

    `wbce` weighs with class_weights[int(label)], so that a fractional label counts as class 0, as in the reference.
    """
    logits_B = clipped(logits_B, config.threshold)
    if config.name == "mse":
        return squared_error(logits_B, label_B)
    losses_B = binary_cross_entropy(logits_B, label_B)
    if config.name == "wbce":
        losses_B = jnp.asarray(config.class_weights, losses_B.dtype)[label_B.astype(jnp.int32)] * losses_B
    return losses_B
