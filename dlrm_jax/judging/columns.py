"""Columns of a split as one value a row, for groups and slices: ids, shown as the log's values, and numbers."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from dlrm_jax.config import ConfigError
from dlrm_jax.data.read.dataset import Dataset, Rows
from dlrm_jax.data.read.prepared import is_prepared, read_json
from dlrm_jax.data.read.raw_values import texts_of
from dlrm_jax.data.schema.schema_io import from_dict
from dlrm_jax.data.values.dense import in_log

EMPTY = "(empty)"
_BUCKETS = 10
"""Of a number with many values, each with as many rows as the others."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of `Dataset` by name. Of a bag the first id that is there counts, -1 where none is."""

    name: str
    value_R: np.ndarray
    """int32 ids of `table`, or float32 numbers as the model gets them."""
    table: str | None


def slots_of(dataset: Dataset) -> dict[str, slice]:
    """The slots of each feature in `ids_RxK` as they are read: one each where the bags are made later."""
    slots, start = {}, 0
    for feature in dataset.features:
        hotness = 1 if dataset.expander is not None else feature.hotness
        slots[feature.name] = slice(start, start + hotness)
        start += hotness
    return slots


def known_columns(dataset: Dataset) -> dict[str, str | None]:
    """Names of the columns that can be asked for, and the table of those that are ids."""
    numbers = {} if dataset.dense_names == ("constant",) else dict.fromkeys(dataset.dense_names)
    return {feature.name: feature.table for feature in dataset.features} | numbers


def require_columns(dataset: Dataset, asked: Mapping[str, Iterable[str]]) -> None:
    """ConfigError for a column, asked for by a flag, that the dataset does not have."""
    known = known_columns(dataset)
    for flag, names in asked.items():
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"--{flag}={name}: {dataset.name} has no column {name!r}, it has {', '.join(known)}; others can be "
                    "had from the same log, prepared with them: --columns_from=DIR"
                )


def read_columns(dataset: Dataset, split: Rows, names: Iterable[str]) -> dict[str, Column]:
    """Some columns of every row of a split, in its order."""
    slots, known = slots_of(dataset), known_columns(dataset)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for window, order in split.windows(0, 0, shuffle=False):
        for name, held in parts.items():
            if known[name] is None:
                held.append(window.dense_RxN[order, dataset.dense_names.index(name)])
            else:
                held.append(_first_ids(window.ids_RxK[order, slots[name]]))
    return {name: Column(name, np.concatenate(held), known[name]) for name, held in parts.items()}


def _first_ids(bag_Rxh: np.ndarray) -> np.ndarray:
    first_R = (bag_Rxh >= 0).argmax(axis=1)
    return np.take_along_axis(bag_Rxh, first_R[:, None], axis=1)[:, 0]


def group_numbers(column: Column) -> tuple[np.ndarray, int]:
    """(number of each row's group, how many there are): rows of one value are a group."""
    values, number_R = np.unique(column.value_R, return_inverse=True)
    return number_R, len(values)


@dataclasses.dataclass(frozen=True)
class Slices:
    """`number_R`, the slice of each row, and what each slice holds, in words."""

    name: str
    number_R: np.ndarray
    texts: tuple[str, ...]


def slices_of(column: Column, at_most: int, dataset: Dataset, data_dir: str) -> Slices:
    """The slices of a column, at most `at_most`.

    Ids: the most frequent values, the others together in the last. Numbers: each value, or where these are too many
    buckets by quantiles.
    """
    if column.table is None:
        return _number_slices(column, at_most, dataset)
    values, number_R, counts = np.unique(column.value_R, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    place = np.empty(len(order), np.intp)
    place[order] = np.arange(len(order))
    shown = len(order) if len(order) <= at_most else at_most - 1
    texts = _id_texts(values[order[:shown]], column.table, dataset, data_dir)
    if shown < len(order):
        texts.append(f"({len(order) - shown:,} other values)")
    return Slices(column.name, np.minimum(place[number_R], shown), tuple(texts))


def _id_texts(ids: np.ndarray, table: str, dataset: Dataset, data_dir: str) -> list[str]:
    there = [int(i) for i in ids if i >= 0]
    if dataset.schema is not None and data_dir and is_prepared(pathlib.Path(data_dir)):
        schema = from_dict(dict(dataset.schema))
        texts = dict(zip(there, texts_of(pathlib.Path(data_dir), schema, table, np.array(there, int)), strict=True))
    else:
        texts = {i: str(i) for i in there}
    return [texts.get(int(i), EMPTY) for i in ids]


def _number_slices(column: Column, at_most: int, dataset: Dataset) -> Slices:
    values, number_R = np.unique(column.value_R, return_inverse=True)
    if len(values) <= at_most:
        name, shown = _as_in_log(column.name, values, dataset)
        return Slices(name, number_R, tuple(f"{value:g}" for value in shown))
    wanted = np.quantile(column.value_R, np.linspace(0, 1, min(at_most, _BUCKETS) + 1))
    edges = np.unique(wanted.astype(np.float32))
    number_R = np.searchsorted(edges[1:-1], column.value_R, side="right")
    used, number_R = np.unique(number_R, return_inverse=True)
    last = len(edges) - 2
    name, shown = _as_in_log(column.name, edges, dataset)
    texts = [f"{shown[i]:g} to {'' if i == last else 'below '}{shown[i + 1]:g}" for i in used]
    return Slices(name, number_R, tuple(texts))


def _as_in_log(name: str, values: np.ndarray, dataset: Dataset) -> tuple[str, np.ndarray]:
    """(the column's name, its numbers as the log has them); with the transform's name where they stay as they are."""
    columns = from_dict(dict(dataset.schema)).dense if dataset.schema is not None else ()
    transforms = {dense.name: dense.transform for dense in columns}
    if name not in transforms:
        return name, values
    statistics = {} if dataset.directory is None else read_json(dataset.directory / "statistics.json").get("dense", {})
    try:
        return name, in_log(columns, name, values.astype(np.float64), statistics)
    except KeyError:
        return f"{name} ({transforms[name]})", values
