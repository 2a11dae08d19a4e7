"""The flags of a training run, made from the settings of RunConfig, and the RunConfig made from them.

Every function takes a set of flags: a command's is the process's one, FLAGS; each call of the Python interface has one
of its own (`parsed`), so that both are read and refused by the same code.
"""

import logging
import os
import pathlib
import sys
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from absl import flags

from dlrm_jax.cli import one_line
from dlrm_jax.config import ConfigError, InteractionConfig, Needs, Setting, require, settings
from dlrm_jax.config.settings import built
from dlrm_jax.model import interactions
from dlrm_jax.tables import compress, named_rules
from dlrm_jax.training.run_config import RunConfig

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

_MORE_HELP = {"table_optimizer": named_rules.help_text, "compress_tables": compress.help_text}
"""What can be registered, and is listed in a flag's help."""


def define_run_flags(values: flags.FlagValues = FLAGS) -> None:
    """Define every flag that `config_from_flags` reads; exits in one line if an interaction's options cannot be."""
    try:
        for known in run_settings().values():
            _define(known, values)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    flags.DEFINE_string(
        "workdir",
        None,
        "Where checkpoints, logs and results go; a second run there goes on. For prepared data by default runs/NAME.",
        flag_values=values,
    )


def parsed(settings: Mapping[str, Any], flagfile: str | os.PathLike[str] | None = None) -> flags.FlagValues:
    """A set of flags of its own, as `flagfile` and then `settings`, values by the flags' names, say.

    A list of numbers may be any sequence, None is as left out. ConfigError, in the words of the commands, for a name
    that is no flag's (with the nearest that is) and for a value that cannot be read.
    """
    values = flags.FlagValues()
    define_run_flags(values)
    file = [] if flagfile is None else [f"--flagfile={os.fspath(flagfile)}"]
    texts = [f"--{name}={_as_text(name, value)}" for name, value in settings.items() if value is not None]
    try:
        stray = values(["", *file, *texts])[1:]
    except flags.Error as error:
        raise ConfigError(one_line.of_flags(error)) from None
    require(not stray, f"unexpected argument {stray[:1]}; flags look like --name=value")
    return values


def _as_text(name: str, value: Any) -> str:
    """A value as one types it behind a flag's name."""
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(_as_text(name, one) for one in value)
    require(isinstance(value, str | int | float | os.PathLike), f"--{name} is {value!r:.100}, which is no flag's value")
    return str(value)


def run_settings() -> dict[str, Setting]:
    """Every setting of a run by its flag: those of RunConfig, and each interaction's options.

    Interactions whose options have one name share its flag.
    """
    known = {one.flag: one for _, one in settings(RunConfig)}
    owners: dict[str, list[str]] = {}
    options: dict[str, Setting] = {}
    for kind in interactions.registered():
        for option in interactions.options_of(kind):
            name, first = option.flag, options.setdefault(option.flag, option)
            require(
                name not in known and option.default == first.default,
                f"interaction {kind!r}: its option {name!r} has the name of another flag or another default; rename it",
            )
            owners.setdefault(name, []).append(kind)
    return known | {name: _needing(option, owners[name]) for name, option in options.items()}


_TITLES = {
    "data": "data",
    "model": "model",
    "loss": "loss",
    "optimizer": "optimizers",
    "optimizer.schedule": "learning rate",
    "": "the run",
    "sharding": "placement on devices",
    "records": "records of the run",
    "publishing": "versions while it trains",
}
"""What the groups of --help are called, by the fields of RunConfig that lead to their settings."""


def groups() -> dict[str, list[str]]:
    """The flags of a run by group, as the dataclasses of RunConfig have them; options of interactions are one more."""
    place = {known.flag: ".".join(path[:-1]) for path, known in settings(RunConfig)}
    found = {title: [flag for flag, at in place.items() if at == path] for path, title in _TITLES.items()}
    return found | {"options of --interaction": [name for name in run_settings() if name not in place]}


def _needing(option: Setting, kinds: list[str]) -> Setting:
    where = f"--interaction={' or '.join(kinds)}"
    needs = Needs(lambda run: run.model.interaction.name in kinds, f"it is for {where}")
    return option.replace(needs=needs, help=f"{where}: {option.help}")


class _Numbers(flags.ArgumentParser):
    """A list of numbers, as 64,32,1."""

    syntactic_help = "a list of numbers, as 64,32,1"

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def parse(self, argument: Any) -> tuple:
        """The numbers; a tuple is left as it is."""
        parts = argument.split(",") if isinstance(argument, str) and argument else argument or ()
        try:
            return tuple(self._kind(part) for part in parts)
        except ValueError:
            raise ValueError(f"it is not {self.syntactic_help}") from None

    def flag_type(self) -> str:
        """As --help shows it."""
        return "numbers"


class _Joined(flags.ArgumentSerializer):
    """The inverse of `_Numbers`."""

    def serialize(self, value: tuple) -> str:
        """Numbers with commas between."""
        return ",".join(map(str, value))


def _define(known: Setting, values: flags.FlagValues) -> None:
    """The flag of a setting, by its type."""
    name = known.flag
    default: Any = LEARNING_DEFAULTS.get(name, known.default)
    text = known.help + (f" One of: {_MORE_HELP[name]()}." if name in _MORE_HELP else "")
    kinds = {known.kind, *typing.get_args(known.kind)}
    if known.kind is InteractionConfig:
        flags.DEFINE_enum(name, default.name, tuple(interactions.registered()), text, flag_values=values)
    elif known.choices:
        flags.DEFINE_enum(name, default, known.choices, text, flag_values=values)
    elif typing.get_origin(known.kind) is tuple:
        flags.DEFINE(_Numbers(typing.get_args(known.kind)[0]), name, default, text, values, _Joined())
    elif bool in kinds:
        flags.DEFINE_bool(name, default, text, flag_values=values)
    elif int in kinds:
        flags.DEFINE_integer(name, default, text, flag_values=values)
    elif float in kinds:
        flags.DEFINE_float(name, default, text, flag_values=values)
    else:
        flags.DEFINE_string(name, default, text, flag_values=values)


def given(values: flags.FlagValues) -> dict[str, Any]:
    """The flags of a run whose values are not their defaults: what `parsed` makes the same run of."""
    return {name: values[name].value for name in run_settings() if values[name].value != values[name].default}


def config_from_flags(values: flags.FlagValues = FLAGS, publishes: bool = False) -> RunConfig:
    """The RunConfig that the parsed flags describe; ConfigError for a value that cannot be, or has no effect.

    As --publish where the command does not train one run, and so no one `publishes`.
    """
    config = unchecked_config(values)
    where = f"--publish={config.publishing.model_dir} is for dlrm_jax.train and dlrm_jax.online"
    require(publishes or not config.publishing.model_dir, f"{where}; leave it out here")
    known = run_settings()
    for line in _without_effect(config, {name: known[name] for name in given(values)}, values):
        _LOG.warning("%s", line)
    return config


def unchecked_config(values: flags.FlagValues = FLAGS) -> RunConfig:
    """The RunConfig that the parsed flags describe, whether all of them have an effect or not."""
    config: RunConfig = built(RunConfig, lambda known: _value(known, values))
    return config


def _without_effect(run: RunConfig, differing: Mapping[str, Setting], values: flags.FlagValues) -> Iterable[str]:
    """What to say of each flag among `differing` that has no effect; ConfigError for one that is refused.

    A flag counts as given where its value is not its default: `--flagfile=WORKDIR/flags.txt` names all of them.
    """
    for name, known in differing.items():
        if known.needs is None or known.needs.when(run):
            continue
        text = f"--{name}={_text(values[name])} has no effect here: {known.needs.words}"
        require(not known.needs.refused, f"{text}; leave it out")
        yield text


def _value(known: Setting, values: flags.FlagValues) -> Any:
    """What a setting's flag says."""
    value = values[known.flag].value
    if known.kind is InteractionConfig:
        return InteractionConfig(value, {one.flag: _value(one, values) for one in interactions.options_of(value)})
    return _text_of_file(known.flag, value) if known.of_file else value


def _text_of_file(name: str, path: str) -> str:
    """What the file of a flag holds: the run keeps that, not the file's name. ConfigError where it cannot be read."""
    if not path:
        return ""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"--{name}={path}: {reason}") from error


def defaults_taken(values: flags.FlagValues = FLAGS) -> str:
    """The flags of how a run learns that were left out, with what they are then, as one would type them."""
    left_out = {name: values[name] for name in LEARNING_DEFAULTS if not values[name].present}
    if values["num_steps"].value:  # It overrides the epochs.
        left_out.pop("num_epochs", None)
    return " ".join(flag.serialize() for flag in left_out.values())


def _text(flag: flags.Flag) -> str:
    if isinstance(flag.value, tuple):
        return ",".join(map(str, flag.value))
    return str(flag.value).lower() if isinstance(flag.value, bool) else str(flag.value)


def settings_text() -> dict[str, str]:
    """Our flags as texts, but for files that are read: where these lie may differ between machines."""
    return {
        flag.name: _text(flag)
        for flag in _ours(FLAGS)
        if flag.name not in ("data_dir", "id_trace", "sharding_plan", "init_from")
    }


def _ours(values: flags.FlagValues) -> list[flags.Flag]:
    return sorted(values.flags_by_module_dict()[__name__], key=lambda flag: flag.name)


def flagfile_text(values: flags.FlagValues = FLAGS) -> str:
    """Our flags as they stand, one a line, as --flagfile reads them; ConfigError for one that no file can hold."""
    lines = [flag.serialize() for flag in _ours(values) if flag.value is not None]
    for line in lines:
        # absl reads a file line by line and takes the spaces around each away.
        if line != line.strip() or set(line) & set("\r\n") or line.encode("utf8", "replace").decode() != line:
            raise ConfigError(
                f"{line!r} cannot be kept in flags.txt: a line break, a space at the end, or bytes that are no UTF-8; "
                "name it otherwise"
            )
    return "".join(f"{line}\n" for line in lines)
