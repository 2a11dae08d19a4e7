"""From pooled vectors to one vector of D columns a feature: parts combined, narrow ones projected; numbers embedded.

Where every feature has one part, and all tables have D columns, the pooled vectors are the features' and nothing is
added.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import FeatureConfig, ModelConfig
from dlrm_jax.model.mlp import INITS


class FeatureVectors(nn.Module):
    """pooled -> (B, F, D). `pooled` is what the tables' lookup gives (tables/exchange.py, Pooled).

    A feature narrower than D is multiplied with a matrix `table_<i>` (its columns, D), that of its first table, without
    bias (arXiv:1909.11810, section 3); xavier_uniform at first, as the reference's PrEmbeddingBag.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, pooled: Any) -> jax.Array:
        """(B, L, D) of L lookups, or a tuple of such arrays, one for each of the config's dims."""
        config = self.config
        if config.is_plain:
            return pooled
        of_dim = dict(zip(config.dims, pooled if isinstance(pooled, tuple) else (pooled,), strict=True))
        parts_of: list[list[jax.Array]] = [[] for _ in config.features]
        seen = dict.fromkeys(config.dims, 0)
        for lookup in config.lookups:
            dim = config.table(lookup.part.table).embedding_dim
            parts_of[lookup.feature].append(of_dim[dim][:, seen[dim]])
            seen[dim] += 1
        matrices: dict[str, jax.Array] = {}
        vectors = []
        for feature, parts in zip(config.features, parts_of, strict=True):
            vector_Bxd = _combined(feature, parts)
            shape = (vector_Bxd.shape[1], config.embedding_dim)
            if shape[0] != shape[1]:
                name = _matrix_name(config, feature)
                if name not in matrices:
                    matrices[name] = self.param(name, nn.initializers.xavier_uniform(), shape)
                vector_Bxd = vector_Bxd @ matrices[name]
            vectors.append(vector_Bxd)
        return jnp.stack(vectors, axis=1)


class NumberVectors(nn.Module):
    """(B, N) -> (B, E, D): each of E numbers times a vector of its own, a row of the parameter `vectors` (E, D).

    It is what a table with one row gives to an id of that weight (arXiv:2012.08986, section 2, "field embedding").
    Each row is drawn as the kernel of a product from one number to D.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, dense_BxN: jax.Array) -> jax.Array:
        """(B, N) to (B, E, D)."""
        of_product, embedded, dim = INITS[self.config.dense_init][0], self.config.embedded, self.config.embedding_dim

        def init(key: jax.Array) -> jax.Array:
            return jax.vmap(lambda key: of_product(key, (1, dim))[0])(jax.random.split(key, len(embedded)))

        number_BxE = dense_BxN if len(embedded) == dense_BxN.shape[1] else dense_BxN[:, np.array(embedded)]
        return number_BxE[:, :, None] * self.param("vectors", init)[None]


def _matrix_name(config: ModelConfig, feature: FeatureConfig) -> str:
    first = feature.parts[0].table if feature.parts else feature.table
    return f"table_{[table.name for table in config.tables].index(first)}"


def _combined(feature: FeatureConfig, parts: list[jax.Array]) -> jax.Array:
    if feature.combine == "concat":
        return jnp.concatenate(parts, axis=1)
    whole = parts[0]
    for part in parts[1:]:
        whole = whole * part if feature.combine == "mul" else whole + part
    return whole
