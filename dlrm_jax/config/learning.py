"""How a model learns, as frozen dataclasses: loss, learning rate, optimizers."""

import dataclasses
from typing import Any

from dlrm_jax.config.errors import ConfigError, require
from dlrm_jax.config.settings import Needs, check_settings, setting, settings

LOSSES = ("bce", "wbce", "mse")
DENSE_OPTIMIZERS = ("sgd", "momentum", "adagrad", "adam", "adamw")
SCHEDULE_COMPAT = ("none", "dlrm")
TOUCHED_ROWS, ALL_ROWS = TABLE_UPDATES = ("touched", "all")
DECAYS = ("polynomial", "linear", "cosine")

_WBCE = Needs(lambda run: run.loss.name == "wbce", "it is for --loss=wbce")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """`bce` on logits, `wbce` (class weights for label 0 and 1) or `mse` on probabilities.

    `threshold` t > 0 clips probabilities to [t, 1 - t]: those that the loss, every metric and every prediction are of.
    """

    name: str = setting("bce", "Training loss.", flag="loss", choices=LOSSES)
    class_weights: tuple[float, float] = setting(
        (1.0, 1.0), "Weights of label 0 and label 1 for loss=wbce.", at_least=0, needs=_WBCE
    )
    threshold: float = setting(
        0.0,
        "Clip probabilities to [t, 1-t] in loss, metrics and predictions; 0: no.",
        flag="loss_threshold",
        at_least=0,
        below=0.5,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        require(len(self.class_weights) == 2, f"class_weights is {self.class_weights}; give two, for label 0 and 1")
        require(max(self.class_weights) > 0, "class_weights is 0,0; so nothing would be learned: give one above 0")


def _decays(run: Any) -> bool:
    return run.optimizer.schedule.decay_steps > 0


_DECAY = Needs(_decays, "it needs --decay_steps, over which to decay")
_DECAY_OF_OURS = Needs(
    lambda run: _decays(run) and run.optimizer.schedule.compat == "none",
    "it needs --decay_steps, over which to decay, and --lr_compat=dlrm has its own",
)
_POLYNOMIAL = Needs(
    lambda run: _DECAY_OF_OURS.when(run) and run.optimizer.schedule.decay == "polynomial",
    "it needs --decay_steps, over which to decay, --lr_decay=polynomial, and --lr_compat=dlrm has its own",
)


@dataclasses.dataclass(frozen=True)
class Plateau:
    """When the learning rate is cut: after `patience` + 1 evaluations in a row without a gain of `min_delta`.

    It is multiplied by `factor` then, and never falls below `min`.
    """

    factor: float = setting(0.1, "What the rate is multiplied with.", above=0, below=1)
    patience: int = setting(0, "Evaluations without a gain that are let pass.", at_least=0)
    min_delta: float = setting(1e-6, "The least gain.", at_least=0)
    min: float = setting(1e-6, "The least rate.", at_least=0)

    def __post_init__(self) -> None:
        check_settings(self)


def parse_plateau(text: str) -> Plateau | None:
    """The Plateau of `factor:0.1,patience:0`, the rest by default; None for an empty text."""
    if not text:
        return None
    known = {one.flag: one for _, one in settings(Plateau)}
    values = {}
    for part in text.split(","):
        name, _, number = part.partition(":")
        require(name in known, f"lr_plateau={text}: {name!r} is not among {', '.join(known)}; as factor:0.1,patience:0")
        try:
            values[name] = known[name].kind(number)
        except ValueError:
            raise ConfigError(f"lr_plateau={text}: {name} is {number!r}; it must be a number") from None
    try:
        return Plateau(**values)
    except ConfigError as error:
        raise ConfigError(f"lr_plateau={text}: {error}") from None


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over 1-based steps: linear warm-up, a constant rate, decay; and cuts where val stalls (`plateau`).

    `compat="dlrm"` keeps the reference's quirks (see schedule.py).
    """

    learning_rate: float = setting(dataclasses.MISSING, "Learning rate after warm-up.", above=0)
    warmup_steps: int = setting(0, "Steps of linear warm-up.", at_least=0)
    decay_start_step: int = setting(0, "Step at which the decay starts.", at_least=0, needs=_DECAY)
    decay_steps: int = setting(0, "Steps of the decay; 0: none.", at_least=0)
    decay: str = setting(
        "polynomial",
        "How the rate falls.",
        flag="lr_decay",
        choices=DECAYS,
        needs=_DECAY_OF_OURS,
    )
    decay_power: float = setting(2.0, "Power of the polynomial decay.", at_least=0, needs=_POLYNOMIAL)
    end_learning_rate: float = setting(0.0, "Learning rate after the decay.", at_least=0, needs=_DECAY_OF_OURS)
    compat: str = setting(
        "none", "`dlrm` keeps the reference's schedule quirks.", flag="lr_compat", choices=SCHEDULE_COMPAT, needs=_DECAY
    )

    plateau: str = setting(
        "",
        "Cut the rate where --target_metric on val stalls, as factor:0.1,patience:0,min_delta:1e-6,min:1e-6: after "
        "patience + 1 evaluations in a row without a gain of min_delta it is multiplied by factor, down to min.",
        flag="lr_plateau",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        parse_plateau(self.plateau)
        require(
            self.decay_steps == 0 or self.decay_start_step >= self.warmup_steps,
            f"decay_start_step is {self.decay_start_step}, before the end of warm-up at {self.warmup_steps}",
        )


def _uses_adagrad(run: Any) -> bool:
    rules = [run.optimizer.table, *(table.get("optimizer", "") for table in run.model.own_tables.values())]
    names = {rule.partition(",")[0] for rule in rules}
    return run.optimizer.dense == "adagrad" or not names.isdisjoint(("adagrad", "rowwise_adagrad"))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """One optimizer for the dense parameters, one row-sparse optimizer for the tables, one schedule.

    `table` names a rule, with its options (tables/rules.py, which checks it); `table_l2`, `table_clip_norm`,
    `table_weight_decay` and `table_max_norm` bound its rows, 0 for not at all.
    """

    schedule: ScheduleConfig
    dense: str = setting("sgd", "Optimizer of the MLPs.", flag="dense_optimizer", choices=DENSE_OPTIMIZERS)
    table: str = setting(
        "sgd",
        "Row-sparse optimizer of the tables, with its options behind commas, as adam,b1=0.8.",
        flag="table_optimizer",
    )
    eps: float = setting(
        1e-10,
        "Added to the root of Adagrad's accumulator.",
        flag="adagrad_eps",
        above=0,
        needs=Needs(_uses_adagrad, "it is for --dense_optimizer or --table_optimizer adagrad"),
    )
    momentum: float = setting(
        0.9,
        "Momentum of dense_optimizer=momentum.",
        at_least=0,
        below=1,
        needs=Needs(lambda run: run.optimizer.dense == "momentum", "it is for --dense_optimizer=momentum"),
    )
    weight_decay: float = setting(
        0.0,
        "Weight decay of dense_optimizer=adamw.",
        at_least=0,
        needs=Needs(lambda run: run.optimizer.dense == "adamw", "it is for --dense_optimizer=adamw"),
    )
    dense_l2: float = setting(0.0, "Add this times each weight of the MLPs to its gradient.", at_least=0)
    clip_value: float = setting(0.0, "Bound each number of a gradient, after --clip_norm; 0: no.", at_least=0)
    clip_norm: float = setting(
        0.0,
        "Bound the norm of all gradients together, of MLPs and of rows, each row's merged; 0: no. On several devices "
        "rows' gradients are exchanged twice for it.",
        at_least=0,
    )
    table_update: str = setting(
        TOUCHED_ROWS,
        "Which rows a step moves: those that its batch touched, or all, as of a dense parameter: moments decay and "
        "--table_l2 pulls everywhere, and a step's time and memory grow with the tables (--most_rows_updated).",
        choices=TABLE_UPDATES,
    )
    table_rate: float = setting(1.0, "The tables' learning rate, times the run's.", above=0)
    table_l2: float = setting(
        0.0,
        "Add this times a row to its gradient; of rows that are touched, or of all (--table_update).",
        at_least=0,
    )
    table_clip_norm: float = setting(0.0, "Bound the norm of a row's gradient; 0: no.", at_least=0)
    table_weight_decay: float = setting(
        0.0, "Take the learning rate times this of a touched row away, as AdamW.", at_least=0
    )
    table_max_norm: float = setting(0.0, "Bound the norm of a touched row after its update; 0: no.", at_least=0)

    def __post_init__(self) -> None:
        check_settings(self)
        require(
            self.weight_decay == 0 or self.dense == "adamw",
            f"weight_decay is {self.weight_decay} but dense_optimizer is {self.dense!r}; only adamw decays weights",
        )
