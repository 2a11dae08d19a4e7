"""RunConfig: everything that decides a training run, as a value that is saved beside its results."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

from dlrm_jax.config import (
    ACTIVATIONS,
    NO_NORM,
    PLAIN,
    DenseConfig,
    LossConfig,
    ModelConfig,
    Needs,
    OptimizerConfig,
    TableConfig,
    check_settings,
    model_from_dict,
    nested_interaction,
    require,
    setting,
    to_dict,
)
from dlrm_jax.config import from_dict as decoded
from dlrm_jax.config.learning import ALL_ROWS
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.data.read.load import DataConfig
from dlrm_jax.host.formulations import AUTO, KERNELS
from dlrm_jax.host.memory import TRY_ANYWAY_HELP
from dlrm_jax.model import interactions
from dlrm_jax.tables.compress import compressed
from dlrm_jax.tables.dtypes import DTYPES
from dlrm_jax.tables.named_rules import make_rule
from dlrm_jax.training.hidden_options import read_hidden
from dlrm_jax.training.options import ShardingOptions
from dlrm_jax.training.profiling import read_steps
from dlrm_jax.training.publish_options import PublishOptions
from dlrm_jax.training.record_options import RecordOptions
from dlrm_jax.training.table_settings import read_table_settings, require_known

TARGET_METRICS = ("auc", "log_loss", "accuracy", "normalized_entropy")
OF_OLDER_VERSIONS = ("ids_out_of_range", "cpu_kernels")
"""Keys of older versions: of ids, of which no prepared or generated data ever had one outside, and of `kernels`."""
EARLIER_SCHEDULES = "earlier_schedules"
"""Key in config.json beside a RunConfig's fields, of a run that went on with another schedule: what it had before."""
NEVER, ALWAYS = "never", "always"
KEEP, RESET = INIT_STEPS = ("keep", "reset")
TABLES_ONLY = "tables"
_SMALLER_IS_BETTER = ("log_loss", "normalized_entropy")


def _has_hidden_layers(run: Any) -> bool:
    model = run.model
    return len(model.bottom_mlp) > 1 or len(model.top_mlp) > 1 or "tower_mlp" in model.interaction.options


_HIDDEN = Needs(_has_hidden_layers, "it needs a hidden layer: a --bottom_mlp or --top_mlp of at least two widths")
_BEGUN = Needs(lambda run: bool(run.init_from), "it is for --init_from")
_OF_EACH = "for both MLPs, or bottom:...,top:... (the other then has the default)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(DenseConfig):
    """What a user says of a model; the data says how wide the numbers are, which tables there are, and their rows.

    `tables` are settings of single tables as JSON (table_settings.py), `compress_tables` a way to store large ones
    in fewer numbers (tables/compress.py). `activation`, `norm` and `dropout` are of the hidden layers of both MLPs, or
    of each (hidden_options.py).
    """

    embedding_dim: int = setting(16, "Columns of every embedding table.", at_least=1)
    tables: str = setting(
        "",
        'JSON file of settings of single tables: {"tables": {"NAME": {"dim": 8, "optimizer": "adam,b1=0.8", "rate": '
        "0.1}}}; the rate is times the run's.",
        of_file=True,
    )
    compress_tables: str = setting("", "A way to store large tables in fewer numbers, with its options behind commas.")
    table_dtype: str = setting(
        "float32",
        "What tables are stored as; in two bytes they are rounded up or down at random, right on average.",
        choices=lambda: tuple(DTYPES.all()),
    )

    activation: str = setting(
        "relu", f"After each hidden layer, and the bottom MLP's last: one of {', '.join(ACTIVATIONS)}; {_OF_EACH}."
    )
    norm: str = setting(
        NO_NORM,
        "Between a hidden layer's product and its activation: none, batch (over the examples of a batch, in use by "
        f"running averages) or layer (over the layer's outputs); {_OF_EACH}.",
        needs=_HIDDEN,
    )
    dropout: str = setting(
        "0",
        f"Share of each hidden layer's outputs, after the activation, that a step leaves out at random; {_OF_EACH}.",
        needs=_HIDDEN,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        read_hidden(self.activation, self.norm, self.dropout)  # It checks them.
        object.__setattr__(self, "interaction", interactions.complete(self.interaction))

    @functools.cached_property
    def own_tables(self) -> dict[str, dict[str, Any]]:
        """What is said of single tables: fields of TableConfig by name."""
        return read_table_settings(self.tables)

    def build(self, dataset: Dataset) -> ModelConfig:
        """The model for a dataset's columns; without numbers there is no bottom MLP."""
        require_known(self.own_tables, set(dataset.table_sizes))
        common: dict[str, Any] = {"embedding_dim": self.embedding_dim, "dtype": self.table_dtype}
        tables = tuple(
            TableConfig(name, rows, **(common | self.own_tables.get(name, {})))
            for name, rows in dataset.table_sizes.items()
        )
        dense = {field.name: getattr(self, field.name) for field in dataclasses.fields(DenseConfig)}
        num_dense = len(dataset.dense_names)
        dense["bottom_mlp"] = self.bottom_mlp if num_dense else ()
        bottom, dense["top_hidden"] = read_hidden(self.activation, self.norm, self.dropout)
        dense["bottom_hidden"] = bottom if dense["bottom_mlp"] else PLAIN
        dense["embedded_columns"] = () if self.embed_numbers else dataset.embedded_columns
        model = ModelConfig(num_dense=num_dense, tables=tables, features=dataset.features, **dense)
        return compressed(model, self.compress_tables)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run. Zero means: `num_steps` by epochs, `eval_every` and `checkpoint_every` once an epoch."""

    data: DataConfig
    model: ModelOptions
    loss: LossConfig
    optimizer: OptimizerConfig
    batch_size: int = setting(dataclasses.MISSING, "Examples per update.", at_least=1)
    num_micro_batches: int = setting(1, "Split each batch into this many parts and add their gradients.", at_least=1)
    steps_per_dispatch: int = setting(
        0,
        "Steps that the device takes in one go, up to one that evaluates or saves; equal up to rounding. 0: as many as "
        "take a millisecond by the prediction, one on a CPU.",
        at_least=0,
    )
    data_on_device: str = setting(
        AUTO,
        "Whether the rows of train and val are read once and stay on every device, where an epoch's order is applied: "
        "auto where they fit into half of the memory beside the model. Rows of --dataset=synthetic, without "
        "--id_trace, are made by each step unless always.",
        choices=(AUTO, NEVER, ALWAYS),
    )
    most_rows_updated: int = setting(
        1_000_000,
        "Rows of all tables beyond which --table_update=all is refused.",
        at_least=1,
        needs=Needs(lambda run: run.optimizer.table_update == ALL_ROWS, "it is for --table_update=all"),
    )
    num_epochs: int = setting(
        1,
        "Passes over the training rows, at most (--patience).",
        at_least=1,
        needs=Needs(lambda run: run.num_steps == 0, "--num_steps overrides it", refused=False),
    )
    num_steps: int = setting(0, "Updates; overrides --num_epochs unless 0.", at_least=0)
    eval_batch_size: int = setting(16384, "Examples per evaluation step.", at_least=1)
    eval_every: int = setting(0, "Steps between evaluations on val; 0: once an epoch.", at_least=0)
    checkpoint_every: int = setting(0, "Steps between checkpoints; 0: once an epoch. Evaluations save too.", at_least=0)
    log_every: int = setting(100, "Steps between lines in metrics.jsonl.", at_least=1)
    profile_steps: str = setting(
        "",
        "FIRST:LAST: these steps are traced by JAX's profiler into WORKDIR/profile, and where their time went is told, "
        "by part and operation.",
    )
    target_metric: str = setting("auc", "Metric on val that chooses the best checkpoint.", choices=TARGET_METRICS)
    target_value: float | None = setting(None, "Stop when the target metric reaches this.")
    fit_temperature: bool = setting(
        False,
        "Multiply the best checkpoint's logits with the one number that makes val's log loss least: ranks stay, "
        "probabilities fit (training/temperature.py).",
        needs=Needs(lambda run: run.loss.name == "bce", "it is for --loss=bce"),
    )
    patience: int = setting(0, "Stop after this many evaluations without improvement; 0: never.", at_least=0)
    shuffle: bool = setting(True, "Shuffle the training rows anew in every epoch.")
    kernels: str = setting(
        AUTO,
        "Who looks up and updates tables: XLA; pallas, on GPUs; native, C++ on one CPU, compiled at the first use "
        "(needs a compiler), faster for bags and Adagrads; auto: what is faster here. Equal up to rounding.",
        choices=KERNELS,
    )
    allow_oversubscription: bool = setting(False, TRY_ANYWAY_HELP)
    seed: int = setting(0, "Decides initial weights, order of rows, and planted data.", at_least=0)
    allow_schedule_change: bool = setting(
        False,
        "In a workdir that is used already, go on although --learning_rate, warm-up or decay differ from before: from "
        "there on they are as given now. config.json keeps what they were.",
    )
    init_from: str = setting(
        "",
        "In a fresh workdir, begin with the weights and optimizer state of the latest checkpoint of the run in this "
        "workdir, or with the weights of an exported model; tables may have grown (docs/GROWING.md).",
    )
    init_steps: str = setting(
        KEEP,
        "With --init_from: keep lets steps, schedules and what else depends on them go on, reset begins at step 0.",
        choices=INIT_STEPS,
        needs=_BEGUN,
    )
    init_only: str = setting(
        "", "With --init_from: `tables` takes embedding tables alone.", choices=("", TABLES_ONLY), needs=_BEGUN
    )
    records: RecordOptions = dataclasses.field(default_factory=RecordOptions)
    publishing: PublishOptions = dataclasses.field(default_factory=PublishOptions)
    sharding: ShardingOptions = dataclasses.field(default_factory=ShardingOptions)

    def __post_init__(self) -> None:
        check_settings(self)
        require(self.seed < 2**63, f"seed is {self.seed}; it must be below 2^63")
        require(
            self.batch_size % self.num_micro_batches == 0,
            f"batch_size {self.batch_size} does not split into {self.num_micro_batches} equal num_micro_batches",
        )
        read_steps(self.profile_steps)  # It checks them.
        make_rule(self.optimizer)  # It checks the rule's name and options.
        highest = math.inf if self.smaller_is_better else 1
        within = "0 or more" if highest > 1 else "between 0 and 1"
        require(
            self.target_value is None or 0 <= self.target_value <= highest,
            f"target_value is {self.target_value}, which {self.target_metric} cannot reach: it is {within}",
        )

    def check_model(self, model: ModelConfig) -> None:
        """ConfigError for a model whose every row these settings would move in each step, and should not."""
        if self.optimizer.table_update != ALL_ROWS:
            return
        require(not model.learned_pooling, "--table_update=all does not go with --learned_pooling; leave one out")
        rows = sum(table.num_embeddings for table in model.tables)
        num_bytes = sum(table.num_embeddings * table.embedding_dim * 4 for table in model.tables)
        require(
            rows <= self.most_rows_updated,
            f"--table_update=all moves all {rows:,} rows in each step: {num_bytes / 1e6:,.0f} MB of weights are read "
            f"and written, and the optimizer's slots; leave it out, or allow it by --most_rows_updated={rows}",
        )

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether the target metric improved; NaN never does."""
        if than is None:
            return value == value
        return value < than if self.smaller_is_better else value > than

    @property
    def smaller_is_better(self) -> bool:
        """Whether the target metric falls as a model gets better."""
        return self.target_metric in _SMALLER_IS_BETTER

    def reaches_target(self, value: float) -> bool:
        """Whether the target metric is at `target_value` or beyond."""
        return self.target_value is not None and (
            value == self.target_value or self.is_better(value, self.target_value)
        )

    def identity(self, model: ModelConfig, dataset: Dataset) -> dict[str, Any]:
        """What must be equal for a run to go on in a workdir: all that decides the weights at a given step."""
        return {
            "model": to_dict(model),
            "loss": to_dict(self.loss),
            "optimizer": to_dict(self.optimizer),
            "data": {"name": dataset.name, "fingerprint": dataset.fingerprint()},
            "batch_size": self.batch_size,
            "num_micro_batches": self.num_micro_batches,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }


def identity_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The `identity` that a checkpoint's record holds, as it would be written today."""
    identity = {key: value for key, value in record["identity"].items() if key not in OF_OLDER_VERSIONS}
    model = model_from_dict(identity["model"])
    model = dataclasses.replace(model, interaction=interactions.complete(model.interaction))
    if "optimizer" in identity:
        identity["optimizer"] = to_dict(decoded(OptimizerConfig, identity["optimizer"], "the checkpoint's optimizer"))
    return {**identity, "model": json.loads(json.dumps(to_dict(model)))}


def without_schedule(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity but for the learning rate's schedule, which weights that are there already do not depend on."""
    return identity | {"optimizer": {k: v for k, v in identity["optimizer"].items() if k != "schedule"}}


def from_dict(values: dict[str, Any]) -> RunConfig:
    """The RunConfig that `to_dict` (through JSON) wrote; ConfigError for what no run wrote."""
    values = {name: value for name, value in values.items() if name not in (EARLIER_SCHEDULES, *OF_OLDER_VERSIONS)}
    if isinstance(values.get("model"), dict):
        values["model"] = nested_interaction(values["model"])
    config: RunConfig = decoded(RunConfig, values, "the run")
    return config
