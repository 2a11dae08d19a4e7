"""The flags of a training run, made from the settings of RunConfig, and the RunConfig made from them.

Only commands import this.
"""

import logging
import pathlib
import sys
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags

from dlrm_jax.config import ConfigError, InteractionConfig, Needs, Setting, require, settings
from dlrm_jax.config.settings import built
from dlrm_jax.model import interactions
from dlrm_jax.tables import compress, rules
from dlrm_jax.training.options import ShardingOptions
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

_MORE_HELP = {"table_optimizer": rules.help_text, "compress_tables": compress.help_text}
"""What can be registered, and is listed in a flag's help."""


def define_run_flags() -> None:
    """Define every flag that `config_from_flags` reads; exits in one line if an interaction's options cannot be."""
    try:
        for known in run_settings().values():
            _define(known)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    flags.DEFINE_string(
        "workdir",
        None,
        "Where checkpoints, logs and results go; a second run there goes on. For prepared data by default runs/NAME.",
    )


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


def _needing(option: Setting, kinds: list[str]) -> Setting:
    words = f"it is for --interaction={' or '.join(kinds)}"
    return option.replace(needs=Needs(lambda run: run.model.interaction.name in kinds, words))


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


def _define(known: Setting) -> None:
    """The flag of a setting, by its type."""
    name = known.flag
    default: Any = LEARNING_DEFAULTS.get(name, known.default)
    text = known.help + (f" One of: {_MORE_HELP[name]()}." if name in _MORE_HELP else "")
    kinds = {known.kind, *typing.get_args(known.kind)}
    if known.kind is InteractionConfig:
        flags.DEFINE_enum(name, default.name, tuple(interactions.registered()), text)
    elif known.choices:
        flags.DEFINE_enum(name, default, known.choices, text)
    elif typing.get_origin(known.kind) is tuple:
        flags.DEFINE(_Numbers(typing.get_args(known.kind)[0]), name, default, text, serializer=_Joined())
    elif bool in kinds:
        flags.DEFINE_bool(name, default, text)
    elif int in kinds:
        flags.DEFINE_integer(name, default, text)
    elif float in kinds:
        flags.DEFINE_float(name, default, text)
    else:
        flags.DEFINE_string(name, default, text)


def config_from_flags(publishes: bool = False) -> RunConfig:
    """The RunConfig that the parsed flags describe; ConfigError for a value that cannot be, or has no effect.

    As --publish where the command does not train one run, and so no one `publishes`.
    """
    config = unchecked_config()
    where = f"--publish={config.publishing.model_dir} is for dlrm_jax.train"
    require(publishes or not config.publishing.model_dir, f"{where}; leave it out here")
    for line in without_effect(config, {known.flag: known for known in run_settings().values() if _differs(known)}):
        _LOG.warning("%s", line)
    return config


def unchecked_config() -> RunConfig:
    """The RunConfig that the parsed flags describe, whether all of them have an effect or not."""
    config: RunConfig = built(RunConfig, _value)
    return config


def sharding_from_flags() -> ShardingOptions:
    """The ShardingOptions that the parsed flags describe."""
    options: ShardingOptions = built(ShardingOptions, _value)
    return options


def without_effect(run: RunConfig, given: Mapping[str, Setting]) -> Iterable[str]:
    """What to say of each flag among `given` that has no effect; ConfigError for one that is refused.

    A flag counts as given where its value is not its default: `--flagfile=WORKDIR/flags.txt` names all of them.
    """
    for name, known in given.items():
        if known.needs is None or known.needs.when(run):
            continue
        text = f"--{name}={_text(name)} has no effect here: {known.needs.words}"
        require(not known.needs.refused, f"{text}; leave it out")
        yield text


def _value(known: Setting) -> Any:
    """What a setting's flag says."""
    if known.kind is InteractionConfig:
        name = FLAGS[known.flag].value
        return InteractionConfig(name, {one.flag: _value(one) for one in interactions.options_of(name)})
    return _text_of_file(known.flag) if known.of_file else FLAGS[known.flag].value


def _text_of_file(name: str) -> str:
    """What the file of a flag holds: the run keeps that, not the file's name. ConfigError where it cannot be read."""
    path = FLAGS[name].value
    if not path:
        return ""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"--{name}={path}: {reason}") from error


def defaults_taken() -> str:
    """The flags of how a run learns that were left out, with what they are then, as one would type them."""
    left_out = {name: FLAGS[name] for name in LEARNING_DEFAULTS if not FLAGS[name].present}
    if FLAGS.num_steps:  # It overrides the epochs.
        left_out.pop("num_epochs", None)
    return " ".join(flag.serialize() for flag in left_out.values())


def _text(name: str) -> str:
    value = FLAGS[name].value
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _differs(known: Setting) -> bool:
    """Whether a flag's value is another than its default."""
    return FLAGS[known.flag].value != FLAGS[known.flag].default


def settings_text() -> dict[str, str]:
    """Our flags as texts, but for files that are read: where these lie may differ between machines."""
    return {
        flag.name: _text(flag.name)
        for flag in _ours()
        if flag.name not in ("data_dir", "id_trace", "sharding_plan", "init_from")
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
