"""What an exported model takes: names, sizes and rules of its inputs, as a value that is saved beside it."""

import dataclasses
import itertools
import math
from typing import Any

from dlrm_jax.config import ConfigError, require, require_choice, require_unique
from dlrm_jax.config import from_dict as decoded
from dlrm_jax.data.values.dense import LARGEST, DenseStatistics

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

    `dense_statistics` are those of data/values/dense.py by column, `bucket_edges` those of data/values/buckets.py by
    table; `kind` is how tables are stored. `spare`: rows of each table behind those of its features, which no id means
    yet: a delta may give them to new values. `longest`: bytes of the longest text of each vocabulary of texts, where
    the dataset's statistics have it.
    """

    name: str
    dense_names: tuple[str, ...]
    features: tuple[ServedFeature, ...]
    embedding_dim: int
    kind: str
    schema: dict[str, Any] | None = None
    dense_statistics: dict[str, DenseStatistics] | None = None
    bucket_edges: dict[str, tuple[float, ...]] | None = None
    spare: dict[str, int] | None = None
    longest: dict[str, int] | None = None

    @property
    def num_slots(self) -> int:
        """K: id slots of a row."""
        return sum(feature.hotness for feature in self.features)

    def stored_rows(self, feature: ServedFeature) -> int:
        """Rows of a feature's table, or ids that it may mean, with those to spare."""
        return feature.rows + (self.spare or {}).get(feature.table, 0)

    def interface(self) -> dict[str, Any]:
        """What clients rely on, and a new version must not change; vocabularies may grow."""
        bags = [[feature.name, feature.hotness] for feature in self.features]
        return {"name": self.name, "dense": list(self.dense_names), "features": bags, "schema": self.schema}


def from_dict(values: Any) -> Signature:
    """The inverse of `to_dict`, through JSON; ConfigError for what no export would write."""
    try:
        signature: Signature = decoded(Signature, values, "signature.json")
        _check("embedding_dim", signature.embedding_dim)
        for feature in signature.features:
            for name in ("hotness", "rows"):
                _check(f"feature {feature.name!r}: {name}", getattr(feature, name))
        for what, numbers in (("rows to spare", signature.spare), ("bytes of the longest text", signature.longest)):
            for table, number in (numbers or {}).items():
                require(0 <= number < 2**31, f"signature.json: {number!r:.40} {what} of {table!r}")
        require_choice("signature.json: kind", signature.kind, TABLE_TYPES)
        require_unique("signature.json: dense", list(signature.dense_names))
        require_unique("signature.json: feature", [feature.name for feature in signature.features])
        for name, statistics in (signature.dense_statistics or {}).items():
            said = values["dense_statistics"][name].keys() == vars(statistics).keys()
            require(said and _is_counted(statistics), f"signature.json: statistics of {name!r} are no counted ones")
        for name, edges in (signature.bucket_edges or {}).items():
            rising = all(below < above for below, above in itertools.pairwise((-math.inf, *edges, math.inf)))
            require(rising, f"signature.json: bucket edges of {name!r} do not rise")
    except ConfigError as error:
        raise ConfigError(f"{error}; it is not a model's: export anew") from error
    return signature


def _is_counted(own: DenseStatistics) -> bool:
    least = abs(own.least) <= LARGEST or (own.least == math.inf and not own.count)
    return own.count >= 0 and abs(own.mean) <= LARGEST and 0 <= own.squares < math.inf and least


def _check(what: str, value: int) -> None:
    require(1 <= value < 2**31, f"signature.json: {what} is {value!r:.40}")
