"""Dense layers and how they are initialised."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlrm_jax.config import BATCH_NORM, LAYER_NORM, NORM_EPSILON, PLAIN, HiddenConfig
from dlrm_jax.model.hashing import many_bits

PRODUCT, ACTIVATED, HIDDEN = "product", "activated", "hidden"
"""What the last layer of an MLP is: a product alone, with the activation, or as those before it."""
BATCH_NORM_MOMENTUM = 0.9
"""What is kept of a running average at each update; PyTorch says one minus this, 0.1."""

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


INITS: dict[str, tuple[Initializer, Callable[[int], Initializer]]] = {
    "dlrm": (_dlrm_kernel, _dlrm_bias),
    "torch": (_torch_kernel, _torch_bias),
    "flax": (nn.initializers.lecun_normal(), lambda fan_in: nn.initializers.zeros),
    # Xavier's normal distribution is the reference's; Flax's of that name is cut off at two deviations.
    "xavier": (_dlrm_kernel, lambda fan_in: nn.initializers.zeros),
}


class Training(NamedTuple):
    """Of a pass that trains, each example's number in the whole batch, and whether it counts: its weight is not 0."""

    row_B: jax.Array
    counts_B: jax.Array


class MLP(nn.Module):
    """Dense layers `layer_0 ...` of the given widths, all but the last hidden ones: product, norm, activation, dropout.

    The last one is of the kind `last`. A norm's parameters are `norm_0 ...`, those of a PReLU `activation_0 ...`; a
    product that a batch norm follows has no bias but the norm's.
    Computes in `dtype`, from float32 parameters, and returns float32. Without `training` nothing is dropped, and batch
    norms use their running averages. Dropout needs a key called "dropout"; what becomes of a number is a function of
    that key, the layer, and the example's number and the column, so that no placement and no order changes it.
    """

    widths: tuple[int, ...]
    last: str = PRODUCT
    init_name: str = "dlrm"
    dtype: str = "float32"
    hidden: HiddenConfig = PLAIN
    training: Training | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, in) to (B, widths[-1])."""
        kernel_init, bias_init = INITS[self.init_name]
        for i, width in enumerate(self.widths):
            kind = HIDDEN if i < len(self.widths) - 1 else self.last
            # A batch norm takes a bias away again, so that its gradient would be rounding, of which Adam makes steps.
            biased = kind != HIDDEN or self.hidden.norm != BATCH_NORM
            inits = {"kernel_init": kernel_init, "bias_init": bias_init(x.shape[1])}
            x = nn.Dense(width, use_bias=biased, dtype=self.dtype, **inits, name=f"layer_{i}")(x)
            if kind == HIDDEN:
                x = self._normed(x, f"norm_{i}")
            if kind != PRODUCT:
                x = self._activated(x, f"activation_{i}")
            if kind == HIDDEN and self.hidden.dropout and self.training is not None:
                x = _dropped(x, self.hidden.dropout, self.make_rng("dropout"), self.training.row_B)
        return x.astype(jnp.float32)

    def _normed(self, x_BxW: jax.Array, name: str) -> jax.Array:
        # Not the mean of squares less the square of the mean: where that is large, the difference is rounding.
        common = {"epsilon": NORM_EPSILON, "dtype": self.dtype, "use_fast_variance": False, "name": name}
        if self.hidden.norm == LAYER_NORM:
            return nn.LayerNorm(**common)(x_BxW)
        if self.hidden.norm == BATCH_NORM:
            training = self.training
            norm = nn.BatchNorm(use_running_average=training is None, momentum=BATCH_NORM_MOMENTUM, **common)
            return norm(x_BxW, mask=None if training is None else training.counts_B[:, None])
        return x_BxW

    def _activated(self, x_BxW: jax.Array, name: str) -> jax.Array:
        match self.hidden.activation:
            case "relu":
                return nn.relu(x_BxW)
            case "gelu":
                return nn.gelu(x_BxW, approximate=False)
            case "silu":
                return nn.silu(x_BxW)
            case _:
                return nn.PReLU(name=name)(x_BxW)


def _dropped(x_BxW: jax.Array, rate: float, key: jax.Array, row_B: jax.Array) -> jax.Array:
    """Each number 0 at this rate, or divided by what is left of one, example by example under a key of its own."""

    def of_example(x_W: jax.Array, row: jax.Array) -> jax.Array:
        drop = nn.Dropout(rate, deterministic=False, parent=None)
        return drop.apply({}, x_W, rng=many_bits(jax.random.fold_in(key, row)))

    return jax.vmap(of_example)(x_BxW, row_B)
