"""Guess how a log's files are to be read: encoding, delimiter, header, and which columns can be read at all."""

import collections
import csv
import dataclasses
import io
import itertools
import json
import pathlib
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats import column_types, json_lines
from dlrm_jax.data.formats.encoding import UTF8, guess_encoding
from dlrm_jax.data.formats.records import read_head
from dlrm_jax.data.formats.source import refuse, require_columns
from dlrm_jax.data.formats.text_source import guess_delimiter, read_header
from dlrm_jax.data.schema.schema import MAX_NAME_BYTES

_HEAD_BYTES = 4 << 20
_MAX_FILES = 16
"""Files whose first bytes tell the encoding."""
_HEADER_ROWS = 200
MAX_WRONG_SHARE = 0.01
"""A column in which more rows than this hold what is no value is left out; of fewer, preparation names the row."""
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?")
_DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}.*|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}.*|\d{1,2}:\d{2}(:\d{2}.*)?")
_HEX = re.compile(r"[0-9a-f]{8}")
_COMMON_NAMES = frozenset(
    ("data", "dataset", "log", "logs", "train", "training", "test", "val", "valid", "part", "export", "file", "output")
)
FALLBACK_NAME = "click_log"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The columns that can be read, and the Schema fields that say how."""

    names: list[str]
    fields: dict[str, Any]
    unusable: dict[str, str] = dataclasses.field(default_factory=dict)
    """Why a column cannot be read, by its name."""


def guess_layout(paths: tuple[str, ...], kind: str, reasons: list[str]) -> Layout:
    """The layout of files of one format."""
    if kind == "parquet":
        return _parquet_layout(paths[0])
    encoding = _encoding(paths, reasons)
    fields: dict[str, Any] = {"format": kind} | ({} if encoding == UTF8 else {"encoding": encoding})
    if kind == "jsonl":
        return _json_layout(paths[0], encoding, fields)
    path, delimiter = paths[0], guess_delimiter(paths[0], encoding)
    fields["delimiter"] = delimiter
    first = list(read_header(path, delimiter, '"', encoding))
    why = _no_header(path, delimiter, encoding, first)
    if why:
        reasons.append(f"no header: {why}; columns are named column_1 to column_{len(first)}")
        names = [f"column_{i}" for i in range(1, len(first) + 1)]
        return Layout(names, fields | {"header": False, "columns": tuple(names)})
    repeated = [name for name, count in collections.Counter(first).items() if count > 1]
    if any(repeated):
        raise ConfigError(f"{path}: the header names {max(repeated)!r} twice; write a schema with columns")
    if repeated:
        reasons.append(f"{first.count('')} columns without a name are left out")
    return Layout([name for name in first if name not in repeated], fields)


def _encoding(paths: tuple[str, ...], reasons: list[str]) -> str:
    found: dict[str, str] = {}
    for path in paths[:_MAX_FILES]:
        head = read_head(path, _HEAD_BYTES)
        encoding, why = guess_encoding(head)
        if encoding != UTF8 and encoding not in found:
            reasons.append(f"encoding {encoding}: {pathlib.Path(path).name} has {why}, please check")
        if encoding != UTF8 or not head.isascii():
            found.setdefault(encoding, path)
    if len(found) > 1:
        shown = ", ".join(f"{path} in {encoding}" for encoding, path in found.items())
        raise ConfigError(f"the files seem to have several encodings ({shown}); convert them to UTF-8")
    return next(iter(found), UTF8)


def _parquet_layout(path: str) -> Layout:
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        refuse(path, error)
    require_columns(path, schema.names, schema.names)
    why = {field.name: column_types.why_unusable(field.type, "sparse") for field in schema}
    unusable = {name: f"left out, holds {reason}" for name, reason in why.items() if reason}
    return Layout([name for name in schema.names if name not in unusable], {"format": "parquet"}, unusable)


def _json_layout(path: str, encoding: str, fields: dict[str, Any]) -> Layout:
    count: collections.Counter[str] = collections.Counter()
    wrong: collections.Counter[str] = collections.Counter()
    unusable: dict[str, str] = {}
    lines = read_head(path, _HEAD_BYTES, encoding).split(b"\n")
    for line in lines[: max(len(lines) - 1, 1)]:
        try:
            values = json.loads(line.decode(UTF8)) if line.strip() else {}
        except (ValueError, RecursionError):
            continue  # Preparation names such a line.
        if isinstance(values, dict):
            count.update(values.keys())
            for name, value in values.items():
                if isinstance(value, dict | list) and (why := json_lines.why_unusable(value)):
                    wrong[name] += 1
                    unusable.setdefault(name, f"left out, {why.split(',')[0]}")
    if not count:
        raise ConfigError(f"{path}: no JSON object among its first lines; JSON lines have one in each line")
    unusable = {name: why for name, why in unusable.items() if wrong[name] > MAX_WRONG_SHARE * count[name]}
    return Layout([name for name in count if name not in unusable], fields, unusable)


def _no_header(path: str, delimiter: str, encoding: str, first: list[str]) -> str:
    """Why the first line is a row and no header; empty if it is one."""
    kinds = [_kind(cell) for cell in first]
    if all(kinds):
        return "the first line is all numbers"
    if not any(kind in ("number", "date") for kind in kinds):
        return ""
    columns = list(itertools.zip_longest(*_first_rows(path, delimiter, encoding), fillvalue=""))[: len(first)]
    for cell, kind, column in zip(first, kinds, columns, strict=False):
        below = [_kind(other) for other in column if other.strip()]
        if not kind and len(below) > 1 and below.count("") <= 0.05 * len(below):
            return ""  # A word above numbers: that is a name.
        if not kind and cell.strip() not in map(str.strip, column) and len(set(column)) <= len(column) // 3:
            return ""  # A word above other words that recur.
    cell = next(cell for cell, kind in zip(first, kinds, strict=True) if kind in ("number", "date"))
    return f"the first line holds {cell[:40]!r}, as the lines below it, and no names"


def _kind(cell: str) -> str:
    """What a cell is, if not text; an empty one may be anything."""
    text = cell.strip()
    if not text:
        return "empty"
    if _NUMBER.fullmatch(text):
        return "number"
    if _DATE.fullmatch(text):
        return "date"
    return "hash" if _HEX.fullmatch(text) else ""


def _first_rows(path: str, delimiter: str, encoding: str) -> list[list[str]]:
    """The rows below the first line."""
    text = read_head(path, 1 << 20, encoding).decode(UTF8, "replace")
    lines = text.splitlines()[: _HEADER_ROWS + 1]
    rows = []
    try:
        for row in itertools.islice(csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter), 1, None):
            rows.append(row)
    except csv.Error:
        pass  # What came before it may be enough; preparation names the row.
    return rows


def guess_name(path: str) -> str:
    """A name for the dataset of a log's first file: two logs get two names, and so two working directories."""
    file = pathlib.Path(path)
    stem = _identifier(file.name.split(".")[0])
    plain = re.sub(r"[_0-9]+$", "", stem)
    if not plain or plain in _COMMON_NAMES:
        stem = "_".join(filter(None, (_identifier(file.absolute().parent.name), stem)))
    name = stem[:MAX_NAME_BYTES].strip("_")
    name = f"log_{name}" if name[:1].isdigit() else name
    return name if name.isidentifier() and name.islower() else FALLBACK_NAME


def _identifier(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
