"""Schemas as files: YAML or JSON to Schema and back, every field checked."""

import dataclasses
import pathlib
from typing import Any

from dlrm_jax.config import ConfigError, require
from dlrm_jax.config import from_dict as decoded
from dlrm_jax.config.documents import DEEPEST, from_json, from_yaml
from dlrm_jax.config.values import mapping
from dlrm_jax.data.schema.schema import HELD_OUT, Schema

_MOST_CHARACTERS = 16 << 20


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
    try:
        with path.open(encoding="utf8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file, so no schema") from None
    require(len(text) <= _MOST_CHARACTERS, f"{path} has more than {_MOST_CHARACTERS:,} characters, so it is no schema")
    try:
        values = from_json(text, DEEPEST) if path.suffix == ".json" else from_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path} is neither YAML nor JSON, or not a schema's: {error}") from None
    return from_dict(values, str(path))


def dump_yaml(schema: Schema) -> str:
    """A schema as YAML, the reasons of a guess as comments above it. The split is written also where it is the default:
    it decides what a score means."""
    import yaml

    values = to_dict(schema)
    split = schema.split
    values["split"] = {"by": split.by, "val": split.val, "test": split.test} | values.get("split", {})
    comments = "".join(f"# {' '.join(reason.split())}\n" for reason in values.pop("reasons", []))
    return comments + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
