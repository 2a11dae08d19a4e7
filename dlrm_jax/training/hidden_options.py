"""What hidden layers are made of, as a user says it: one setting for both MLPs, or `bottom:...,top:...`."""

from dlrm_jax.config import ConfigError, HiddenConfig

BOTTOM, TOP = "bottom", "top"


def read_hidden(activation: str, norm: str, dropout: str) -> tuple[HiddenConfig, HiddenConfig]:
    """The hidden layers of the bottom and of the top MLP; ConfigError naming the setting that cannot be."""
    activations, norms = of_each_mlp("activation", activation, "relu"), of_each_mlp("norm", norm, "none")
    rates = [_rate(text, dropout) for text in of_each_mlp("dropout", dropout, "0")]
    bottom, top = (HiddenConfig(*settings) for settings in zip(activations, norms, rates, strict=True))
    return bottom, top


def of_each_mlp(name: str, text: str, default: str) -> tuple[str, str]:
    """(the bottom MLP's, the top MLP's) of a setting; an MLP that is not named has the `default`."""
    if ":" not in text:
        return text, text
    values: dict[str, str] = {}
    for part in text.split(","):
        mlp, colon, value = part.partition(":")
        if mlp not in (BOTTOM, TOP) or not colon or mlp in values:
            raise ConfigError(
                f"{name} is {text!r}: {part!r} is not bottom:VALUE or top:VALUE, each at most once; "
                f"say one value for both MLPs, or bottom:VALUE,top:VALUE"
            )
        values[mlp] = value
    return values.get(BOTTOM, default), values.get(TOP, default)


def _rate(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"dropout is {whole!r}: {text!r} is not a number, as 0.2 or bottom:0,top:0.2") from None
