"""The nouns of a run, as frozen dataclasses. Every check that needs no data is here."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

POOLINGS = ("sum", "mean")
COMBINES = ("sum", "mul", "concat")
TABLE_DTYPES = ("float32", "bfloat16", "float16")
DENSE_INITS = ("dlrm", "torch", "flax", "xavier")
TABLE_INITS = ("dlrm", "flax")
NORMAL = "normal:"
"""What begins a `table_init` that says a standard deviation, as `normal:1e-4`."""
ACTIVATIONS = ("relu", "gelu", "silu", "prelu")
NO_NORM, BATCH_NORM, LAYER_NORM = NORMS = ("none", "batch", "layer")
NORM_EPSILON = 1e-5
"""Added to a variance before its root, as PyTorch does."""
COMPUTE_DTYPES = ("float32", "bfloat16")
XLA, NATIVE = CPU_KERNELS = ("xla", "native")
LOSSES = ("bce", "wbce", "mse")
DENSE_OPTIMIZERS = ("sgd", "momentum", "adagrad", "adam", "adamw")
SCHEDULE_COMPAT = ("none", "dlrm")
OUT_OF_RANGE_POLICIES = ("error", "hash", "drop_and_count")


class ConfigError(ValueError):
    """A setting or an input that the user can mend; commands print it as one line, without traceback."""


def how_to_install(extra: str, upgrade: bool = False) -> str:
    """The command for one of pyproject.toml's extras: the package is on no index, so it is typed in a checkout."""
    return f'pip install {"--upgrade " if upgrade else ""}".[{extra}]" in the checkout of dlrm_jax'


def require(condition: bool, message: str) -> None:
    """ConfigError with `message` unless `condition`."""
    if not condition:
        raise ConfigError(message)


def require_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """ConfigError naming the choices if `value` is none of them."""
    require(value in choices, f"{what} is {value!r}; choose one of {', '.join(choices)}")


def require_unique(what: str, names: list[str]) -> None:
    """ConfigError naming what is repeated."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    require(not repeated, f"{what} names must be unique; repeated: {', '.join(repeated)}")


def require_finite(config: Any) -> None:
    """ConfigError for a field of a dataclass that holds NaN or an infinity."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            finite = not isinstance(number, float) or math.isfinite(number)
            require(finite, f"{field.name} is {value}; it must be finite")


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """One embedding table of `num_embeddings` rows of `embedding_dim` floats of a `dtype`.

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

        require_choice(f"table {self.name!r}: dtype", self.dtype, TABLE_DTYPES)
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


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a DLRM (arXiv:1906.00091, section 2).

    `bottom_mlp` and `top_mlp` are the widths after each layer, without the input: Criteo Kaggle's
    reference "13-512-256-64-16" is `num_dense=13, bottom_mlp=(512, 256, 64, 16)`. Without numbers (`num_dense=0`) there
    is no bottom MLP: `bottom_mlp=()`.
    `bottom_hidden` and `top_hidden` say what their hidden layers are made of; the top MLP's last layer is a product
    alone, the bottom MLP's a product and the activation.
    `learned_pooling` multiplies each pooled row with a trainable weight of that row. `compute_dtype` is what MLPs and
    layers of interactions compute in; parameters, tables, dot products, logits and gradients of weights are float32.
    """

    num_dense: int
    tables: tuple[TableConfig, ...]
    features: tuple[FeatureConfig, ...]
    bottom_mlp: tuple[int, ...]
    top_mlp: tuple[int, ...]
    interaction: InteractionConfig = DOT
    learned_pooling: bool = False
    dense_init: str = "dlrm"
    table_init: str = "dlrm"
    compute_dtype: str = "float32"
    bottom_hidden: HiddenConfig = PLAIN
    top_hidden: HiddenConfig = PLAIN

    def __post_init__(self) -> None:
        require(self.num_dense >= 0, f"num_dense is {self.num_dense}; it must not be negative")
        require(len(self.features) >= 1, "a model needs at least one sparse feature")
        require(
            isinstance(self.interaction, InteractionConfig),
            f"interaction is {self.interaction!r}; it must be an InteractionConfig: a name and options",
        )
        require_choice("dense_init", self.dense_init, DENSE_INITS)
        _check_table_init(self.table_init)
        require_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
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
            needed = name == "top_mlp" or self.num_dense > 0
            require(len(widths) >= 1 or not needed, f"{name} is empty; it needs at least one layer")
            require(min(widths, default=1) >= 1, f"{name} is {widths}; every width must be at least 1")
        require(self.top_mlp[-1] == 1, f"top_mlp ends in {self.top_mlp[-1]}; the last width must be 1 (the logit)")
        if not self.num_dense:
            require(not self.bottom_mlp, f"bottom_mlp is {self.bottom_mlp} but num_dense is 0; leave bottom_mlp empty")
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
    """The inverse of dataclasses.asdict, through JSON."""
    values = nested_interaction(values)
    interaction = InteractionConfig(**values["interaction"])
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    tables = tuple(
        TableConfig(**{**table, "init_range": tuple(table.get("init_range", ()))}) for table in values["tables"]
    )
    features = tuple(
        FeatureConfig(**{**feature, "parts": tuple(Part(**part) for part in feature.get("parts", ()))})
        for feature in values["features"]
    )
    made: dict[str, Any] = {"tables": tables, "features": features, "interaction": interaction}
    for name in ("bottom_hidden", "top_hidden"):
        if name in values:
            made[name] = HiddenConfig(**values[name])
    return ModelConfig(**{**values, **lists, **made})


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """`bce` on logits, `wbce` (class weights for label 0 and 1) or `mse` on probabilities.

    `threshold` t > 0 clips probabilities to [t, 1 - t]: those that the loss, every metric and every prediction are of.
    """

    name: str = "bce"
    class_weights: tuple[float, float] = (1.0, 1.0)
    threshold: float = 0.0

    def __post_init__(self) -> None:
        require_finite(self)
        require_choice("loss", self.name, LOSSES)
        require(len(self.class_weights) == 2, f"class_weights is {self.class_weights}; give two, for label 0 and 1")
        require(min(self.class_weights) >= 0, f"class_weights is {self.class_weights}; weights are not negative")
        require(max(self.class_weights) > 0, "class_weights is 0,0; so nothing would be learned: give one above 0")
        require(0.0 <= self.threshold < 0.5, f"loss_threshold is {self.threshold}; it must lie in [0, 0.5)")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over 1-based steps: linear warm-up, plateau, polynomial decay.

    `compat="dlrm"` keeps the reference's quirks (see schedule.py).
    """

    learning_rate: float
    warmup_steps: int = 0
    decay_start_step: int = 0
    decay_steps: int = 0
    decay_power: float = 2.0
    end_learning_rate: float = 0.0
    compat: str = "none"

    def __post_init__(self) -> None:
        require_finite(self)
        require_choice("lr_compat", self.compat, SCHEDULE_COMPAT)
        require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}; it must be positive")
        for field in ("warmup_steps", "decay_start_step", "decay_steps", "decay_power", "end_learning_rate"):
            require(getattr(self, field) >= 0, f"{field} is {getattr(self, field)}; it must not be negative")
        require(
            self.decay_steps == 0 or self.decay_start_step >= self.warmup_steps,
            f"decay_start_step is {self.decay_start_step}, before the end of warm-up at {self.warmup_steps}",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """One optimizer for the dense parameters, one row-sparse optimizer for the tables, one schedule.

    `table` names a rule, with its options (tables/rules.py, which checks it); `table_l2`, `table_clip_norm`,
    `table_weight_decay` and `table_max_norm` bound its rows, 0 for not at all.
    """

    schedule: ScheduleConfig
    dense: str = "sgd"
    table: str = "sgd"
    eps: float = 1e-10
    momentum: float = 0.9
    weight_decay: float = 0.0
    table_l2: float = 0.0
    table_clip_norm: float = 0.0
    table_weight_decay: float = 0.0
    table_max_norm: float = 0.0

    def __post_init__(self) -> None:
        require_finite(self)
        require_choice("dense_optimizer", self.dense, DENSE_OPTIMIZERS)
        for name in ("table_l2", "table_clip_norm", "table_weight_decay", "table_max_norm"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative")
        require(self.eps > 0, f"eps is {self.eps}; it must be positive")
        require(0 <= self.momentum < 1, f"momentum is {self.momentum}; it must lie in [0, 1)")
        require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; it must not be negative")
        require(
            self.weight_decay == 0 or self.dense == "adamw",
            f"weight_decay is {self.weight_decay} but dense_optimizer is {self.dense!r}; only adamw decays weights",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Lines `path: ours != theirs` for every leaf in which two JSON-like values differ; a long value is cut."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        lines = []
        for key in sorted(set(ours) | set(theirs)):
            lines += differences(ours.get(key), theirs.get(key), f"{path}.{key}" if path else str(key))
        return lines
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        return [
            line for i, pair in enumerate(zip(ours, theirs, strict=True)) for line in differences(*pair, f"{path}[{i}]")
        ]
    return [] if ours == theirs else [f"{_cut(path, _LONGEST_PATH)}: {' != '.join(_told(ours, theirs))}"]


def tell(different: list[str]) -> str:
    """Some lines of `differences` for a person, names first, checksums last: they say that, not what, is different."""
    ends = [line.partition(":")[0].rpartition(".")[2] for line in different]
    order = sorted(range(len(ends)), key=lambda i: (ends[i] != "name", ends[i] == "fingerprint"))
    more = len(different) - _MOST_TOLD
    shown = "; ".join(different[i] for i in order[:_MOST_TOLD])
    return shown + (f"; and {more} more" if more > 0 else "")


_MOST_TOLD = 3
_LONGEST_VALUE, _LONGEST_PATH = 40, 50


def _told(ours: Any, theirs: Any) -> tuple[str, str]:
    """Two values that differ, each in a few words: whole, or counted, or cut around the place where they differ."""
    texts = repr(ours), repr(theirs)
    if max(map(len, texts)) <= _LONGEST_VALUE:
        return texts
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) != len(theirs):
        return f"{len(ours)} of them", f"{len(theirs)} of them"
    equal = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, equal - _LONGEST_VALUE // 4)
    ours_text, theirs_text = (("..." if start else "") + _cut(text[start:], _LONGEST_VALUE) for text in texts)
    return ours_text, theirs_text


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "..."
