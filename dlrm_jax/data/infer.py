"""A schema for a log nobody has described: guessed from its first rows, with the reasons, for a person to correct.

The label is a column whose name says so, or else the only one of 0 and 1. Numbers with a fraction, and whole numbers
that look like counts, are dense; texts and whole numbers that look like ids are sparse; what is almost everywhere
different (a row number, free text) is left out.
"""

import collections
import dataclasses
import itertools
import pathlib
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlrm_jax.config import ConfigError
from dlrm_jax.data import times
from dlrm_jax.data.columns import to_numbers
from dlrm_jax.data.open_log import guess_format, open_log
from dlrm_jax.data.presets import PRESETS
from dlrm_jax.data.records import read_head
from dlrm_jax.data.schema import Dense, Label, Schema, Sparse, Split
from dlrm_jax.data.source import Position
from dlrm_jax.data.text_source import guess_delimiter, read_header
from dlrm_jax.data.time_column import find_time

SAMPLE_ROWS = 100_000
_LABEL_NAMES = ("label", "click", "clicked", "is_click", "is_clicked", "target", "y", "conversion", "is_conversion")
_WEIGHT_NAMES = ("weight", "sample_weight", "importance")
_ID_WORDS = re.compile(r"(^|_)(id|ids|uid|key|code|hash|category|type|zip|ip|device|hour|day|weekday|month|c\d+)($|_)")
_SEPARATORS = ("|", ";", " ", ",")
_NULL_TEXTS = ("NA", "N/A", "NaN", "nan", "NULL", "null", "None", "\\N")
_DISTINCT_SHARE = 0.95
"""A text or whole number that differs in more than this share of rows names the row, not a thing."""
_MANY = 1000
"""Rows from which on shares mean something."""


@dataclasses.dataclass
class _Column:
    """What a sample says of one column."""

    name: str
    values: list
    """Texts, numbers, lists or None."""
    is_list: bool
    texts: list[str]
    """Those that are there, as text; lists joined."""

    @property
    def distinct(self) -> int:
        return len(set(self.texts))

    @property
    def distinct_share(self) -> float:
        return self.distinct / max(len(self.texts), 1)


def infer(paths: tuple[str, ...]) -> Schema:
    """Guess the schema of a log; ConfigError where there is no label, or nothing to learn from."""
    kind = guess_format(paths[0])
    if kind in PRESETS:
        schema = PRESETS[kind][1]()
        return dataclasses.replace(schema, reasons=(f"format {kind} by the name of {pathlib.Path(paths[0]).name}",))
    reasons = [f"format {kind} by name and first bytes of {pathlib.Path(paths[0]).name}"]
    names, layout = _layout(paths[0], kind, reasons)
    columns = _sample(paths, names, layout, kind)
    if not any(column.values for column in columns):
        raise ConfigError(f"{paths[0]} has no rows to infer a schema from")
    found = {text for column in columns for text in column.texts if text in _NULL_TEXTS}
    nulls = tuple(text for text in _NULL_TEXTS if text in found)
    if nulls:
        reasons.append(f"{', '.join(nulls)} mean missing")
        for column in columns:
            column.texts = [text for text in column.texts if text not in nulls]
    label = _find_label(columns, reasons)
    rest = [column for column in columns if column.name != label.column]
    weight = next((c.name for c in rest if c.name.lower() in _WEIGHT_NAMES and _numeric(c)), "")
    if weight:
        reasons.append(f"{weight} is the weight by its name")
    time, dated, why = find_time({c.name: c.texts for c in rest if c.name != weight and not c.is_list})
    reasons.append(why)
    dense, sparse = _features([c for c in rest if c.name not in (weight, time, *dated)], reasons)
    reasons += [f"{name}: left out, dates, and not the timestamp" for name in dated if name != time]
    if not sparse:
        shown = " ".join(", ".join(names[:20]).split())[:300]
        raise ConfigError(f"{paths[0]}: no categorical column among {shown}; write a schema that names one")
    return Schema(
        name="click_log",
        label=label,
        dense=tuple(dense),
        sparse=tuple(sparse),
        weight=weight,
        timestamp=time,
        split=Split("time") if time else Split("random"),
        null_values=("", *nulls),
        reasons=tuple(reasons),
        **layout,
    )


def _layout(path: str, kind: str, reasons: list[str]) -> tuple[list[str], dict]:
    """(column names, the Schema fields that say how to read the file)."""
    if kind == "parquet":
        try:
            return pq.read_schema(path).names, {"format": kind}
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{path}: {' '.join(str(error).split())[:200]}") from error
    if kind == "jsonl":
        import json

        names: dict[str, None] = {}
        lines = read_head(path, 4 << 20).split(b"\n")
        for line in lines[: max(len(lines) - 1, 1)]:
            try:
                names |= dict.fromkeys(json.loads(line)) if line.strip() else {}
            except (ValueError, TypeError):
                continue  # Preparation names such a line.
        if not names:
            raise ConfigError(f"{path}: no JSON object among its first lines")
        return list(names), {"format": kind}
    delimiter = guess_delimiter(path)
    first = list(read_header(path, delimiter, '"'))
    if all(re.fullmatch(r"-?[0-9.]*|[0-9a-f]{8}", name) for name in first):
        reasons.append(f"no header: the first line is all numbers; columns are named column_1 to column_{len(first)}")
        names_made = [f"column_{i}" for i in range(1, len(first) + 1)]
        return names_made, {"format": kind, "delimiter": delimiter, "header": False, "columns": tuple(names_made)}
    repeated = [name for name, count in collections.Counter(first).items() if count > 1]
    if repeated:
        raise ConfigError(f"{path}: the header names {repeated[0]!r} twice; write a schema with columns")
    return first, {"format": kind, "delimiter": delimiter}


def _sample(paths: tuple[str, ...], names: list[str], layout: dict, kind: str) -> list[_Column]:
    """Every column's first values."""
    everything = Schema("sample", Label(names[0]), sparse=tuple(Sparse(name) for name in names), **layout)
    chunks = itertools.islice(open_log(paths, everything).chunks(Position()), 8)
    arrays: dict[str, list] = {name: [] for name in names}
    for chunk in chunks:
        parsed = chunk.parse()
        for name in names:
            array = parsed.arrays[name]
            # Python's datetime has no nanoseconds.
            arrays[name] += (times.as_text(array) if times.is_temporal(array.type) else array).to_pylist()
        if len(arrays[names[0]]) >= SAMPLE_ROWS:
            break
    return [_column(name, values[:SAMPLE_ROWS]) for name, values in arrays.items()]


def _column(name: str, values: list) -> _Column:
    is_list = any(isinstance(value, list) for value in values)
    if is_list:
        texts = ["\x1f".join(map(str, value)) for value in values if isinstance(value, list)]
    else:
        texts = [str(value) for value in values if value is not None and value != "" and value == value]
    return _Column(name, values, is_list, texts)


def _numbers(column: _Column) -> np.ndarray | None:
    """The values as numbers, None if most are none."""
    if column.is_list or not column.texts:
        return None
    numbers, wrong = to_numbers(pa.array(column.texts))
    return numbers[~wrong] if wrong.mean() <= 0.001 else None


def _numeric(column: _Column) -> bool:
    return _numbers(column) is not None


def _is_binary(column: _Column) -> bool:
    numbers = _numbers(column) if column.distinct <= 2 or column.texts[:1] in (["True"], ["False"]) else None
    return numbers is not None and set(np.unique(numbers)) <= {0.0, 1.0}


def _find_label(columns: list[_Column], reasons: list[str]) -> Label:
    for wanted in _LABEL_NAMES:
        for column in columns:
            if column.name.lower() == wanted:
                if _is_binary(column):
                    reasons.append(f"{column.name} is the label by its name and its values 0 and 1")
                    return Label(column.name)
                if column.distinct == 2 and not _numeric(column):
                    positive = max(
                        set(column.texts), key=lambda text: text.lower() in ("yes", "true", "t", "y", "click")
                    )
                    reasons.append(f"{column.name} is the label by its name; {positive!r} is positive, please check")
                    return Label(column.name, positive=(positive,))
    binary = [column for column in columns if _is_binary(column)]
    if len(binary) == 1:
        reasons.append(f"{binary[0].name} is the label: the only column of 0 and 1")
        return Label(binary[0].name)
    if binary and binary[0] is columns[0]:
        reasons.append(f"{binary[0].name} is the label: the first column, and it holds 0 and 1")
        return Label(binary[0].name)
    which = (
        f"{len(binary)} columns hold 0 and 1 ({', '.join(c.name for c in binary[:8])})"
        if binary
        else (f"no column is called {', '.join(_LABEL_NAMES[:4])} or holds 0 and 1 alone")
    )
    raise ConfigError(f"cannot tell the label: {which}; write a schema file that names it (see README, Your own log)")


def _features(columns: list[_Column], reasons: list[str]) -> tuple[list[Dense], list[Sparse]]:
    dense: list[Dense] = []
    sparse: list[Sparse] = []
    for column in columns:
        feature, reason = _feature(column)
        reasons.append(f"{column.name}: {reason}")
        if isinstance(feature, Dense):
            dense.append(feature)
        elif feature is not None:
            sparse.append(feature)
    return dense, sparse


def _feature(column: _Column) -> tuple[Dense | Sparse | None, str]:
    """(what the column becomes, why); None leaves it out."""
    name, many = column.name, len(column.texts) >= _MANY
    if not column.texts or column.distinct < 2:
        return None, "left out, has no value or only one"
    if column.is_list:
        lengths = [len(value) for value in column.values if isinstance(value, list)]
        return _bag(name, "", lengths), f"sparse, lists of up to {max(lengths)} values"
    numbers = _numbers(column)
    if numbers is not None:
        whole = bool((numbers == np.floor(numbers)).all())
        if not whole:
            spread = float(numbers.max()) > 100 * max(float(np.median(np.abs(numbers))), 1e-9) and numbers.min() >= 0
            return Dense(name, transform="log1p" if spread else "standardise", missing="mean"), (
                "dense, numbers with a fraction" + (", far spread: log1p" if spread else ", standardised")
            )
        return _whole_numbers(column, numbers, many)
    if not many or column.distinct_share < _DISTINCT_SHARE:
        separator = _separator(column)
        if separator:
            lengths = [len(text.split(separator)) for text in column.texts]
            return _bag(name, separator, lengths), f"sparse, lists at {separator!r} of up to {max(lengths)} values"
        return Sparse(name, oov=True), f"sparse, {column.distinct} texts"
    separator = _separator(column)
    if separator:
        lengths = [len(text.split(separator)) for text in column.texts]
        return _bag(name, separator, lengths), f"sparse, lists at {separator!r} of up to {max(lengths)} values"
    return None, f"left out, {column.distinct_share:.0%} of its texts differ: it names the row"


def _whole_numbers(column: _Column, numbers: np.ndarray, many: bool) -> tuple[Dense | Sparse | None, str]:
    name = column.name
    if _ID_WORDS.search(name.lower()):
        if many and column.distinct_share > _DISTINCT_SHARE:
            return None, f"left out, {column.distinct_share:.0%} of its numbers differ: it names the row"
        return Sparse(name, type="string", oov=True), f"sparse, whole numbers and a name like an id ({column.distinct})"
    if many and column.distinct_share > 0.999:
        return None, "left out, every row has another whole number: it names the row"
    if column.distinct <= 32 and numbers.min() >= 0:
        return Sparse(name, type="string", oov=True), f"sparse, only {column.distinct} whole numbers"
    if numbers.min() >= 0:
        return Dense(name, transform="log1p"), "dense, whole numbers from 0 on: counts, log1p"
    return Dense(name, transform="standardise", missing="mean"), "dense, whole numbers, standardised"


def _bag(name: str, separator: str, lengths: list[int]) -> Sparse:
    """Hotness covers 99 % of bags, and at most 64 ids."""
    hotness = int(min(max(np.quantile(lengths, 0.99, method="higher"), 1), 64))
    return Sparse(name, separator=separator, hotness=hotness, oov=True, pooling="mean")


def _separator(column: _Column) -> str:
    """What cuts many texts into parts that recur: a list. Names have spaces and commas too, so there the parts must be
    far fewer than the texts."""
    sample = column.texts[:5000]
    for separator in _SEPARATORS:
        cut = [text.split(separator) for text in sample if separator in text]
        if len(cut) < 0.2 * len(sample):
            continue
        parts = [part for text in sample for part in text.split(separator)]
        distinct = len(set(parts))
        ambiguous = separator in " ," and distinct * 2 > len(set(sample))
        if distinct <= 0.2 * len(parts) and not ambiguous and all(len(part) <= 40 for part in parts):
            return separator
    return ""
