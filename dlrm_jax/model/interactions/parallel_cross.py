"""Cross layers beside a tower: DCNv2's parallel structure (arXiv:2008.13535, section 3.3)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlrm_jax.config import require, setting
from dlrm_jax.model.interactions.base import Interaction, register, side_by_side
from dlrm_jax.model.interactions.cross import LowRankCross
from dlrm_jax.model.interactions.full_cross import FullCross
from dlrm_jax.model.mlp import HIDDEN, MLP


def _tower_mlp() -> Any:
    return setting((64, 32), "Widths of the tower's layers beside the cross layers.")


def _require_tower(widths: tuple[int, ...]) -> None:
    require(min(widths, default=0) >= 1, f"tower_mlp is {widths}; give widths of at least 1")


def _beside_tower(
    model: Interaction, widths: tuple[int, ...], cross: Interaction, bottom_BxD: jax.Array | None, pooled: jax.Array
) -> jax.Array:
    """(B, I + T): what comes out of `cross` and of a tower of these widths, all of whose layers are hidden ones."""
    tower = MLP(widths, HIDDEN, model.dense_init, model.dtype, model.hidden, model.training, name="tower")
    return jnp.concatenate([cross(bottom_BxD, pooled), tower(side_by_side(bottom_BxD, pooled))], axis=1)


@register("parallel_cross")
class ParallelCross(LowRankCross):
    """(B, I + T): low-rank cross layers and an MLP of last width T, both from all vectors side by side (I of them).

    The tower's layers are as the top MLP's hidden ones, the last too. Parameters: `cross/...` (cross.py) and
    `tower/layer_0 ...`. With `--top_mlp=1` it is the paper's model.
    """

    tower_mlp: tuple[int, ...] = _tower_mlp()

    def __post_init__(self) -> None:
        _require_tower(self.tower_mlp)
        super().__post_init__()

    @nn.compact
    def __call__(self, bottom_BxD: jax.Array | None, pooled_BxFxD: jax.Array) -> jax.Array:
        """(B, D) or None, (B, F, D) to (B, I + T)."""
        cross = LowRankCross(self.dtype, cross_layers=self.cross_layers, cross_rank=self.cross_rank, name="cross")
        return _beside_tower(self, self.tower_mlp, cross, bottom_BxD, pooled_BxFxD)


@register("parallel_full_cross")
class ParallelFullCross(FullCross):
    """The same with cross layers of full matrices (full_cross.py), as published results have it."""

    tower_mlp: tuple[int, ...] = _tower_mlp()

    def __post_init__(self) -> None:
        _require_tower(self.tower_mlp)
        super().__post_init__()

    @nn.compact
    def __call__(self, bottom_BxD: jax.Array | None, pooled_BxFxD: jax.Array) -> jax.Array:
        """(B, D) or None, (B, F, D) to (B, I + T)."""
        cross = FullCross(self.dtype, cross_layers=self.cross_layers, name="cross")
        return _beside_tower(self, self.tower_mlp, cross, bottom_BxD, pooled_BxFxD)
