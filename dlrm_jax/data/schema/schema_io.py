"""Schemas as files: YAML or JSON to Schema and back, every field checked."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from dlrm_jax.config import ConfigError, require
from dlrm_jax.data.schema.schema import Dense, Label, Schema, Sparse, Split

_MOST_BYTES = 16 << 20
_DEEPEST = 8
"""Levels of lists and names; a schema has three."""


def to_dict(schema: Schema) -> dict[str, Any]:
    """A schema as JSON values, without what is left at its default."""
    return _without_defaults(schema)


def _without_defaults(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        out = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if field.default is dataclasses.MISSING or item != field.default:
                out[field.name] = _without_defaults(item)
        return out
    return [_without_defaults(item) for item in value] if isinstance(value, tuple) else value


def from_dict(values: Any, where: str = "schema") -> Schema:
    """The Schema of JSON or YAML values; ConfigError naming the field that is unknown, missing or of a wrong type."""
    parts = {"label": Label, "split": Split}
    lists = {"dense": Dense, "sparse": Sparse}
    values = dict(_mapping(values, where))
    if isinstance(values.get("label"), str):
        values["label"] = {"column": values["label"]}
    for name, kind in parts.items():
        if name in values:
            values[name] = _build(kind, values[name], f"{where}: {name}")
    for name, kind in lists.items():
        items = values.get(name) or []
        require(isinstance(items, list), f"{where}: {name} is not a list")
        values[name] = tuple(
            _build(kind, {"name": item} if isinstance(item, str) else item, f"{where}: {name}[{i}]")
            for i, item in enumerate(items)
        )
    return _build(Schema, values, where)


def _mapping(values: Any, where: str) -> dict[str, Any]:
    require(isinstance(values, dict), f"{where} is {_shown(values)}; expected names with values")
    return values


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _build(kind: Any, values: Any, where: str) -> Any:
    values = _mapping(values, where)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(str(name) for name in set(values) - set(fields))
    require(not unknown, f"{where}: unknown {', '.join(unknown)[:200]}; known are {', '.join(fields)}")
    missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in values]
    require(not missing, f"{where}: {', '.join(missing)} is missing")
    return kind(**{name: _typed(value, fields[name].type, f"{where}: {name}") for name, value in values.items()})


def _typed(value: Any, kind: Any, where: str) -> Any:
    """`value` as the field's type, where nothing is lost by it."""
    if kind == tuple[str, ...]:
        value = [value] if isinstance(value, str | int | float | bool) else value
        require(isinstance(value, list | tuple), f"{where} is {_shown(value)}; expected a list")
        return tuple(_text(item, where) for item in value)
    if kind is str:
        return _text(value, where)
    if kind is bool:
        require(isinstance(value, bool), f"{where} is {_shown(value)}; expected true or false")
    elif kind is int:
        require(
            isinstance(value, int) and not isinstance(value, bool),
            f"{where} is {_shown(value)}; expected a whole number",
        )
    elif kind in (float, float | None):
        optional = kind is not float and value is None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        require(optional or number, f"{where} is {_shown(value)}; expected a number")
        return None if value is None else float(value)
    return value


def _text(value: Any, where: str) -> str:
    quotes = "; in YAML yes, no, true, false and numbers with a point are texts only in quotes"
    fits = isinstance(value, str | int) and not isinstance(value, bool)
    require(fits, f"{where} is {_shown(value)}; expected text{quotes if isinstance(value, bool | float) else ''}")
    return str(value)


def load(path: pathlib.Path) -> Schema:
    """Read a YAML or JSON file."""
    import yaml  # Here, since serving reads schemas where only jax and numpy are.

    try:
        require(path.stat().st_size <= _MOST_BYTES, f"{path} has more than {_MOST_BYTES >> 20} MB, so it is no schema")
        text = path.read_text(encoding="utf8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file, so no schema") from None
    try:
        values = _load_json(text) if path.suffix == ".json" else _load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is neither YAML nor JSON, or not a schema's: {reason}") from None
    return from_dict(values, str(path))


def _load_json(text: str) -> Any:
    values = json.loads(text)
    level = [values]
    for _ in range(_DEEPEST):
        level = [inner for value in level for inner in _within(value)]
    require(not level, f"it is nested deeper than {_DEEPEST} levels")
    return values


def _within(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _load_yaml(text: str) -> Any:
    """YAML without aliases, by which a few lines can be gigabytes, and of a few levels."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        require(not isinstance(event, yaml.AliasEvent), "it has an alias (*name); write out what that stands for")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        require(depth <= _DEEPEST, f"it is nested deeper than {_DEEPEST} levels")
    return yaml.safe_load(text)


def dump_yaml(schema: Schema) -> str:
    """A schema as YAML, the reasons of a guess as comments above it. The split is written also where it is the default:
    it decides what a score means."""
    import yaml

    values = to_dict(schema)
    split = schema.split
    values["split"] = {"by": split.by, "val": split.val, "test": split.test} | values.get("split", {})
    comments = "".join(f"# {' '.join(reason.split())}\n" for reason in values.pop("reasons", []))
    return comments + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
