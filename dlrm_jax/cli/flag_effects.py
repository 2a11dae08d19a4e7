"""Which flag of a run has an effect under which settings: the one table, and what is said of a flag that has none.

A flag counts as given where its value is not its default: `--flagfile=WORKDIR/flags.txt` names all of them.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dlrm_jax.config import ConfigError
from dlrm_jax.data.read.prepared import is_prepared
from dlrm_jax.model import interactions
from dlrm_jax.tables.rules import Adagrad, RowwiseAdagrad, rule_type
from dlrm_jax.training.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Effect:
    """When a flag has an effect; `words` say what it needs. Said, not refused, is what is put over a file of flags."""

    when: Callable[[RunConfig], bool]
    words: str
    refused: bool = True


def _generated(*names: str) -> Callable[[RunConfig], bool]:
    return lambda run: run.data.dataset in names and not run.data.data_dir


_ALWAYS = Effect(lambda run: True, "")
_SYNTHETIC = Effect(_generated("synthetic"), "it is for --dataset=synthetic")
_DECAY = Effect(lambda run: run.optimizer.schedule.decay_steps > 0, "it needs --decay_steps, over which to decay")
_DECAY_OF_OURS = Effect(
    lambda run: run.optimizer.schedule.decay_steps > 0 and run.optimizer.schedule.compat == "none",
    "it needs --decay_steps, over which to decay, and --lr_compat=dlrm has its own",
)
_PLACEMENT = _ALWAYS
"""Devices decide, which are not known here: placement.py says what has no effect on those there are."""


def _adagrad(run: RunConfig) -> bool:
    return run.optimizer.dense == "adagrad" or rule_type(run.optimizer.table) in (Adagrad, RowwiseAdagrad)


def _hidden_layers(run: RunConfig) -> bool:
    model = run.model
    return len(model.bottom_mlp) > 1 or len(model.top_mlp) > 1 or "tower_mlp" in model.interaction.options


_HIDDEN = Effect(_hidden_layers, "it needs a hidden layer: a --bottom_mlp or --top_mlp of at least two widths")


EFFECTS: dict[str, Effect] = {
    "dataset": _ALWAYS,
    "data_dir": _ALWAYS,
    "split": Effect(
        lambda run: run.data.dataset == "movielens_100k",
        "it is for the raw log of --dataset=movielens_100k; for one's own log say it when preparing",
    ),
    "num_examples": Effect(
        _generated("planted", "synthetic"), "only --dataset=planted and --dataset=synthetic are generated"
    ),
    "max_rows_per_table": Effect(
        lambda run: run.data.dataset == "criteo_kaggle" or _generated("synthetic")(run),
        "it is for --dataset=synthetic and the raw log of --dataset=criteo_kaggle; else say it when preparing",
    ),
    "num_dense": _SYNTHETIC,
    "table_sizes": _SYNTHETIC,
    "hotness": _SYNTHETIC,
    "id_skew": _SYNTHETIC,
    "id_trace": _SYNTHETIC,
    "multi_hot": _ALWAYS,
    "multi_hot_sizes": Effect(lambda run: run.data.multi_hot != "none", "it needs --multi_hot"),
    "multi_hot_distribution": Effect(lambda run: run.data.multi_hot != "none", "it needs --multi_hot"),
    "shuffle": _ALWAYS,
    "ids_out_of_range": Effect(
        lambda run: run.data.dataset != "synthetic" and not is_prepared(pathlib.Path(run.data.data_dir)),
        "synthetic and prepared ids lie inside their tables, and one that does not stops the run",
        refused=False,
    ),
    "embedding_dim": _ALWAYS,
    "bottom_mlp": _ALWAYS,
    "top_mlp": _ALWAYS,
    "interaction": _ALWAYS,
    "learned_pooling": _ALWAYS,
    "tables": _ALWAYS,
    "compress_tables": _ALWAYS,
    "table_dtype": _ALWAYS,
    "activation": _ALWAYS,
    "norm": _HIDDEN,
    "dropout": _HIDDEN,
    "dense_init": _ALWAYS,
    "table_init": _ALWAYS,
    "compute_dtype": _ALWAYS,
    "loss": _ALWAYS,
    "class_weights": Effect(lambda run: run.loss.name == "wbce", "it is for --loss=wbce"),
    "loss_threshold": _ALWAYS,
    "dense_optimizer": _ALWAYS,
    "table_optimizer": _ALWAYS,
    "table_l2": _ALWAYS,
    "table_clip_norm": _ALWAYS,
    "table_weight_decay": _ALWAYS,
    "table_max_norm": _ALWAYS,
    "learning_rate": _ALWAYS,
    "adagrad_eps": Effect(_adagrad, "it is for --dense_optimizer or --table_optimizer adagrad"),
    "momentum": Effect(lambda run: run.optimizer.dense == "momentum", "it is for --dense_optimizer=momentum"),
    "weight_decay": Effect(lambda run: run.optimizer.dense == "adamw", "it is for --dense_optimizer=adamw"),
    "warmup_steps": _ALWAYS,
    "decay_start_step": _DECAY,
    "decay_steps": _ALWAYS,
    "decay_power": _DECAY_OF_OURS,
    "end_learning_rate": _DECAY_OF_OURS,
    "lr_compat": _DECAY,
    "sharding": _PLACEMENT,
    "sharding_plan": _PLACEMENT,
    "mesh": _PLACEMENT,
    "group_size": _PLACEMENT,
    "exchange_dtype": _PLACEMENT,
    "exchange_capacity": _PLACEMENT,
    "pipeline_exchange": _PLACEMENT,
    "batch_size": _ALWAYS,
    "num_micro_batches": _ALWAYS,
    "steps_per_dispatch": _ALWAYS,
    "cpu_kernels": _ALWAYS,
    "num_epochs": Effect(lambda run: run.num_steps == 0, "--num_steps overrides it", refused=False),
    "num_steps": _ALWAYS,
    "eval_batch_size": _ALWAYS,
    "eval_every": _ALWAYS,
    "checkpoint_every": _ALWAYS,
    "log_every": _ALWAYS,
    "target_metric": _ALWAYS,
    "target_value": _ALWAYS,
    "patience": _ALWAYS,
    "seed": _ALWAYS,
    "allow_oversubscription": _ALWAYS,
    "allow_schedule_change": _ALWAYS,
    "workdir": _ALWAYS,
}


def effects() -> Mapping[str, Effect]:
    """Of every flag: those of the table, and each interaction's options."""
    owners: dict[str, list[str]] = {}
    for interaction in interactions.registered():
        for option in interactions.options_of(interaction):
            owners.setdefault(option.name, []).append(interaction)
    return EFFECTS | {name: _for_interactions(kinds) for name, kinds in owners.items()}


def _for_interactions(kinds: list[str]) -> Effect:
    return Effect(lambda run: run.model.interaction.name in kinds, f"it is for --interaction={' or '.join(kinds)}")


def without_effect(run: RunConfig, given: Mapping[str, Any]) -> Iterable[str]:
    """What to say of each flag among `given`, text by name, that has no effect; ConfigError for one that is refused."""
    effect_of = effects()
    for name, value in given.items():
        effect = effect_of[name]
        if effect.when(run):
            continue
        text = f"--{name}={value} has no effect here: {effect.words}"
        if effect.refused:
            raise ConfigError(f"{text}; leave it out")
        yield text
