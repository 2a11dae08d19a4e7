"""Dataclasses as plain JSON values, and back: one decoder, which names what is unknown, missing or of a wrong type."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

from dlrm_jax.config.errors import require

_MOST_SHOWN = 200
_LARGEST = 2**64
"""Beyond the whole numbers that anything here holds; what is larger would fail far from where it was written."""


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(kind: Any, values: Any, where: str) -> Any:
    """The dataclass of type `kind` that `to_dict` wrote, through JSON or YAML; what is left out has its default.

    ConfigError, beginning with `where`, for a name that is unknown or missing and for a value of another type.
    """
    values = mapping(values, where)
    fields, hints = {field.name: field for field in dataclasses.fields(kind)}, _hints(kind)
    unknown = sorted(str(name) for name in set(values) - set(fields))
    require(not unknown, f"{where}: unknown {', '.join(unknown)[:_MOST_SHOWN]}; known are {', '.join(fields)}")
    missing = [name for name, field in fields.items() if _is_needed(field) and name not in values]
    require(not missing, f"{where}: {', '.join(missing)} is missing")
    return kind(**{name: _decoded(hints[name], value, f"{where}: {name}") for name, value in values.items()})


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass' fields: a schema of ten thousand columns asks as often."""
    return typing.get_type_hints(kind)


def mapping(values: Any, where: str) -> dict[str, Any]:
    """`values` if it is a dictionary; ConfigError otherwise."""
    require(isinstance(values, dict), f"{where} is {_shown(values)}; expected names with values")
    found: dict[str, Any] = values
    return found


def _is_needed(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _decoded(kind: Any, value: Any, where: str) -> Any:
    """`value` as a field's type, where nothing is lost by it."""
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else from_dict(kind, value, where)  # type: ignore[arg-type]
    if origin in (types.UnionType, typing.Union):
        (only,) = [one for one in of if one is not types.NoneType]
        return None if value is None else _decoded(only, value, where)
    if origin is tuple:
        return _list(of, value, where)
    if origin in (dict, Mapping):
        return {name: _decoded(of[1], inner, f"{where}: {name}") for name, inner in mapping(value, where).items()}
    return _scalar(kind, value, where)


def _list(of: tuple[Any, ...], value: Any, where: str) -> tuple:
    if of == (str, ...) and isinstance(value, str | int | float | bool):
        value = [value]  # As one writes it by hand.
    require(isinstance(value, list | tuple), f"{where} is {_shown(value)}; expected a list")
    if of[-1] is not ...:
        require(len(value) == len(of), f"{where} is {_shown(value)}; expected {len(of)} values")
    nested = dataclasses.is_dataclass(of[0])
    return tuple(_decoded(of[0], item, f"{where}[{i}]" if nested else where) for i, item in enumerate(value))


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is str:
        return _text(value, where)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    too_large = isinstance(value, int) and abs(value) >= _LARGEST
    require(not too_large, f"{where} is a whole number of more than 64 bits")
    if kind is bool:
        require(isinstance(value, bool), f"{where} is {_shown(value)}; expected true or false")
    elif kind is int:
        require(number and isinstance(value, int), f"{where} is {_shown(value)}; expected a whole number")
    elif kind is float:
        require(number, f"{where} is {_shown(value)}; expected a number")
        return float(value)
    return value


def _text(value: Any, where: str) -> str:
    quotes = "; in YAML yes, no, true, false and numbers with a point are texts only in quotes"
    fits = isinstance(value, str | int) and not isinstance(value, bool)
    require(fits, f"{where} is {_shown(value)}; expected text{quotes if isinstance(value, bool | float) else ''}")
    return str(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
