"""The shape of a model, as frozen dataclasses: tables, features, interaction, MLPs. Every check that needs no data."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from dlrm_jax.config.errors import require, require_choice, require_unique
from dlrm_jax.config.settings import check_settings, setting
from dlrm_jax.config.values import from_dict

POOLINGS = ("sum", "mean")
COMBINES = ("sum", "mul", "concat")
DENSE_INITS = ("dlrm", "torch", "flax", "xavier")
TABLE_INITS = ("dlrm", "flax")
NORMAL = "normal:"
"""What begins a `table_init` that says a standard deviation, as `normal:1e-4`."""
ACTIVATIONS = ("relu", "gelu", "silu", "prelu")
NO_NORM, BATCH_NORM, LAYER_NORM = NORMS = ("none", "batch", "layer")
NORM_EPSILON = 1e-5
"""Added to a variance before its root, as PyTorch does."""
COMPUTE_DTYPES = ("float32", "bfloat16")
EMPTY_SLOT = -1
"""The id of an unused slot of a bag; it contributes nothing to the pooled vector."""


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """One embedding table of `num_embeddings` rows of `embedding_dim` floats of a `dtype` (tables/dtypes.py).

    `optimizer` is its own (tables/rules.py), the run's where empty; its learning rate is the run's times `rate`.
    `init_range` are the bounds of its uniform initial weights, by the model's `table_init` where empty.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    optimizer: str = ""
    rate: float = 1.0
    init_range: tuple[float, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for field in ("num_embeddings", "embedding_dim"):
            value = getattr(self, field)
            require(value >= 1, f"table {self.name!r}: {field} is {value}; it must be at least 1")
        require(
            self.num_embeddings < 2**31,
            f"table {self.name!r}: num_embeddings is {self.num_embeddings}; ids are int32, so at most 2147483647",
        )
        require(self.rate > 0 and math.isfinite(self.rate), f"table {self.name!r}: rate is {self.rate}; give above 0")
        require(
            len(self.init_range) in (0, 2), f"table {self.name!r}: init_range is {self.init_range}; give two bounds"
        )

    @property
    def kind(self) -> tuple[Any, ...]:
        """What tables must share to be stored in one array."""
        return self.embedding_dim, self.dtype, self.optimizer, self.rate


@dataclasses.dataclass(frozen=True)
class Part:
    """A table that a feature looks up, and how an id becomes one of its rows: by `id_map` with its `number`."""

    table: str
    id_map: str = "same"
    number: int = 1


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """One input column of ids: a bag of at most `hotness` ids, looked up in `table` and pooled.

    A feature of several `parts` looks each of its ids up in several tables; the pooled vectors become one by `combine`.
    `table` then only names what the ids are ids of, and `num_ids` how many there are.
    """

    name: str
    table: str
    hotness: int = 1
    pooling: str = "sum"
    parts: tuple[Part, ...] = ()
    combine: str = "sum"
    num_ids: int = 0

    def __post_init__(self) -> None:
        require_choice(f"feature {self.name!r}: combine", self.combine, COMBINES)
        require(self.num_ids >= bool(self.parts), f"feature {self.name!r}: num_ids is {self.num_ids}; parts need it")
        require(self.hotness >= 1, f"feature {self.name!r}: hotness is {self.hotness}; it must be at least 1")
        require_choice(f"feature {self.name!r}: pooling", self.pooling, POOLINGS)


class Options(dict[str, Any]):
    """Settings by name, as a value: nobody changes them, so that they can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


@dataclasses.dataclass(frozen=True)
class InteractionConfig:
    """How features meet: an interaction's name and its options (model/interactions); what is left out has its default.

    Names and options are checked where the module is made: here nobody knows which there are.
    """

    name: str = "dot"
    options: Mapping[str, Any] = Options()

    def __post_init__(self) -> None:
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in self.options.items()}
        object.__setattr__(self, "options", Options(values))


DOT = InteractionConfig()


@dataclasses.dataclass(frozen=True)
class HiddenConfig:
    """What follows the product of a hidden layer, in this order: a `norm`, an `activation`, `dropout` at this rate."""

    activation: str = "relu"
    norm: str = NO_NORM
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)
        require_choice("norm", self.norm, NORMS)
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}; it must lie in [0, 1)")


PLAIN = HiddenConfig()
"""The reference's hidden layers: a ReLU."""


@dataclasses.dataclass(frozen=True)
class Lookup:
    """One part of one feature: what the tables see of it. `feature` is its number in the model."""

    feature: int
    part: Part
    hotness: int
    pooling: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """What of a model's shape the data does not decide: its MLPs and its interaction.

    `bottom_mlp` and `top_mlp` are the widths after each layer, without the input: Criteo Kaggle's reference
    "13-512-256-64-16" is 13 numbers and `bottom_mlp=(512, 256, 64, 16)`.
    `learned_pooling` multiplies each pooled row with a trainable weight of that row. With `embed_numbers` each number
    meets the features as a vector of its own, and `bottom_mlp` may be empty. `compute_dtype` is what MLPs and
    interactions multiply in; sums, parameters, tables, logits and gradients of weights are float32.
    """

    bottom_mlp: tuple[int, ...] = setting((64, 16), "Widths of the bottom MLP's layers, without its input.")
    top_mlp: tuple[int, ...] = setting((64, 32, 1), "Widths of the top MLP's layers, without its input.")
    interaction: InteractionConfig = setting(DOT, "How features meet (dlrm_jax/model/interactions).")  # noqa: RUF009
    embed_numbers: bool = setting(
        False,
        "Each number times a learned vector of its own meets the features, beside the bottom MLP's output; with "
        "--bottom_mlp= (no width) instead of it. Single numbers: a schema's `embed: true`.",
    )
    learned_pooling: bool = setting(False, "Multiply each looked-up row with a trainable weight of that row.")
    dense_init: str = setting(
        "dlrm",
        "Initial MLP weights: the reference's formula, PyTorch's, Flax's, or Xavier's normal with biases of 0.",
        choices=DENSE_INITS,
    )
    table_init: str = setting(
        "dlrm", "Initial rows: dlrm, U(+-sqrt(1/rows)); flax, N(0, 1/sqrt(dim)); or normal:S, N(0, S), as normal:1e-4."
    )
    compute_dtype: str = setting(
        "float32", "What MLPs and interactions multiply in; sums and weights stay float32.", choices=COMPUTE_DTYPES
    )

    def __post_init__(self) -> None:
        require(
            isinstance(self.interaction, InteractionConfig),
            f"interaction is {self.interaction!r}; it must be an InteractionConfig: a name and options",
        )
        check_settings(self)
        _check_table_init(self.table_init)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(DenseConfig):
    """Shape of a DLRM (arXiv:1906.00091, section 2). Without numbers (`num_dense=0`) `bottom_mlp` is empty.

    `bottom_hidden` and `top_hidden` say what their hidden layers are made of; the top MLP's last layer is a product
    alone, the bottom MLP's a product and the activation. `embedded_columns` are the numbers that meet the features as
    vectors of their own where not all do (`embed_numbers`).
    """

    num_dense: int
    tables: tuple[TableConfig, ...]
    features: tuple[FeatureConfig, ...]
    bottom_hidden: HiddenConfig = PLAIN
    top_hidden: HiddenConfig = PLAIN
    embedded_columns: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(self.num_dense >= 0, f"num_dense is {self.num_dense}; it must not be negative")
        require(len(self.features) >= 1, "a model needs at least one sparse feature")
        super().__post_init__()
        require_unique("table", [table.name for table in self.tables])
        require_unique("feature", [feature.name for feature in self.features])
        self._check_tables()
        self._check_mlps()

    def _check_tables(self) -> None:
        names = {table.name for table in self.tables}
        for lookup in self.lookups:
            name, table = self.features[lookup.feature].name, lookup.part.table
            require(table in names, f"feature {name!r} reads table {table!r}, which is not among {sorted(names)}")
        unused = sorted(names - {lookup.part.table for lookup in self.lookups})
        require(not unused, f"no feature reads table {', '.join(unused)}")
        for feature in self.features:
            dims = sorted({self.table(part.table).embedding_dim for part in feature.parts})
            require(
                len(dims) <= 1 or feature.combine == "concat",
                f"feature {feature.name!r}: its parts have dims {dims}; only combine=concat takes different ones",
            )

    def _check_mlps(self) -> None:
        for name, widths in (("bottom_mlp", self.bottom_mlp), ("top_mlp", self.top_mlp)):
            needed = name == "top_mlp" or len(self.embedded) < self.num_dense
            require(len(widths) >= 1 or not needed, f"{name} is empty; it needs at least one layer")
            require(min(widths, default=1) >= 1, f"{name} is {widths}; every width must be at least 1")
        require(self.top_mlp[-1] == 1, f"top_mlp ends in {self.top_mlp[-1]}; the last width must be 1 (the logit)")
        if not self.num_dense:
            require(not self.bottom_mlp, f"bottom_mlp is {self.bottom_mlp} but num_dense is 0; leave bottom_mlp empty")
            require(not self.embed_numbers, "embed_numbers is on, but the data has no numbers; leave it out")
        columns = self.embedded_columns
        require(
            list(columns) == sorted({*columns} & {*range(self.num_dense)}),
            f"embedded_columns is {columns}; they must rise, and be of {self.num_dense} numbers",
        )
        if not self.bottom_mlp:
            return
        require(
            self.bottom_mlp[-1] == self.embedding_dim,
            f"bottom_mlp ends in {self.bottom_mlp[-1]} but embedding_dim is {self.embedding_dim}; "
            "they meet in the interaction and must be equal",
        )

    @functools.cached_property
    def lookups(self) -> tuple[Lookup, ...]:
        """The parts of all features, in config order."""
        return tuple(
            Lookup(i, part, feature.hotness, feature.pooling)
            for i, feature in enumerate(self.features)
            for part in feature.parts or (Part(feature.table),)
        )

    @functools.cached_property
    def dims(self) -> tuple[int, ...]:
        """The dims of the tables, each once, in the order of the lookups that have them: those of pooled vectors."""
        return tuple(dict.fromkeys(self.table(lookup.part.table).embedding_dim for lookup in self.lookups))

    def width(self, feature: FeatureConfig) -> int:
        """Columns of a feature's vector before it is projected to D."""
        dims = [self.table(part.table).embedding_dim for part in feature.parts or (Part(feature.table),)]
        return sum(dims) if feature.combine == "concat" else dims[0]

    @functools.cached_property
    def embedding_dim(self) -> int:
        """D: the columns of every feature's vector in the interaction, the most that one has; others are projected."""
        return max(self.width(feature) for feature in self.features)

    @property
    def is_plain(self) -> bool:
        """Whether pooled vectors are the features' own: one part each, of D columns."""
        return self.dims == (self.embedding_dim,) and not any(feature.parts for feature in self.features)

    def num_ids(self, feature: FeatureConfig) -> int:
        """How many ids a feature has: 0 to this less one."""
        return feature.num_ids or self.table(feature.table).num_embeddings

    @property
    def has_batch_norm(self) -> bool:
        """Whether the batch decides what becomes of an example in training, and running averages in use."""
        return BATCH_NORM in (self.bottom_hidden.norm, self.top_hidden.norm)

    @property
    def has_dropout(self) -> bool:
        """Whether training draws random numbers."""
        return max(self.bottom_hidden.dropout, self.top_hidden.dropout) > 0

    @property
    def embedded(self) -> tuple[int, ...]:
        """The numbers that meet the features as vectors of their own."""
        return tuple(range(self.num_dense)) if self.embed_numbers else self.embedded_columns

    @property
    def num_vectors(self) -> int:
        """Vectors of an example that meet: the bottom MLP's output, the features', those of embedded numbers."""
        return bool(self.bottom_mlp) + len(self.features) + len(self.embedded)

    @property
    def num_slots(self) -> int:
        """K: id slots per example, the sum of the features' hotness."""
        return sum(feature.hotness for feature in self.features)

    def table(self, name: str) -> TableConfig:
        """The table called `name`."""
        return next(table for table in self.tables if table.name == name)


def _check_table_init(name: str) -> None:
    """ConfigError for a `table_init` that is none of the choices, nor a standard deviation."""
    if not name.startswith(NORMAL):
        require_choice("table_init", name, (*TABLE_INITS, f"{NORMAL}DEVIATION, as {NORMAL}1e-4"))
        return
    try:
        deviation = float(name.removeprefix(NORMAL))
    except ValueError:
        deviation = math.nan
    require(0 <= deviation < math.inf, f"table_init is {name!r}; give a standard deviation, as {NORMAL}1e-4")


_EARLIER_OPTIONS = {"dot": ("self_interaction",), "cross": ("cross_layers", "cross_rank")}
"""Options that once stood beside the interaction's name, by the interaction that they were for."""


def nested_interaction(values: Mapping[str, Any]) -> dict[str, Any]:
    """A model's settings as JSON has them, where files of before have the interaction's options beside its name."""
    values = {"interaction": "dot", **values}
    earlier = {name: values.pop(name) for names in _EARLIER_OPTIONS.values() for name in names if name in values}
    if isinstance(values["interaction"], str):
        name = values["interaction"]
        options = {option: earlier[option] for option in _EARLIER_OPTIONS.get(name, ()) if option in earlier}
        values["interaction"] = {"name": name, "options": options}
    return values


def model_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `to_dict`, through JSON; files of before too."""
    return from_dict(ModelConfig, nested_interaction(values), "the model")
