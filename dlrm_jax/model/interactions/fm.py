"""The second-order term of a factorisation machine."""

import flax.linen as nn
import jax

from dlrm_jax.model.interactions.base import Interaction, behind, register, stacked


@register("fm")
class FactorisationMachine(Interaction):
    """(B, 2 D): the bottom MLP's output x_0, then the sum of x_i * x_j over all pairs i < j of the vectors.

    Kept per column, as in neural factorisation machines (arXiv:1708.05027, equation 3); the sum of its D columns is the
    second-order term of Rendle's (doi:10.1109/ICDM.2010.127), in time linear in the number of vectors.
    """

    @nn.compact
    def __call__(self, bottom_BxD: jax.Array | None, pooled_BxFxD: jax.Array) -> jax.Array:
        """(B, D) or None, (B, F, D) to (B, 2 D), or (B, D) without numbers."""
        vectors_BxVxD = stacked(bottom_BxD, pooled_BxFxD)
        pairs_BxD = 0.5 * (vectors_BxVxD.sum(axis=1) ** 2 - (vectors_BxVxD**2).sum(axis=1))
        return behind(bottom_BxD, pairs_BxD)
