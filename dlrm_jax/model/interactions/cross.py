"""DCNv2's cross layers with matrices of low rank (arXiv:2008.13535, section 3.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlrm_jax.config import require, setting
from dlrm_jax.model.interactions.base import Interaction, register, side_by_side

MATRIX_INIT = nn.initializers.xavier_normal()


@register("cross")
class LowRankCross(Interaction):
    """x_{l+1} = x_0 * (W_l V_l x_l + b_l) + x_l, from x_0 = all vectors side by side, (B, I) with I = (F + 1) D.

    Parameters per layer: `v_l` (I, rank), `w_l` (rank, I), `b_l` (I,). Products of matrices are computed in `dtype`,
    all else in float32.
    """

    cross_layers: int = setting(3, "Cross layers.")
    cross_rank: int = setting(512, "Rank of the cross layers' matrices.")

    def __post_init__(self) -> None:
        for name in ("cross_layers", "cross_rank"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        super().__post_init__()

    @nn.compact
    def __call__(self, bottom_BxD: jax.Array | None, pooled_BxFxD: jax.Array) -> jax.Array:
        """(B, D) or None, (B, F, D) to (B, I)."""
        x_BxI = x0_BxI = side_by_side(bottom_BxD, pooled_BxFxD)
        width = x0_BxI.shape[1]
        for layer in range(self.cross_layers):
            v_IxR = self.param(f"v_{layer}", MATRIX_INIT, (width, self.cross_rank))
            w_RxI = self.param(f"w_{layer}", MATRIX_INIT, (self.cross_rank, width))
            b_I = self.param(f"b_{layer}", nn.initializers.zeros, (width,))
            low_rank_BxR = x_BxI.astype(self.dtype) @ v_IxR.astype(self.dtype)
            crossed_BxI = (low_rank_BxR @ w_RxI.astype(self.dtype)).astype(jnp.float32)
            x_BxI = x0_BxI * (crossed_BxI + b_I[None]) + x_BxI
        return x_BxI
