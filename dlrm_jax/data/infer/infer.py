"""A schema for a log nobody has described: guessed from its first rows, with the reasons, for a person to correct.

The label is a column whose name says so, or else the only one of 0 and 1. Numbers with a fraction, and whole numbers
that look like counts, are dense; texts and whole numbers that look like ids are sparse; what is almost everywhere
different (a row number, free text) is left out.
"""

import collections
import dataclasses
import itertools
import pathlib

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats.open_log import guess_format, open_log
from dlrm_jax.data.formats.source import BadRow, Position
from dlrm_jax.data.infer.column import Column, is_numeric, make_column, use_decimal_comma
from dlrm_jax.data.infer.features import make_features
from dlrm_jax.data.infer.label import find_label
from dlrm_jax.data.infer.layout import MAX_WRONG_SHARE, Layout, guess_layout, guess_name
from dlrm_jax.data.infer.time_column import find_time
from dlrm_jax.data.schema.presets import PRESETS
from dlrm_jax.data.schema.schema import Label, Schema, Sparse, Split
from dlrm_jax.data.values import times

SAMPLE_ROWS = 100_000
_WEIGHT_NAMES = tuple(
    f"{what}_weight" for what in ("sample", "example", "instance", "row", "case", "loss", "importance")
)
_MAYBE_WEIGHT_NAMES = ("weight", "weights", "importance")
"""A body, a parcel, a mail may have these too: a wrong guess would change what is learned without a word."""
_NULL_TEXTS = ("NA", "N/A", "NaN", "nan", "NULL", "null", "None", "\\N")


class _Everything(Schema):
    """All columns, each as it comes: one value, or a list."""

    def roles(self) -> dict[str, list[str]]:
        """Also the label's column, which is still to be found, may hold lists."""
        return {feature.source: ["sparse"] for feature in self.sparse}


def infer(paths: tuple[str, ...]) -> Schema:
    """Guess the schema of a log; ConfigError where there is no label, or nothing to learn from."""
    kind = guess_format(paths[0])
    if kind in PRESETS:
        schema = PRESETS[kind][1]()
        return dataclasses.replace(schema, reasons=(f"format {kind} by the name of {pathlib.Path(paths[0]).name}",))
    reasons = [f"format {kind} by name and first bytes of {pathlib.Path(paths[0]).name}"]
    layout = guess_layout(paths, kind, reasons)
    columns = _sample(paths, layout)
    if not any(column.values for column in columns):
        raise ConfigError(f"{paths[0]} has no rows to infer a schema from")
    found = {text for column in columns for text in column.texts if text in _NULL_TEXTS}
    nulls = tuple(text for text in _NULL_TEXTS if text in found)
    if nulls:
        reasons.append(f"{', '.join(nulls)} mean missing")
        for column in columns:
            column.set_texts([text for text in column.texts if text not in nulls])
    decimal = "."
    if kind == "text" and layout.fields["delimiter"] != ",":
        with_commas = use_decimal_comma(columns)
        if with_commas:
            decimal = ","
            reasons.append(f"decimal commas, as in {with_commas[0]}, please check")
    label = find_label(columns, reasons)
    rest = [column for column in columns if column.name != label.column]
    weight = next((c.name for c in rest if "_".join(c.words) in _WEIGHT_NAMES and is_numeric(c)), "")
    if weight:
        reasons.append(f"{weight} is the weight of each row by its name")
    for column in rest:
        if "_".join(column.words) in _MAYBE_WEIGHT_NAMES and is_numeric(column):
            reasons.append(
                f"{column.name} is taken for a feature; if it is the weight of each row in the loss, say weight: "
                f"{column.name} in a schema"
            )
    time, dated, why = find_time({c.name: c.texts for c in rest if c.name != weight and not c.is_list})
    reasons.append(why)
    dense, sparse = make_features([c for c in rest if c.name not in (weight, time, *dated)], reasons)
    reasons += [f"{name}: left out, dates, and not the timestamp" for name in dated if name != time]
    reasons += [f"{name}: {reason}" for name, reason in layout.unusable.items()]
    if not sparse:
        shown = " ".join(", ".join(layout.names[:20]).split())[:300]
        raise ConfigError(f"{paths[0]}: no categorical column among {shown}; write a schema that names one")
    return Schema(
        name=guess_name(paths[0]),
        label=label,
        dense=tuple(dense),
        sparse=tuple(sparse),
        weight=weight,
        timestamp=time,
        split=Split("time") if time else Split("random"),
        null_values=("", *nulls),
        decimal=decimal,
        reasons=tuple(" ".join(reason.split()) for reason in reasons),
        **layout.fields,
    )


def _sample(paths: tuple[str, ...], layout: Layout) -> list[Column]:
    """Every column's first values; those that can hardly be read become unusable."""
    names = [name for name in layout.names if name not in layout.unusable]
    if not names:
        raise ConfigError(f"{paths[0]} has no column that can be read; a column must hold values or lists of them")
    everything = _Everything("sample", Label(names[0]), sparse=tuple(Sparse(name) for name in names), **layout.fields)
    chunks = itertools.islice(open_log(paths, everything).chunks(Position()), 8)
    arrays: dict[str, list] = {name: [] for name in names}
    bad: list[BadRow] = []
    for chunk in chunks:
        parsed = chunk.parse()
        bad += parsed.bad
        for name in names:
            array = parsed.arrays[name]
            # Python's datetime has no nanoseconds.
            arrays[name] += (times.as_text(array) if times.is_temporal(array.type) else array).to_pylist()
        if len(arrays[names[0]]) >= SAMPLE_ROWS:
            break
    count = collections.Counter(row.column for row in bad if row.column)
    if count and max(count.values()) > MAX_WRONG_SHARE * (len(arrays[names[0]]) + len(bad)):
        worst = max(count, key=lambda name: count[name])
        reason = next(row.reason for row in bad if row.column == worst)
        layout.unusable[worst] = f"left out, {reason}, in {count[worst]:,} of the first rows"
        return _sample(paths, layout)
    return [make_column(name, values[:SAMPLE_ROWS]) for name, values in arrays.items()]
