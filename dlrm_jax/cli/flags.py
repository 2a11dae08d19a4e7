"""The flags of a training run, and how they become a RunConfig. Only commands import this."""

import logging
import pathlib
import sys
from typing import Any

from absl import flags

from dlrm_jax.cli.flag_effects import effects, without_effect
from dlrm_jax.config import (
    ACTIVATIONS,
    COMPUTE_DTYPES,
    CPU_KERNELS,
    DENSE_INITS,
    DENSE_OPTIMIZERS,
    LOSSES,
    OUT_OF_RANGE_POLICIES,
    SCHEDULE_COMPAT,
    TABLE_DTYPES,
    XLA,
    ConfigError,
    InteractionConfig,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    require,
)
from dlrm_jax.data.generate.multi_hot import DISTRIBUTIONS, MULTI_HOT
from dlrm_jax.data.read.load import DATASETS, DataConfig
from dlrm_jax.host.memory import TRY_ANYWAY_HELP
from dlrm_jax.model import interactions
from dlrm_jax.tables import compress, rules
from dlrm_jax.tables.plan import SHARDINGS
from dlrm_jax.training.options import AUTO, EXCHANGE_DTYPES, ShardingOptions
from dlrm_jax.training.run_config import TARGET_METRICS, ModelOptions, RunConfig

FLAGS = flags.FLAGS
_LOG = logging.getLogger("dlrm_jax")

LEARNING_DEFAULTS = {
    "dense_optimizer": "adagrad",
    "table_optimizer": "rowwise_adagrad",
    "learning_rate": 0.02,
    "batch_size": 256,
    "num_epochs": 20,
    "patience": 2,
}
"""Defaults that do well on every log they were tried on (experiments/choose_defaults.py), the same for all data."""


def define_run_flags() -> None:
    """Define every flag that `config_from_flags` reads; exits in one line if an interaction's options cannot be."""
    _define_data_flags()
    _define_model_flags()
    _define_optimizer_flags()
    _define_sharding_flags()
    _define_run_flags()
    try:
        _define_interaction_flags()  # Last, so that an option cannot take the name of a flag of ours.
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _define_data_flags() -> None:
    flags.DEFINE_enum("dataset", "planted", DATASETS, "Which data to train on; planted and synthetic are generated.")
    flags.DEFINE_string(
        "data_dir", "", "A directory that dlrm_jax.prepare made, which says all by itself; or the raw log of --dataset."
    )
    flags.DEFINE_enum("split", "random", ("random", "time"), "How movielens_100k is split into train, val and test.")
    flags.DEFINE_integer("num_examples", 0, "Examples to generate for planted and synthetic; 0 for their default.")
    flags.DEFINE_integer(
        "max_rows_per_table",
        0,
        "criteo_kaggle: categorical values are taken modulo this before ids are given; synthetic: larger tables are "
        "cut to it, so that a model fits the machine at hand; 0: no.",
    )
    flags.DEFINE_integer("num_dense", 13, "synthetic: dense columns.")
    flags.DEFINE_list("table_sizes", ["1000"] * 8, "synthetic: rows of each table.")
    flags.DEFINE_list("hotness", ["1"], "synthetic: ids in each feature's bag; one number is for all features.")
    flags.DEFINE_float("id_skew", 1.05, "synthetic: the k-th most frequent id occurs in proportion to k^-skew.")
    flags.DEFINE_string(
        "id_trace",
        "",
        "synthetic: file of stack distances, as the reference's dist files, that ids follow instead of --id_skew; "
        "{} in it stands for the feature's number.",
    )
    flags.DEFINE_enum(
        "multi_hot",
        "none",
        MULTI_HOT,
        "Make bags of one-hot ids, as MLPerf does: compatible draws MLPerf's own bags and holds them in memory; "
        "virtual computes them from a hash, needs no memory.",
    )
    flags.DEFINE_list("multi_hot_sizes", [], "Ids in each feature's bag under --multi_hot.")
    flags.DEFINE_enum("multi_hot_distribution", "uniform", DISTRIBUTIONS, "How --multi_hot draws the further ids.")
    flags.DEFINE_bool("shuffle", True, "Shuffle the training rows anew in every epoch.")
    flags.DEFINE_enum(
        "ids_out_of_range",
        "error",
        OUT_OF_RANGE_POLICIES,
        "An id outside its table stops the run, is taken modulo the table's rows, or is left out; counts are reported.",
    )


def _define_model_flags() -> None:
    flags.DEFINE_integer("embedding_dim", 16, "Columns of every embedding table.")
    flags.DEFINE_list("bottom_mlp", ["64", "16"], "Widths of the bottom MLP's layers, without its input.")
    flags.DEFINE_list("top_mlp", ["64", "32", "1"], "Widths of the top MLP's layers, without its input.")
    flags.DEFINE_string(
        "tables",
        "",
        'JSON file of settings of single tables: {"tables": {"NAME": {"dim": 8, "optimizer": "adam,b1=0.8", "rate": '
        "0.1}}}; the rate is times the run's.",
    )
    flags.DEFINE_enum(
        "table_dtype",
        "float32",
        TABLE_DTYPES,
        "What tables are stored as; in two bytes they are rounded up or down at random, right on average.",
    )
    flags.DEFINE_string(
        "compress_tables",
        "",
        f"A way to store large tables in fewer numbers, with its options behind commas: {compress.help_text()}.",
    )
    flags.DEFINE_bool("learned_pooling", False, "Multiply each looked-up row with a trainable weight of that row.")
    of_each = "for both MLPs, or bottom:...,top:... (the other then has the default)"
    flags.DEFINE_string(
        "activation",
        "relu",
        f"After each hidden layer, and the bottom MLP's last: one of {', '.join(ACTIVATIONS)}; {of_each}.",
    )
    flags.DEFINE_string(
        "norm",
        "none",
        "Between a hidden layer's product and its activation: none, batch (over the examples of a batch, in use by "
        f"running averages) or layer (over the layer's outputs); {of_each}.",
    )
    flags.DEFINE_string(
        "dropout",
        "0",
        "Share of each hidden layer's outputs, after the activation, that a training step leaves out at random; "
        f"{of_each}.",
    )
    flags.DEFINE_enum(
        "dense_init",
        "dlrm",
        DENSE_INITS,
        "Initial MLP weights: the reference's formula, PyTorch's, Flax's, or Xavier's normal with biases of 0.",
    )
    flags.DEFINE_string(
        "table_init",
        "dlrm",
        "Initial rows: dlrm, U(+-sqrt(1/rows)); flax, N(0, 1/sqrt(dim)); or normal:S, N(0, S), as normal:1e-4.",
    )
    flags.DEFINE_enum(
        "compute_dtype", "float32", COMPUTE_DTYPES, "What MLPs and cross layers compute in; weights stay float32."
    )


def _define_interaction_flags() -> None:
    """--interaction, and a flag for each option; interactions whose options have one name share its flag."""
    kinds = interactions.registered()
    flags.DEFINE_enum("interaction", "dot", tuple(kinds), "How features meet (dlrm_jax/model/interactions).")
    defined: dict[str, Any] = {}
    for kind in kinds:
        for option in interactions.options_of(kind):
            name, default = option.name, option.default
            require(
                default == defined[name] if name in defined else name not in FLAGS,
                f"interaction {kind!r}: its option {name!r} has the name of another flag or another default; rename it",
            )
            if name not in defined:
                _define_option(option)
            defined[name] = default


def _define_option(option: interactions.Option) -> None:
    name, default = option.name, option.default
    text = option.help or "An option of the interaction."
    if isinstance(default, bool):
        flags.DEFINE_bool(name, default, text)
    elif isinstance(default, tuple):
        flags.DEFINE_list(name, [str(number) for number in default], text)
    elif isinstance(default, int):
        flags.DEFINE_integer(name, default, text)
    elif isinstance(default, float):
        flags.DEFINE_float(name, default, text)
    else:
        flags.DEFINE_string(name, default, text)


def _define_optimizer_flags() -> None:
    flags.DEFINE_enum("loss", "bce", LOSSES, "Training loss.")
    flags.DEFINE_list("class_weights", ["1.0", "1.0"], "Weights of label 0 and label 1 for loss=wbce.")
    flags.DEFINE_float("loss_threshold", 0.0, "Clip probabilities to [t, 1-t] in loss, metrics and predictions; 0: no.")
    flags.DEFINE_enum(
        "dense_optimizer", LEARNING_DEFAULTS["dense_optimizer"], DENSE_OPTIMIZERS, "Optimizer of the MLPs."
    )
    flags.DEFINE_string(
        "table_optimizer",
        LEARNING_DEFAULTS["table_optimizer"],
        "Row-sparse optimizer of the tables, with its options behind commas, as adam,b1=0.8. One of: "
        f"{rules.help_text()}.",
    )
    flags.DEFINE_float("table_l2", 0.0, "Add this times a touched row to its gradient.")
    flags.DEFINE_float("table_clip_norm", 0.0, "Bound the norm of a row's gradient; 0: no.")
    flags.DEFINE_float("table_weight_decay", 0.0, "Take the learning rate times this of a touched row away, as AdamW.")
    flags.DEFINE_float("table_max_norm", 0.0, "Bound the norm of a touched row after its update; 0: no.")
    flags.DEFINE_float("learning_rate", LEARNING_DEFAULTS["learning_rate"], "Learning rate after warm-up.")
    flags.DEFINE_float("adagrad_eps", 1e-10, "Added to the root of Adagrad's accumulator.")
    flags.DEFINE_float("momentum", 0.9, "Momentum of dense_optimizer=momentum.")
    flags.DEFINE_float("weight_decay", 0.0, "Weight decay of dense_optimizer=adamw.")
    flags.DEFINE_integer("warmup_steps", 0, "Steps of linear warm-up.")
    flags.DEFINE_integer("decay_start_step", 0, "Step at which the polynomial decay starts.")
    flags.DEFINE_integer("decay_steps", 0, "Steps of the polynomial decay; 0: none.")
    flags.DEFINE_float("decay_power", 2.0, "Power of the decay.")
    flags.DEFINE_float("end_learning_rate", 0.0, "Learning rate after the decay.")
    flags.DEFINE_enum("lr_compat", "none", SCHEDULE_COMPAT, "`dlrm` keeps the reference's schedule quirks.")


def _define_sharding_flags() -> None:
    flags.DEFINE_enum(
        "sharding",
        AUTO,
        (*SHARDINGS, AUTO),
        "Where tables lie on several devices: a copy each, whole tables, rows, columns, rows within groups of devices; "
        "auto plans each table by its cost (dlrm_jax.plan shows it).",
    )
    flags.DEFINE_string(
        "sharding_plan", "", "JSON file that places single tables otherwise; what dlrm_jax.plan --json writes."
    )
    flags.DEFINE_string(
        "mesh", "", "Devices, as data:2,model:4: tables are split over model, copied over data. Default: all on model."
    )
    flags.DEFINE_integer("group_size", 0, "Devices of a group of table_row_wise; 0: half of the model axis.")
    flags.DEFINE_enum("exchange_dtype", "float32", EXCHANGE_DTYPES, "How vectors travel between devices.")
    flags.DEFINE_integer(
        "exchange_capacity",
        0,
        "Rows that a device asks of each peer at once (row_wise, table_row_wise); more take further rounds. "
        "0: what the first batches need.",
    )
    flags.DEFINE_bool(
        "pipeline_exchange", False, "Exchange the next batch's ids during this batch's compute; equal results."
    )


def _define_run_flags() -> None:
    flags.DEFINE_integer("batch_size", LEARNING_DEFAULTS["batch_size"], "Examples per update.")
    flags.DEFINE_integer("num_micro_batches", 1, "Split each batch into this many parts and add their gradients.")
    flags.DEFINE_integer(
        "steps_per_dispatch", 1, "Steps that the device takes in one go, up to one that logs; equal up to rounding."
    )
    flags.DEFINE_enum(
        "cpu_kernels",
        XLA,
        CPU_KERNELS,
        "What looks up and updates the tables of a CPU: XLA, or C++ that is compiled here at the first use (needs a "
        "compiler), faster for bags; one device only. Equal up to rounding.",
    )
    flags.DEFINE_bool("allow_oversubscription", False, TRY_ANYWAY_HELP)
    flags.DEFINE_integer(
        "num_epochs", LEARNING_DEFAULTS["num_epochs"], "Passes over the training rows, at most (--patience)."
    )
    flags.DEFINE_integer("num_steps", 0, "Updates; overrides --num_epochs unless 0.")
    flags.DEFINE_integer("eval_batch_size", 16384, "Examples per evaluation step.")
    flags.DEFINE_integer("eval_every", 0, "Steps between evaluations on val; 0: once an epoch.")
    flags.DEFINE_integer("checkpoint_every", 0, "Steps between checkpoints; 0: once an epoch. Evaluations save too.")
    flags.DEFINE_integer("log_every", 100, "Steps between lines in metrics.jsonl.")
    flags.DEFINE_enum("target_metric", "auc", TARGET_METRICS, "Metric on val that chooses the best checkpoint.")
    flags.DEFINE_float("target_value", None, "Stop when the target metric reaches this.")
    flags.DEFINE_integer(
        "patience", LEARNING_DEFAULTS["patience"], "Stop after this many evaluations without improvement; 0: never."
    )
    flags.DEFINE_bool(
        "allow_schedule_change",
        False,
        "In a workdir that is used already, go on although --learning_rate, warm-up or decay differ from before: from "
        "there on they are as given now. config.json keeps what they were.",
    )
    flags.DEFINE_integer("seed", 0, "Decides initial weights, order of rows, and planted data.")
    flags.DEFINE_string(
        "workdir",
        None,
        "Where checkpoints, logs and results go; a second run there goes on. For prepared data by default runs/NAME.",
    )


def config_from_flags() -> RunConfig:
    """The RunConfig that the parsed flags describe; ConfigError for a value that cannot be, or has no effect."""
    config = unchecked_config()
    for line in without_effect(config, {name: _text(name) for name in effects() if _differs(name)}):
        _LOG.warning("%s", line)
    return config


def unchecked_config() -> RunConfig:
    """The RunConfig that the parsed flags describe, whether all of them have an effect or not."""
    return RunConfig(
        data=DataConfig(
            dataset=FLAGS.dataset,
            data_dir=FLAGS.data_dir,
            split=FLAGS.split,
            num_examples=FLAGS.num_examples,
            seed=FLAGS.seed,
            max_rows_per_table=FLAGS.max_rows_per_table,
            multi_hot_sizes=_numbers("multi_hot_sizes", int),
            table_sizes=_numbers("table_sizes", int),
            hotness=_numbers("hotness", int),
            **_values("num_dense", "id_skew", "id_trace", "multi_hot", "multi_hot_distribution"),
        ),
        model=ModelOptions(
            bottom_mlp=_numbers("bottom_mlp", int),
            top_mlp=_numbers("top_mlp", int),
            interaction=_interaction(),
            **_values("embedding_dim", "learned_pooling", "dense_init", "table_init", "compute_dtype"),
            tables=_table_settings(),
            **_values("compress_tables", "table_dtype", "activation", "norm", "dropout"),
        ),
        loss=LossConfig(FLAGS.loss, _numbers("class_weights", float), FLAGS.loss_threshold),
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(
                compat=FLAGS.lr_compat,
                **_values("learning_rate", "warmup_steps", "decay_start_step", "decay_steps"),
                **_values("decay_power", "end_learning_rate"),
            ),
            dense=FLAGS.dense_optimizer,
            table=FLAGS.table_optimizer,
            eps=FLAGS.adagrad_eps,
            **_values("momentum", "weight_decay"),
            **_values("table_l2", "table_clip_norm", "table_weight_decay", "table_max_norm"),
        ),
        **_values(
            "batch_size",
            "num_micro_batches",
            "steps_per_dispatch",
            "num_epochs",
            "num_steps",
            "eval_batch_size",
            "eval_every",
        ),
        **_values("checkpoint_every", "log_every", "target_metric", "target_value", "patience", "shuffle"),
        **_values("ids_out_of_range", "cpu_kernels", "allow_oversubscription", "seed", "allow_schedule_change"),
        sharding=sharding_from_flags(),
    )


def _interaction() -> InteractionConfig:
    options = [option.name for option in interactions.options_of(FLAGS.interaction)]
    lists = {name for name in options if isinstance(FLAGS[name].value, list)}
    values = {name: _numbers(name, int) if name in lists else FLAGS[name].value for name in options}
    return InteractionConfig(FLAGS.interaction, values)


def _table_settings() -> str:
    """What the file of --tables holds: the run keeps that, not the file's name. ConfigError where it cannot be read."""
    if not FLAGS.tables:
        return ""
    try:
        return pathlib.Path(FLAGS.tables).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"--tables={FLAGS.tables}: {reason}") from error


def defaults_taken() -> str:
    """The flags of how a run learns that were left out, with what they are then, as one would type them."""
    left_out = {name: FLAGS[name] for name in LEARNING_DEFAULTS if not FLAGS[name].present}
    if FLAGS.num_steps:  # It overrides the epochs.
        left_out.pop("num_epochs", None)
    return " ".join(flag.serialize() for flag in left_out.values())


def sharding_from_flags() -> ShardingOptions:
    """The ShardingOptions that the parsed flags describe."""
    return ShardingOptions(
        plan=FLAGS.sharding_plan,
        pipeline=FLAGS.pipeline_exchange,
        **_values("sharding", "mesh", "group_size", "exchange_dtype", "exchange_capacity"),
    )


def _values(*names: str) -> dict:
    return {name: FLAGS[name].value for name in names}


def _text(name: str) -> str:
    value = FLAGS[name].value
    return ",".join(value) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else str(value)


def _differs(name: str) -> bool:
    """Whether a flag's value is another than its default; lists by their numbers."""
    value, default = FLAGS[name].value, FLAGS[name].default
    if isinstance(value, list) and value and default:
        return _numbers(name, float) != tuple(map(float, default))
    return value != default


def _numbers(name: str, kind: type) -> tuple:
    """A list flag as numbers."""
    try:
        return tuple(kind(part) for part in FLAGS[name].value)
    except ValueError:
        raise ConfigError(f"--{name}={','.join(FLAGS[name].value)} is not a list of numbers, as 64,32,1") from None


def settings_text() -> dict[str, str]:
    """Our flags as texts, but for files that are read: where these lie may differ between machines."""
    return {
        flag.name: _text(flag.name) for flag in _ours() if flag.name not in ("data_dir", "id_trace", "sharding_plan")
    }


def _ours() -> list[flags.Flag]:
    return sorted(FLAGS.flags_by_module_dict()[__name__], key=lambda flag: flag.name)


def flagfile_text() -> str:
    """Our flags as they stand, one a line, as --flagfile reads them; ConfigError for one that no file can hold."""
    lines = [flag.serialize() for flag in _ours() if flag.value is not None]
    for line in lines:
        # absl reads a file line by line and takes the spaces around each away.
        if line != line.strip() or set(line) & set("\r\n") or line.encode("utf8", "replace").decode() != line:
            raise ConfigError(
                f"{line!r} cannot be kept in flags.txt: a line break, a space at the end, or bytes that are no UTF-8; "
                "name it otherwise"
            )
    return "".join(f"{line}\n" for line in lines)
