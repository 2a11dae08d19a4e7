"""DCNv2's cross layers with full matrices (arXiv:2008.13535, section 3.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlrm_jax.config import require, setting
from dlrm_jax.model.interactions.base import Interaction, register, side_by_side
from dlrm_jax.model.interactions.cross import MATRIX_INIT


@register("full_cross")
class FullCross(Interaction):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, from x_0 = all vectors side by side, (B, I) with I = (F + 1) D.

    Parameters per layer: `w_l` (I, I), `b_l` (I,). Products of matrices are computed in `dtype`, all else in float32.
    """

    cross_layers: int = setting(3, "Cross layers.")

    def __post_init__(self) -> None:
        require(self.cross_layers >= 1, f"cross_layers is {self.cross_layers}; it must be at least 1")
        super().__post_init__()

    @nn.compact
    def __call__(self, bottom_BxD: jax.Array | None, pooled_BxFxD: jax.Array) -> jax.Array:
        """(B, D) or None, (B, F, D) to (B, I)."""
        x_BxI = x0_BxI = side_by_side(bottom_BxD, pooled_BxFxD)
        width = x0_BxI.shape[1]
        for layer in range(self.cross_layers):
            w_IxI = self.param(f"w_{layer}", MATRIX_INIT, (width, width))
            b_I = self.param(f"b_{layer}", nn.initializers.zeros, (width,))
            crossed_BxI = (x_BxI.astype(self.dtype) @ w_IxI.astype(self.dtype)).astype(jnp.float32)
            x_BxI = x0_BxI * (crossed_BxI + b_I[None]) + x_BxI
        return x_BxI
