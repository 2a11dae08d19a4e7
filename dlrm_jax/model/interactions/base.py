"""What an interaction is, and the registry in which everything else finds it by name."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlrm_jax.config import (
    PLAIN,
    ConfigError,
    HiddenConfig,
    InteractionConfig,
    ModelConfig,
    Setting,
    require,
    require_choice,
)
from dlrm_jax.config.settings import setting_of
from dlrm_jax.host.registry import Registry
from dlrm_jax.model.mlp import Training


class Interaction(nn.Module):
    """How the numbers of an example and its pooled embeddings meet: (bottom_BxD or None, pooled_BxFxD) -> (B, I).

    `bottom_BxD` is the bottom MLP's output, None for a model without numbers. The fields of a subclass are its options;
    each has a default, whose type is the option's: bool, int, float, str or a tuple of int. The fields here are the
    model's: what products with weights are computed in (the result is float32), how MLPs are initialised, what the top
    MLP's hidden layers are made of, which a tower's may be too, and in a pass that trains which examples these are.
    """

    dtype: str = "float32"
    dense_init: str = "dlrm"
    hidden: HiddenConfig = PLAIN
    training: Training | None = None


INTERACTIONS: Registry[type[Interaction]] = Registry(
    "interaction",
    "dlrm_jax.interactions",
    lambda kind: isinstance(kind, type) and issubclass(kind, Interaction),
    "class of Interaction",
)
register = INTERACTIONS.register
registered = INTERACTIONS.all


def options_of(name: str) -> list[Setting]:
    """The options of an interaction: its own fields, each a setting."""
    kind = registered()[name]
    common = {field.name for field in dataclasses.fields(Interaction)}
    own = [field for field in dataclasses.fields(kind) if field.name not in common]
    for field in own:
        require(
            isinstance(field.default, bool | int | float | str | tuple),
            f"interaction {name!r}: option {field.name!r} has no default that is a bool, int, float, str or tuple",
        )
    kinds = [tuple[int, ...] if isinstance(field.default, tuple) else type(field.default) for field in own]
    return [
        setting_of(field, of) or Setting(field.name, "An option of the interaction.", of, field.default)
        for field, of in zip(own, kinds, strict=True)
    ]


def make(config: InteractionConfig, **common: Any) -> Interaction:
    """The module; ConfigError for a name or an option that there is not, or a value that cannot be."""
    require_choice("interaction", config.name, tuple(registered()))
    defaults = {option.flag: option.default for option in options_of(config.name)}
    for name, value in config.options.items():
        require(
            name in defaults,
            f"interaction {config.name!r} has no option {name!r}; it has {', '.join(defaults) or 'none'}",
        )
        kind = type(defaults[name])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ConfigError(f"{name} is {value!r}; it must be of type {kind.__name__}")
    return registered()[config.name](**config.options, **common)


def of_model(model: ModelConfig, training: Training | None = None) -> Interaction:
    """The module as a part of its model."""
    common = {"dtype": model.compute_dtype, "dense_init": model.dense_init, "hidden": model.top_hidden}
    return make(model.interaction, **common, training=training, name=model.interaction.name)


def complete(config: InteractionConfig) -> InteractionConfig:
    """The same with every option said, so that equal settings are equal values; ConfigError as `make`."""
    module = make(config)
    return InteractionConfig(
        config.name, {option.flag: getattr(module, option.flag) for option in options_of(config.name)}
    )


def side_by_side(bottom_BxD: jax.Array | None, pooled_BxFxD: jax.Array) -> jax.Array:
    """(B, (F + 1) D), or (B, F D) without numbers: all vectors of an example one behind the other."""
    flat_BxI = pooled_BxFxD.reshape(pooled_BxFxD.shape[0], -1)
    return flat_BxI if bottom_BxD is None else jnp.concatenate([bottom_BxD, flat_BxI], axis=1)


def stacked(bottom_BxD: jax.Array | None, pooled_BxFxD: jax.Array) -> jax.Array:
    """(B, F + 1, D), or (B, F, D) without numbers: all vectors of an example one below the other."""
    return pooled_BxFxD if bottom_BxD is None else jnp.concatenate([bottom_BxD[:, None], pooled_BxFxD], axis=1)


def behind(bottom_BxD: jax.Array | None, features_BxI: jax.Array) -> jax.Array:
    """(B, D + I), or (B, I) without numbers: the bottom MLP's output, then what was made of it."""
    return features_BxI if bottom_BxD is None else jnp.concatenate([bottom_BxD, features_BxI], axis=1)
