"""Concatenation: the top MLP sees every number of every vector."""

import flax.linen as nn
import jax

from dlrm_jax.model.interactions.base import Interaction, register, side_by_side


@register("cat")
class Cat(Interaction):
    """(B, (F + 1) D): everything side by side."""

    @nn.compact
    def __call__(self, bottom_BxD: jax.Array | None, pooled_BxFxD: jax.Array) -> jax.Array:
        """(B, D) or None, (B, F, D) to (B, I)."""
        return side_by_side(bottom_BxD, pooled_BxFxD)
