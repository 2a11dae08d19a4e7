"""Dot products of all pairs of vectors, DLRM's own interaction."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import setting
from dlrm_jax.model.interactions.base import Interaction, behind, register, stacked


def pairs(num_vectors: int, with_diagonal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the lower triangle, row-major, as interact_features in the reference's dlrm_s_pytorch.py."""
    return np.tril_indices(num_vectors, 0 if with_diagonal else -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def pairwise_dots(vectors_BxVxD: jax.Array, with_diagonal: bool, dtype: str = "float32") -> jax.Array:
    """(B, P) dot products of all pairs of the V vectors of each example, P = V(V-1)/2, or V(V+1)/2 with diagonal.

    Products, and those of the gradient, are of numbers of `dtype`, added up in float32.
    """
    return _pairwise_dots_fwd(vectors_BxVxD, with_diagonal, dtype)[0]


def _pairwise_dots_fwd(vectors_BxVxD: jax.Array, with_diagonal: bool, dtype: str) -> tuple[jax.Array, jax.Array]:
    vectors_BxVxD = vectors_BxVxD.astype(dtype)
    rows, columns = pairs(vectors_BxVxD.shape[1], with_diagonal)
    products_BxVxV = jnp.einsum("bid,bjd->bij", vectors_BxVxD, vectors_BxVxD, preferred_element_type=jnp.float32)
    return products_BxVxV[:, rows, columns], vectors_BxVxD


def _pairwise_dots_bwd(
    with_diagonal: bool, dtype: str, vectors_BxVxD: jax.Array, d_pairs_BxP: jax.Array
) -> tuple[jax.Array]:
    # Autodiff would scatter the triangle into zeros and multiply twice. Gathering the symmetric matrix
    # (a missing diagonal reads an appended zero column) needs no scatter and one product.
    num_vectors = vectors_BxVxD.shape[1]
    rows, columns = pairs(num_vectors, with_diagonal)
    source_VxV = np.full((num_vectors, num_vectors), len(rows))
    source_VxV[rows, columns] = source_VxV[columns, rows] = np.arange(len(rows))
    padded = jnp.pad(d_pairs_BxP, ((0, 0), (0, 1)))
    symmetric_BxVxV = padded[:, source_VxV]
    if with_diagonal:
        symmetric_BxVxV = symmetric_BxVxV * (1 + jnp.eye(num_vectors, dtype=padded.dtype))[None]
    symmetric_BxVxV = symmetric_BxVxV.astype(dtype)
    return (jnp.einsum("bij,bjd->bid", symmetric_BxVxV, vectors_BxVxD, preferred_element_type=jnp.float32),)


pairwise_dots.defvjp(_pairwise_dots_fwd, _pairwise_dots_bwd)


@register("dot")
class Dot(Interaction):
    """(B, D + P): the bottom MLP's output, then the dot products of all pairs (arXiv:1906.00091, section 2.1.3)."""

    self_interaction: bool = setting(False, "Include each vector's dot product with itself.")

    @nn.compact
    def __call__(self, bottom_BxD: jax.Array | None, pooled_BxFxD: jax.Array) -> jax.Array:
        """(B, D) or None, (B, F, D) to (B, D + P), or (B, P) without numbers."""
        vectors_BxVxD = stacked(bottom_BxD, pooled_BxFxD)
        return behind(bottom_BxD, pairwise_dots(vectors_BxVxD, self.self_interaction, self.dtype))
