"""The nouns of a run, as frozen dataclasses. Every check that needs no data is here."""

import dataclasses
import math
from typing import Any

INTERACTIONS = ("dot", "cat", "cross")
POOLINGS = ("sum", "mean")
DENSE_INITS = ("dlrm", "torch", "flax")
TABLE_INITS = ("dlrm", "flax")
COMPUTE_DTYPES = ("float32", "bfloat16")
XLA, NATIVE = CPU_KERNELS = ("xla", "native")
LOSSES = ("bce", "wbce", "mse")
TABLE_OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad")
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
    """One embedding table of `num_embeddings` rows of `embedding_dim` floats."""

    name: str
    num_embeddings: int
    embedding_dim: int

    def __post_init__(self) -> None:
        for field in ("num_embeddings", "embedding_dim"):
            value = getattr(self, field)
            require(value >= 1, f"table {self.name!r}: {field} is {value}; it must be at least 1")
        require(
            self.num_embeddings < 2**31,
            f"table {self.name!r}: num_embeddings is {self.num_embeddings}; ids are int32, so at most 2147483647",
        )


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """One input column of ids: a bag of at most `hotness` ids, looked up in `table` and pooled."""

    name: str
    table: str
    hotness: int = 1
    pooling: str = "sum"

    def __post_init__(self) -> None:
        require(self.hotness >= 1, f"feature {self.name!r}: hotness is {self.hotness}; it must be at least 1")
        require_choice(f"feature {self.name!r}: pooling", self.pooling, POOLINGS)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a DLRM (arXiv:1906.00091, section 2).

    `bottom_mlp` and `top_mlp` are the widths after each layer, without the input: Criteo Kaggle's
    reference "13-512-256-64-16" is `num_dense=13, bottom_mlp=(512, 256, 64, 16)`.
    `learned_pooling` multiplies each pooled row with a trainable weight of that row. `compute_dtype` is what MLPs and
    cross layers compute in; parameters, tables, the dot interaction, logits and gradients of weights are float32.
    """

    num_dense: int
    tables: tuple[TableConfig, ...]
    features: tuple[FeatureConfig, ...]
    bottom_mlp: tuple[int, ...]
    top_mlp: tuple[int, ...]
    interaction: str = "dot"
    self_interaction: bool = False
    cross_layers: int = 3
    cross_rank: int = 512
    learned_pooling: bool = False
    dense_init: str = "dlrm"
    table_init: str = "dlrm"
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        require(self.num_dense >= 1, f"num_dense is {self.num_dense}; add a constant column if there is no dense one")
        require(len(self.features) >= 1, "a model needs at least one sparse feature")
        require_choice("interaction", self.interaction, INTERACTIONS)
        require_choice("dense_init", self.dense_init, DENSE_INITS)
        require_choice("table_init", self.table_init, TABLE_INITS)
        require_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        require_unique("table", [table.name for table in self.tables])
        require_unique("feature", [feature.name for feature in self.features])
        self._check_tables()
        self._check_mlps()

    def _check_tables(self) -> None:
        names = {table.name for table in self.tables}
        for feature in self.features:
            require(
                feature.table in names,
                f"feature {feature.name!r} reads table {feature.table!r}, which is not among {sorted(names)}",
            )
        unused = sorted(names - {feature.table for feature in self.features})
        require(not unused, f"no feature reads table {', '.join(unused)}")
        for table in self.tables:
            require(
                table.embedding_dim == self.embedding_dim,
                f"table {table.name!r} has embedding_dim {table.embedding_dim}, table {self.tables[0].name!r} has "
                f"{self.embedding_dim}; the interaction needs one embedding_dim for all tables",
            )

    def _check_mlps(self) -> None:
        for name, widths in (("bottom_mlp", self.bottom_mlp), ("top_mlp", self.top_mlp)):
            require(len(widths) >= 1, f"{name} is empty; it needs at least one layer")
            require(min(widths) >= 1, f"{name} is {widths}; every width must be at least 1")
        require(self.top_mlp[-1] == 1, f"top_mlp ends in {self.top_mlp[-1]}; the last width must be 1 (the logit)")
        require(
            self.bottom_mlp[-1] == self.embedding_dim,
            f"bottom_mlp ends in {self.bottom_mlp[-1]} but embedding_dim is {self.embedding_dim}; "
            "they meet in the interaction and must be equal",
        )
        require(self.cross_layers >= 1, f"cross_layers is {self.cross_layers}; it must be at least 1")
        require(self.cross_rank >= 1, f"cross_rank is {self.cross_rank}; it must be at least 1")

    @property
    def embedding_dim(self) -> int:
        """D, common to all tables."""
        return self.tables[0].embedding_dim

    @property
    def num_slots(self) -> int:
        """K: id slots per example, the sum of the features' hotness."""
        return sum(feature.hotness for feature in self.features)

    def table(self, name: str) -> TableConfig:
        """The table called `name`."""
        return next(table for table in self.tables if table.name == name)


def model_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The inverse of dataclasses.asdict, through JSON."""
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    tables = tuple(TableConfig(**table) for table in values["tables"])
    features = tuple(FeatureConfig(**feature) for feature in values["features"])
    return ModelConfig(**{**values, **lists, "tables": tables, "features": features})


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
    """One optimizer for the dense parameters, one row-sparse optimizer for the tables, one schedule."""

    schedule: ScheduleConfig
    dense: str = "sgd"
    table: str = "sgd"
    eps: float = 1e-10
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require_finite(self)
        require_choice("dense_optimizer", self.dense, DENSE_OPTIMIZERS)
        require_choice("table_optimizer", self.table, TABLE_OPTIMIZERS)
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
