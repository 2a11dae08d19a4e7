"""Cross layers beside a tower: DCNv2's parallel structure (arXiv:2008.13535, section 3.3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlrm_jax.config import require
from dlrm_jax.model.interactions.base import option, register, side_by_side
from dlrm_jax.model.interactions.cross import LowRankCross
from dlrm_jax.model.mlp import HIDDEN, MLP


@register("parallel_cross")
class ParallelCross(LowRankCross):
    """(B, I + T): low-rank cross layers and an MLP of last width T, both from all vectors side by side (I of them).

    The tower's layers are as the top MLP's hidden ones, the last too. Parameters: `cross/...` (cross.py) and
    `tower/layer_0 ...`. With `--top_mlp=1` it is the paper's model.
    """

    tower_mlp: tuple[int, ...] = option((64, 32), "Widths of the tower's layers beside the cross layers.")

    def __post_init__(self) -> None:
        require(min(self.tower_mlp, default=0) >= 1, f"tower_mlp is {self.tower_mlp}; give widths of at least 1")
        super().__post_init__()

    @nn.compact
    def __call__(self, bottom_BxD: jax.Array | None, pooled_BxFxD: jax.Array) -> jax.Array:
        """(B, D) or None, (B, F, D) to (B, I + T)."""
        cross = LowRankCross(self.dtype, cross_layers=self.cross_layers, cross_rank=self.cross_rank, name="cross")
        tower = MLP(self.tower_mlp, HIDDEN, self.dense_init, self.dtype, self.hidden, self.training, name="tower")
        crossed_BxI = cross(bottom_BxD, pooled_BxFxD)
        return jnp.concatenate([crossed_BxI, tower(side_by_side(bottom_BxD, pooled_BxFxD))], axis=1)
