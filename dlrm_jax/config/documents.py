"""Text that others wrote, as JSON or YAML, to plain values: whatever it holds, in a time that its length bounds."""

import json
from collections.abc import Iterable
from typing import Any

DEEPEST = 8
"""Levels of lists and names in what people write; a schema has three."""
_MOST_YAML = 1 << 20
_LONGEST_PLAIN = 1000
"""Characters of a value without quotes, which may be a number: to read one takes time that grows with their square."""


def from_json(text: str | bytes, deepest: int | None = None) -> Any:
    """The value of a JSON text; ValueError for what is none, or is nested deeper than `deepest` levels."""
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [values]
    for _ in range(deepest or 0):
        level = [inner for value in level for inner in _within(value)]
    if deepest is not None and level:
        raise ValueError(_too_deep(deepest))
    return values


def _within(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def from_yaml(text: str) -> Any:
    """The value of a YAML text; ValueError for what is none, and for aliases, by which a few lines can be gigabytes."""
    import yaml  # Here, since serving reads schemas where only jax and numpy are.

    if len(text) > _MOST_YAML:
        raise ValueError(f"it has more than {_MOST_YAML:,} characters; write it as JSON")
    try:
        _require_small(yaml.parse(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except ValueError:
        raise
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except Exception as error:  # What PyYAML raises depends on the tag, as !!int, that a text does not fit.
        raise ValueError(f"a value is not of its type: {error!r}") from error


def _require_small(events: Iterable[Any]) -> None:
    """ValueError for what takes more time or memory than its length tells, before any value is made."""
    import yaml

    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has an alias (*name); write out what that stands for")
        if isinstance(event, yaml.ScalarEvent) and event.style is None and len(event.value) > _LONGEST_PLAIN:
            raise ValueError(f"a value has more than {_LONGEST_PLAIN} characters; if it is a text, put it in quotes")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(_too_deep(DEEPEST))


def _too_deep(levels: int) -> str:
    return f"it is nested deeper than {levels} levels"
