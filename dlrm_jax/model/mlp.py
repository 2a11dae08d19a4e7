"""Dense layers and how they are initialised."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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
