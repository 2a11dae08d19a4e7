"""How dense and sparse features meet: dot products, concatenation, or DCNv2's low-rank cross."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def pairs(num_vectors: int, with_diagonal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the lower triangle, row-major, as interact_features in the reference's dlrm_s_pytorch.py."""
    return np.tril_indices(num_vectors, 0 if with_diagonal else -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def pairwise_dots(vectors_BxVxD: jax.Array, with_diagonal: bool) -> jax.Array:
    """(B, P) dot products of all pairs of the V vectors of each example, P = V(V-1)/2, or V(V+1)/2 with diagonal."""
    rows, columns = pairs(vectors_BxVxD.shape[1], with_diagonal)
    products_BxVxV = jnp.einsum("bid,bjd->bij", vectors_BxVxD, vectors_BxVxD)
    return products_BxVxV[:, rows, columns]


def _pairwise_dots_fwd(vectors_BxVxD: jax.Array, with_diagonal: bool) -> tuple[jax.Array, jax.Array]:
    return pairwise_dots(vectors_BxVxD, with_diagonal), vectors_BxVxD


def _pairwise_dots_bwd(with_diagonal: bool, vectors_BxVxD: jax.Array, d_pairs_BxP: jax.Array) -> tuple[jax.Array]:
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
    return (jnp.einsum("bij,bjd->bid", symmetric_BxVxV, vectors_BxVxD),)


pairwise_dots.defvjp(_pairwise_dots_fwd, _pairwise_dots_bwd)


def dot_interaction(bottom_BxD: jax.Array, pooled_BxFxD: jax.Array, with_diagonal: bool = False) -> jax.Array:
    """(B, D + P): the bottom MLP's output, then the dot products of all pairs (arXiv:1906.00091, section 2.1.3)."""
    vectors_BxVxD = jnp.concatenate([bottom_BxD[:, None], pooled_BxFxD], axis=1)
    return jnp.concatenate([bottom_BxD, pairwise_dots(vectors_BxVxD, with_diagonal)], axis=1)


def cat_interaction(bottom_BxD: jax.Array, pooled_BxFxD: jax.Array) -> jax.Array:
    """(B, (F + 1) D): everything side by side."""
    return jnp.concatenate([bottom_BxD, pooled_BxFxD.reshape(pooled_BxFxD.shape[0], -1)], axis=1)


class LowRankCross(nn.Module):
    """DCNv2's low-rank cross layers: x_{l+1} = x_0 * (W_l V_l x_l + b_l) + x_l (arXiv:2008.13535, section 3.1).

    Maps (B, I) to (B, I). Parameters per layer: `v_l` (I, rank), `w_l` (rank, I), `b_l` (I,). Products of matrices are
    computed in `dtype`, all else in float32.
    """

    layers: int
    rank: int
    dtype: str = "float32"
    matrix_init: Callable[..., jax.Array] = nn.initializers.xavier_normal()

    @nn.compact
    def __call__(self, x0_BxI: jax.Array) -> jax.Array:
        """(B, I) to (B, I)."""
        x_BxI, width = x0_BxI, x0_BxI.shape[1]
        for layer in range(self.layers):
            v_IxR = self.param(f"v_{layer}", self.matrix_init, (width, self.rank))
            w_RxI = self.param(f"w_{layer}", self.matrix_init, (self.rank, width))
            b_I = self.param(f"b_{layer}", nn.initializers.zeros, (width,))
            low_rank_BxR = x_BxI.astype(self.dtype) @ v_IxR.astype(self.dtype)
            crossed_BxI = (low_rank_BxR @ w_RxI.astype(self.dtype)).astype(jnp.float32)
            x_BxI = x0_BxI * (crossed_BxI + b_I[None]) + x_BxI
        return x_BxI
