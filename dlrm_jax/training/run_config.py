"""RunConfig: everything that decides a training run, as a value that is saved beside its results."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from dlrm_jax.config import (
    CPU_KERNELS,
    DOT,
    OUT_OF_RANGE_POLICIES,
    PLAIN,
    XLA,
    ConfigError,
    InteractionConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TableConfig,
    model_from_dict,
    nested_interaction,
    require_finite,
)
from dlrm_jax.data.batch import check_ids
from dlrm_jax.data.read.dataset import Dataset, Rows, Split
from dlrm_jax.data.read.load import DataConfig
from dlrm_jax.model import interactions
from dlrm_jax.tables.compress import compressed
from dlrm_jax.tables.rules import make_rule
from dlrm_jax.training.hidden_options import read_hidden
from dlrm_jax.training.options import ShardingOptions
from dlrm_jax.training.table_settings import read_table_settings

TARGET_METRICS = ("auc", "log_loss", "accuracy", "normalized_entropy")
EARLIER_SCHEDULES = "earlier_schedules"
"""Key in config.json beside a RunConfig's fields, of a run that went on with another schedule: what it had before."""
_SMALLER_IS_BETTER = ("log_loss", "normalized_entropy")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """A ModelConfig but for what the data decides: dense width, tables and features.

    `tables` are settings of single tables as JSON (table_settings.py), `compress_tables` a way to store large ones
    in fewer numbers (tables/compress.py). `activation`, `norm` and `dropout` are of the hidden layers of both MLPs, or
    of each (hidden_options.py).
    """

    embedding_dim: int
    bottom_mlp: tuple[int, ...]
    top_mlp: tuple[int, ...]
    interaction: InteractionConfig = DOT
    learned_pooling: bool = False
    dense_init: str = "dlrm"
    table_init: str = "dlrm"
    compute_dtype: str = "float32"
    tables: str = ""
    compress_tables: str = ""
    table_dtype: str = "float32"
    activation: str = "relu"
    norm: str = "none"
    dropout: str = "0"

    def __post_init__(self) -> None:
        read_hidden(self.activation, self.norm, self.dropout)  # It checks them.
        object.__setattr__(self, "interaction", interactions.complete(self.interaction))

    def build(self, dataset: Dataset) -> ModelConfig:
        """The model for a dataset's columns; without numbers there is no bottom MLP."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        dim, dtype = options.pop("embedding_dim"), options.pop("table_dtype")
        settings, way = options.pop("tables"), options.pop("compress_tables")
        num_dense = len(dataset.dense_names)
        bottom, top = read_hidden(*(options.pop(name) for name in ("activation", "norm", "dropout")))
        options["bottom_mlp"] = self.bottom_mlp if num_dense else ()
        options |= {"bottom_hidden": bottom if num_dense else PLAIN, "top_hidden": top}
        own = read_table_settings(settings, set(dataset.table_sizes)) if settings else {}
        tables = tuple(
            TableConfig(name, rows, **{"embedding_dim": dim, "dtype": dtype, **own.get(name, {})})
            for name, rows in dataset.table_sizes.items()
        )
        model = ModelConfig(num_dense=num_dense, tables=tables, features=dataset.features, **options)
        return compressed(model, way)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run. Zero means: `num_steps` by epochs, `eval_every` and `checkpoint_every` once an epoch."""

    data: DataConfig
    model: ModelOptions
    loss: LossConfig
    optimizer: OptimizerConfig
    batch_size: int
    num_micro_batches: int = 1
    steps_per_dispatch: int = 1
    num_epochs: int = 1
    num_steps: int = 0
    eval_batch_size: int = 16384
    eval_every: int = 0
    checkpoint_every: int = 0
    log_every: int = 100
    target_metric: str = "auc"
    target_value: float | None = None
    patience: int = 0
    shuffle: bool = True
    ids_out_of_range: str = "error"
    cpu_kernels: str = XLA
    allow_oversubscription: bool = False
    seed: int = 0
    allow_schedule_change: bool = False
    sharding: ShardingOptions = dataclasses.field(default_factory=ShardingOptions)

    def __post_init__(self) -> None:
        for field in (
            "batch_size",
            "num_micro_batches",
            "steps_per_dispatch",
            "num_epochs",
            "eval_batch_size",
            "log_every",
        ):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be at least 1")
        for field in ("num_steps", "eval_every", "checkpoint_every", "patience", "seed"):
            if getattr(self, field) < 0:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must not be negative")
        if self.seed >= 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be below 2^63")
        if self.batch_size % self.num_micro_batches:
            raise ConfigError(
                f"batch_size {self.batch_size} does not split into {self.num_micro_batches} equal num_micro_batches"
            )
        if self.target_metric not in TARGET_METRICS:
            raise ConfigError(f"target_metric is {self.target_metric!r}; choose one of {', '.join(TARGET_METRICS)}")
        require_finite(self)
        make_rule(self.optimizer)  # It checks the rule's name and options.
        highest = math.inf if self.target_metric in _SMALLER_IS_BETTER else 1
        if self.target_value is not None and not 0 <= self.target_value <= highest:
            within = "0 or more" if highest > 1 else "between 0 and 1"
            raise ConfigError(
                f"target_value is {self.target_value}, which {self.target_metric} cannot reach: it is {within}"
            )
        if self.cpu_kernels not in CPU_KERNELS:
            raise ConfigError(f"cpu_kernels is {self.cpu_kernels!r}; choose one of {', '.join(CPU_KERNELS)}")
        if self.ids_out_of_range not in OUT_OF_RANGE_POLICIES:
            raise ConfigError(
                f"ids_out_of_range is {self.ids_out_of_range!r}; choose one of {', '.join(OUT_OF_RANGE_POLICIES)}"
            )

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether the target metric improved; NaN never does."""
        if than is None:
            return value == value
        return value < than if self.target_metric in _SMALLER_IS_BETTER else value > than

    def reaches_target(self, value: float) -> bool:
        """Whether the target metric is at `target_value` or beyond."""
        return self.target_value is not None and (
            value == self.target_value or self.is_better(value, self.target_value)
        )

    def identity(self, model: ModelConfig, dataset: Dataset) -> dict[str, Any]:
        """What must be equal for a run to go on in a workdir: all that decides the weights at a given step."""
        return {
            "model": dataclasses.asdict(model),
            "loss": dataclasses.asdict(self.loss),
            "optimizer": dataclasses.asdict(self.optimizer),
            "data": {"name": dataset.name, "fingerprint": dataset.fingerprint()},
            "batch_size": self.batch_size,
            "num_micro_batches": self.num_micro_batches,
            "shuffle": self.shuffle,
            "ids_out_of_range": self.ids_out_of_range,
            "seed": self.seed,
        }


def identity_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The `identity` that a checkpoint's record holds, as it would be written today."""
    identity = record["identity"]
    model = model_from_dict(identity["model"])
    model = dataclasses.replace(model, interaction=interactions.complete(model.interaction))
    fields = [field for field in dataclasses.fields(OptimizerConfig) if field.default is not dataclasses.MISSING]
    optimizer = {field.name: field.default for field in fields} | identity.get("optimizer", {})
    return {**identity, "model": json.loads(json.dumps(dataclasses.asdict(model))), "optimizer": optimizer}


def without_schedule(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity but for the learning rate's schedule, which weights that are there already do not depend on."""
    return identity | {"optimizer": {k: v for k, v in identity["optimizer"].items() if k != "schedule"}}


def check_dataset(dataset: Dataset, model: ModelConfig, policy: str) -> tuple[Dataset, dict[str, dict[str, int]]]:
    """The dataset with every id inside its table, and how many were not, by split and feature (batch.check_ids)."""
    if dataset.expander is not None:  # What is in memory are one-hot ids still.
        model = dataclasses.replace(model, features=tuple(dataclasses.replace(f, hotness=1) for f in model.features))
    splits: dict[str, Rows] = {}
    counts = {}
    for name, split in dataset.splits.items():
        if not isinstance(split, Split):
            splits[name] = split  # Not in memory: its ids are checked as they are read, or made in range.
            continue
        ids_RxK, count = check_ids(model, split.ids_RxK, policy, split.row_R)
        splits[name] = dataclasses.replace(split, ids_RxK=ids_RxK)
        if count:
            counts[name] = count
    return dataclasses.replace(dataset, splits=splits), counts


def from_dict(values: dict[str, Any]) -> RunConfig:
    """The RunConfig that `dataclasses.asdict` (through JSON) came from."""
    values = {name: value for name, value in values.items() if name != EARLIER_SCHEDULES}
    model = nested_interaction(_tuples(values.pop("model")))
    model["interaction"] = InteractionConfig(**model["interaction"])
    loss = values.pop("loss")
    optimizer = values.pop("optimizer")
    data = _tuples(values.pop("data"))
    return RunConfig(
        data=DataConfig(**data),
        model=ModelOptions(**model),
        loss=LossConfig(**{**loss, "class_weights": tuple(loss["class_weights"])}),
        optimizer=OptimizerConfig(**{**optimizer, "schedule": ScheduleConfig(**optimizer["schedule"])}),
        sharding=ShardingOptions(**values.pop("sharding", {})),
        **values,
    )


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where our settings have tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
