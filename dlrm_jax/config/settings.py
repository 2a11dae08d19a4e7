"""Settings: fields of frozen dataclasses that say of themselves all that flags, checks and pages need.

A setting is written once, where it is used: its name, type, default, help, choices, bounds, and what it needs to have
an effect. cli/flags.py makes a flag of each and builds the dataclasses from what was given:

    @dataclasses.dataclass(frozen=True)
    class Cache:
        rows: int = setting(1024, "Rows that are kept.", at_least=1)

        def __post_init__(self) -> None:
            check_settings(self)

makes `--rows=1024`; `Cache(rows=0)` is refused: "rows is 0; it must be at least 1".
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator
from typing import Any

from dlrm_jax.config.errors import ConfigError, require_choice

_KEY = "setting"


@dataclasses.dataclass(frozen=True)
class Needs:
    """Under which settings of a run one has an effect; `words` say what it needs, behind "it has no effect here: ".

    A flag that has none is refused; where `refused` is false it is told: a file of flags may name it for others.
    """

    when: Callable[[Any], bool]
    words: str
    refused: bool = True


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of a setting: `flag` is its name for users; `of_file`, that users name a file of which it is text.

    `at_least`, `above` and `below` bound its numbers, `choices` its text.
    """

    flag: str
    help: str
    kind: type
    default: Any
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    needs: Needs | None = None
    of_file: bool = False

    def replace(self, **changes: Any) -> "Setting":
        """The same but for some fields."""
        return dataclasses.replace(self, **changes)


def setting(default: Any, help_text: str, *, flag: str = "", **known: Any) -> Any:
    """A field that is a setting; `flag` where users know it by another name, `known` as Setting's further fields.

    `choices` may be a function, for what can be registered later.
    """
    return dataclasses.field(default=default, metadata={_KEY: {"flag": flag, "help": help_text, **known}})


def setting_of(field: dataclasses.Field, kind: type) -> Setting | None:
    """What a field says of itself; None for one that is no setting. `kind` is its type without strings."""
    if _KEY not in field.metadata:
        return None
    known = dict(field.metadata[_KEY])
    known["flag"] = known["flag"] or field.name
    choices = known.pop("choices", ())
    return Setting(kind=kind, default=field.default, choices=choices() if callable(choices) else choices, **known)


def settings(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Setting]]:
    """Every setting of a dataclass and of the dataclasses in it, with the names of the fields that lead to it."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        found = setting_of(field, hints[field.name])
        if found is not None:
            yield (*path, field.name), found
        elif dataclasses.is_dataclass(hints[field.name]):
            yield from settings(hints[field.name], (*path, field.name))


def built(config: Any, value_of: Callable[[Setting], Any]) -> Any:
    """A dataclass, and those in it, of what `value_of` gives for each setting; other fields have their defaults."""
    hints = typing.get_type_hints(config)
    values = {}
    for field in dataclasses.fields(config):
        found = setting_of(field, hints[field.name])
        if found is not None:
            values[field.name] = value_of(found)
        elif dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = built(hints[field.name], value_of)
    return config(**values)


def check_settings(config: Any) -> None:
    """ConfigError for the first setting of a dataclass whose value is not among its choices, or beyond its bounds."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        found = setting_of(field, hints[field.name])
        if found is None:
            continue
        value = getattr(config, field.name)
        if found.choices:
            require_choice(found.flag, value, found.choices)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check_number(found, value, number)


def _check_number(known: Setting, value: Any, number: float) -> None:
    if isinstance(number, int) and abs(number) >= 2**64:
        raise ConfigError(f"{known.flag} is {value}; it must be a number of at most 64 bits")
    if not math.isfinite(number):
        raise ConfigError(f"{known.flag} is {value}; it must be finite")
    too_low = known.at_least is not None and number < known.at_least
    too_low |= known.above is not None and number <= known.above
    if too_low or (known.below is not None and number >= known.below):
        raise ConfigError(f"{known.flag} is {value}; it must {_bounds(known)}")


def _bounds(known: Setting) -> str:
    least, above, below = known.at_least, known.above, known.below
    if below is not None:
        return f"lie in [{least:g}, {below:g})" if above is None else f"lie in ({above:g}, {below:g})"
    if above is not None:
        return "be positive" if above == 0 else f"be above {above:g}"
    return "not be negative" if least == 0 else f"be at least {least:g}"
