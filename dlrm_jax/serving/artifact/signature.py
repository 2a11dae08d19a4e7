"""What an exported model takes: names, sizes and rules of its inputs, as a value that is saved beside it."""

import dataclasses
from typing import Any

from dlrm_jax.config import ConfigError, require, require_choice, require_unique

TABLE_TYPES = ("float32", "bfloat16", "int8", "int4")
"""How tables are stored (quantise.py)."""

OUTPUTS = ("probability", "logit")


@dataclasses.dataclass(frozen=True)
class ServedFeature:
    """One feature's bag: at most `hotness` ids of a table of `rows` rows."""

    name: str
    table: str
    hotness: int
    pooling: str
    rows: int


@dataclasses.dataclass(frozen=True)
class Signature:
    """Inputs of a model. `schema` (schema_io.to_dict), where the data had one, says how raw values become these.

    `dense_statistics` are those of data/values/dense.py by column; `kind` is how tables are stored.
    """

    name: str
    dense_names: tuple[str, ...]
    features: tuple[ServedFeature, ...]
    embedding_dim: int
    kind: str
    schema: dict[str, Any] | None = None
    dense_statistics: dict[str, dict[str, Any]] | None = None

    @property
    def num_slots(self) -> int:
        """K: id slots of a row."""
        return sum(feature.hotness for feature in self.features)

    def interface(self) -> dict[str, Any]:
        """What clients rely on, and a new version must not change; vocabularies may grow."""
        bags = [[feature.name, feature.hotness] for feature in self.features]
        return {"name": self.name, "dense": list(self.dense_names), "features": bags, "schema": self.schema}

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


def from_dict(values: Any) -> Signature:
    """The inverse of `to_dict`, through JSON; ConfigError for what no export would write."""
    try:
        features = tuple(ServedFeature(**feature) for feature in values["features"])
        signature = Signature(**{**values, "features": features, "dense_names": tuple(values["dense_names"])})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"signature.json is not a model's: {error}; export anew") from error
    _check("embedding_dim", signature.embedding_dim, 1, 2**31)
    for feature in features:
        for name, most in (("hotness", 2**31), ("rows", 2**31)):
            _check(f"feature {feature.name!r}: {name}", getattr(feature, name), 1, most)
    texts = [signature.name, signature.kind, *signature.dense_names]
    texts += [text for feature in features for text in (feature.name, feature.table, feature.pooling)]
    for text in texts:
        require(isinstance(text, str), f"signature.json is not a model's: {text!r} is no name; export anew")
    for field in ("schema", "dense_statistics"):
        fits = getattr(signature, field) is None or isinstance(getattr(signature, field), dict)
        require(fits, f"signature.json is not a model's: {field} has no names; export anew")
    require_choice("signature.json: kind", signature.kind, TABLE_TYPES)
    require_unique("signature.json: dense", list(signature.dense_names))
    require_unique("signature.json: feature", [feature.name for feature in features])
    return signature


def _check(what: str, value: Any, least: int, most: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and least <= value < most
    require(whole, f"signature.json is not a model's: {what} is {value!r:.40}; export anew")
