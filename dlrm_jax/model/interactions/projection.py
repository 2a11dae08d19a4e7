"""Dot products between learned mixtures of the vectors, as TorchRec's InteractionProjectionArch."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlrm_jax.config import require, setting
from dlrm_jax.model.interactions.base import Interaction, behind, register, side_by_side
from dlrm_jax.model.mlp import ACTIVATED, MLP

_BRANCHES = {"branch1": "projection_branch1", "branch2": "projection_branch2"}
"""Module -> the option with its widths."""


@register("projection")
class Projection(Interaction):
    """(B, D + F1 F2): the bottom MLP's output, then Y Z, row by row.

    Two MLPs, of all vectors side by side, give Y (B, F1, D) and Z (B, D, F2): their last widths are F1 D and D F2.
    TorchRec's example has 2048,2048 for both. Parameters: `branch1/layer_0 ...`, `branch2/layer_0 ...`.
    """

    projection_branch1: tuple[int, ...] = setting((256, 256), "Widths of the first branch; the last is F1 times D.")
    projection_branch2: tuple[int, ...] = setting((256, 256), "Widths of the second branch; the last is D times F2.")

    def __post_init__(self) -> None:
        for name in _BRANCHES.values():
            widths = getattr(self, name)
            require(min(widths, default=0) >= 1, f"{name} is {widths}; give widths of at least 1")
        super().__post_init__()

    @nn.compact
    def __call__(self, bottom_BxD: jax.Array | None, pooled_BxFxD: jax.Array) -> jax.Array:
        """(B, D) or None, (B, F, D) to (B, D + F1 F2), or (B, F1 F2) without numbers."""
        x_BxI, dim = side_by_side(bottom_BxD, pooled_BxFxD), pooled_BxFxD.shape[2]
        branches, batch = [], x_BxI.shape[0]
        for name, option_name in _BRANCHES.items():
            widths = getattr(self, option_name)
            require(
                widths[-1] % dim == 0,
                f"{option_name} ends in {widths[-1]}, no multiple of embedding_dim, {dim}; the last width must be one",
            )
            mlp = MLP(widths, ACTIVATED, init_name=self.dense_init, dtype=self.dtype, name=name)
            branches.append(mlp(x_BxI))
        rows, columns = (branch_BxW.shape[1] // dim for branch_BxW in branches)
        y_BxPxD, z_BxDxQ = branches[0].reshape(batch, rows, dim), branches[1].reshape(batch, dim, columns)
        y_BxPxD, z_BxDxQ = (vectors.astype(self.dtype) for vectors in (y_BxPxD, z_BxDxQ))
        products_BxPxQ = jnp.einsum("bpd,bdq->bpq", y_BxPxD, z_BxDxQ, preferred_element_type=jnp.float32)
        return behind(bottom_BxD, products_BxPxQ.reshape(batch, rows * columns))
