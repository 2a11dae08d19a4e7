"""JSON lines: the objects of a chunk as columns of texts, or of lists of texts."""

import json
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from dlrm_jax.data.formats.encoding import UTF8, describe_wrong
from dlrm_jax.data.formats.source import BadRow, Columns

_LINES_FOR_NAMES = 100
"""Lines of a chunk whose names are kept, for the error that a column is in no line; of the others only what is read."""


def parse_json(
    data: bytes,
    first_line: int,
    needed: list[str],
    scalars: Collection[str],
    encoding: str = UTF8,
    separators: Mapping[str, str] = MappingProxyType({}),
) -> Columns:
    """The columns `needed` of a chunk of lines; those among `scalars` hold one value a line, the others may hold lists.

    A column's text is cut at its separator, if it has one, also where another line of the chunk has a list.
    A line without a column has a null there; `Columns.names` tells whether any line has it.
    """
    objects: list[dict[str, Any]] = []
    bad, rows, lines = [], [], {}
    names: set[str] = set()
    unseen = set(needed)
    row = 0
    for number, line in enumerate(data.split(b"\n"), first_line):
        if not line.strip():
            continue
        try:
            found = _json_object(line)
        except UnicodeDecodeError as error:
            bad.append(BadRow(row, number, describe_wrong(line, error.start, encoding)))
        except (ValueError, RecursionError) as error:
            bad.append(BadRow(row, number, f"not a JSON object: {str(error)[:100]}"))
        else:
            if len(objects) + len(bad) < _LINES_FOR_NAMES:
                names.update(found)
            if unseen:
                names.update(unseen.intersection(found))
                unseen.difference_update(found)
            wrong = _wrong_shape(found, needed, scalars)
            if wrong is None:
                objects.append(found)
                rows.append(row)
                lines[row] = number
            else:
                column, reason = wrong
                value = json.dumps(found[column], ensure_ascii=False)
                bad.append(BadRow(row, number, reason, column, value))
        row += 1
    arrays = {name: _column([found.get(name) for found in objects], separators.get(name, "")) for name in needed}
    return Columns(arrays, np.asarray(rows, np.int64), row, bad, lines.get, names=frozenset(names))


def why_unusable(value: object, may_be_list: bool = True) -> str:
    """Why a JSON value cannot be a column's; empty where it can."""
    if isinstance(value, dict):
        return "is an object, not a value; name its parts as columns of their own"
    if isinstance(value, list):
        if not may_be_list:
            return "is a list where one value belongs"
        if any(isinstance(item, dict | list) for item in value):
            return "is a list of lists or objects, not of values"
    return ""


def _wrong_shape(found: dict[str, Any], needed: list[str], scalars: Collection[str]) -> tuple[str, str] | None:
    """(column, reason) of the first value that is none."""
    for name in needed:
        value = found.get(name)
        if isinstance(value, dict | list) and (reason := why_unusable(value, name not in scalars)):
            return name, reason
    return None


def _json_object(line: bytes) -> dict[str, Any]:
    values = json.loads(line.decode(UTF8))  # Of bytes json would guess the encoding.
    if not isinstance(values, dict):
        raise ValueError(f"it is a {type(values).__name__}")
    if b"\\u" in line:  # An escaped half of a surrogate pair is no text.
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(str(error)) from None
    return values


def _column(values: list[Any], separator: str) -> pa.Array:
    """Texts, or lists of texts where any value is a list; a number is written as JSON writes it."""
    if any(isinstance(value, list) for value in values):
        items = [value if value is None or isinstance(value, list) else _bag(value, separator) for value in values]
        return pa.array(
            [None if bag is None else [_json_text(item) for item in bag] for bag in items], pa.list_(pa.string())
        )
    return pa.array([_json_text(value) for value in values], pa.string()).dictionary_encode()


def _bag(value: Any, separator: str) -> list[Any]:
    text = _json_text(value)
    return text.split(separator) if separator and text is not None else [value]


def _json_text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return json.dumps(value, ensure_ascii=False)
