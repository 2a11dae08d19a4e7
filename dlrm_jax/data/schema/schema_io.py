"""Schemas as files: YAML or JSON to Schema and back, every field checked."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from dlrm_jax.config import ConfigError, require
from dlrm_jax.config import from_dict as decoded
from dlrm_jax.config.values import mapping
from dlrm_jax.data.schema.schema import HELD_OUT, Schema

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
    """The Schema of JSON or YAML values; ConfigError naming the field that is unknown, missing or of a wrong type.

    A column may be its name alone: `label: clicked`, `sparse: [user, item]`.
    """
    values = dict(mapping(values, where))
    if isinstance(values.get("label"), str):
        values["label"] = {"column": values["label"]}
    for name in ("dense", "sparse"):
        items = values.get(name) or []
        require(isinstance(items, list), f"{where}: {name} is not a list")
        values[name] = [{"name": item} if isinstance(item, str) else item for item in items]
    split = values.get("split")
    if isinstance(split, dict) and split.get("period"):
        values["split"] = dict.fromkeys(HELD_OUT, 1) | split
    schema: Schema = decoded(Schema, values, where)
    return schema


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
