"""The dense model: a pure function of dense features and pooled embeddings. Tables live elsewhere (tables/)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlrm_jax.config import ModelConfig, require
from dlrm_jax.model import interactions
from dlrm_jax.model.mlp import ACTIVATED, MLP, Training
from dlrm_jax.model.vectors import FeatureVectors, NumberVectors


class DLRM(nn.Module):
    """(dense_BxN, pooled) -> logits_B."""

    config: ModelConfig

    @nn.compact
    def __call__(self, dense_BxN: jax.Array, pooled: Any, training: Training | None = None) -> jax.Array:
        """(B, N) and what the tables' lookup gives (tables/exchange.py, Pooled) to (B,).

        With `training` numbers are dropped, under the key "dropout", and batch norms normalise by the examples that
        count and update their running averages, in the collection "batch_stats". ConfigError where nothing comes out of
        the interaction.
        """
        config = self.config
        pooled_BxFxD = FeatureVectors(config, name="vectors")(pooled)
        common = {"init_name": config.dense_init, "dtype": config.compute_dtype, "training": training}
        if config.embedded:
            embedded_BxExD = NumberVectors(config, name="numbers")(dense_BxN)
            pooled_BxFxD = jnp.concatenate([pooled_BxFxD, embedded_BxExD], axis=1)
        bottom_BxD = None
        if config.bottom_mlp:
            bottom = MLP(config.bottom_mlp, ACTIVATED, hidden=config.bottom_hidden, **common, name="bottom_mlp")
            bottom_BxD = bottom(dense_BxN)
        # The interaction's parameters stand under its name.
        interact = interactions.of_model(config, training)
        with jax.named_scope("interaction"):
            interaction_BxI = interact(bottom_BxD, pooled_BxFxD)
        require(
            interaction_BxI.shape[1] > 0,
            f"interaction {config.interaction.name!r} gives nothing for {pooled_BxFxD.shape[1]} sparse and "
            f"{config.num_dense} dense features; choose another --interaction",
        )
        return MLP(config.top_mlp, hidden=config.top_hidden, **common, name="top_mlp")(interaction_BxI)[:, 0]
