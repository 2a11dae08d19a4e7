"""The dense model: a pure function of dense features and pooled embeddings. Tables live elsewhere (tables/)."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlrm_jax.config import ModelConfig
from dlrm_jax.model.interactions import LowRankCross, cat_interaction, dot_interaction
from dlrm_jax.model.vectors import FeatureVectors

Initializer = Callable[..., jax.Array]


def _dlrm_kernel(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """N(0, sqrt(2 / (in + out))), as the reference's create_mlp."""
    return jax.random.normal(key, shape, dtype) * math.sqrt(2 / sum(shape))


def _torch_kernel(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """U(+-1/sqrt(in)), PyTorch's default for Linear (TorchRec's MLPs)."""
    limit = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def _dlrm_bias(fan_in: int) -> Initializer:
    """N(0, sqrt(1 / out)), as the reference's create_mlp."""
    del fan_in
    return lambda key, shape, dtype=jnp.float32: jax.random.normal(key, shape, dtype) / math.sqrt(shape[0])


def _torch_bias(fan_in: int) -> Initializer:
    """U(+-1/sqrt(in)), PyTorch's default for Linear."""
    limit = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


_INITS: dict[str, tuple[Initializer, Callable[[int], Initializer]]] = {
    "dlrm": (_dlrm_kernel, _dlrm_bias),
    "torch": (_torch_kernel, _torch_bias),
    "flax": (nn.initializers.lecun_normal(), lambda fan_in: nn.initializers.zeros),
}


class MLP(nn.Module):
    """Dense layers `layer_0 ...` of the given widths; ReLU after each, after the last only if `final_relu`.

    Computes in `dtype`, from float32 parameters, and returns float32.
    """

    widths: tuple[int, ...]
    final_relu: bool
    init_name: str = "dlrm"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, in) to (B, widths[-1])."""
        kernel_init, bias_init = _INITS[self.init_name]
        for i, width in enumerate(self.widths):
            inits = {"kernel_init": kernel_init, "bias_init": bias_init(x.shape[1])}
            x = nn.Dense(width, dtype=self.dtype, **inits, name=f"layer_{i}")(x)
            if self.final_relu or i < len(self.widths) - 1:
                x = nn.relu(x)
        return x.astype(jnp.float32)


class DLRM(nn.Module):
    """(dense_BxN, pooled) -> logits_B."""

    config: ModelConfig

    @nn.compact
    def __call__(self, dense_BxN: jax.Array, pooled: Any) -> jax.Array:
        """(B, N) and what the tables' lookup gives (tables/exchange.py, Pooled) to (B,)."""
        config = self.config
        pooled_BxFxD = FeatureVectors(config, name="vectors")(pooled)
        common = {"init_name": config.dense_init, "dtype": config.compute_dtype}
        bottom_BxD = MLP(config.bottom_mlp, final_relu=True, **common, name="bottom_mlp")(dense_BxN)
        with jax.named_scope("interaction"):
            if config.interaction == "dot":
                interaction_BxI = dot_interaction(bottom_BxD, pooled_BxFxD, config.self_interaction)
            else:
                interaction_BxI = cat_interaction(bottom_BxD, pooled_BxFxD)
        if config.interaction == "cross":
            cross = LowRankCross(config.cross_layers, config.cross_rank, config.compute_dtype, name="cross")
            interaction_BxI = cross(interaction_BxI)
        return MLP(config.top_mlp, final_relu=False, **common, name="top_mlp")(interaction_BxI)[:, 0]
