"""Rows to spare: an export may have more rows than its tables, for values that deltas bring (`export --spare_rows`).

A served program has fixed shapes. With rows to spare, a vocabulary that grew since needs no whole version: new values
take them, in the order of their ids. No id means such a row before: a request for one is refused as it was.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np

from dlrm_jax.config import ModelConfig
from dlrm_jax.serving.artifact.signature import Signature
from dlrm_jax.serving.artifact.written import Pieces, table_of
from dlrm_jax.tables.pooling import POOLING_WEIGHTS

_PIECE_ROWS = 1 << 16


def room_for(model: ModelConfig, share: float) -> dict[str, int]:
    """Rows to spare by table, `share` of its rows, of those whose rows are the ids of their features."""
    mapped = {part.table for feature in model.features for part in feature.parts}
    mapped |= {feature.table for feature in model.features if feature.num_ids}
    rooms = {t.name: math.ceil(t.num_embeddings * share) for t in model.tables if t.name not in mapped}
    return {name: rows for name, rows in rooms.items() if rows}


def room_left(model: ModelConfig, stored: ModelConfig) -> dict[str, int]:
    """What is left to spare where tables of these rows lie in those of another model; may be negative."""
    sizes = {table.name: table.num_embeddings for table in stored.tables}
    rooms = {table.name: sizes.get(table.name, 0) - table.num_embeddings for table in model.tables}
    return {name: rows for name, rows in rooms.items() if rows}


def with_room(model: ModelConfig, spare: Mapping[str, int]) -> ModelConfig:
    """The model whose tables have these rows more."""
    tables = tuple(
        dataclasses.replace(table, num_embeddings=table.num_embeddings + spare.get(table.name, 0))
        for table in model.tables
    )
    return dataclasses.replace(model, tables=tables)


def without_room(model: ModelConfig, signature: Signature) -> ModelConfig:
    """The inverse, of a version's model."""
    return with_room(model, {name: -rows for name, rows in (signature.spare or {}).items()})


def padded(model: ModelConfig, pieces: Pieces, spare: Mapping[str, int]) -> Pieces:
    """The rows of a model's tables, and behind them zeros to spare."""

    def zeros(name: str) -> Iterator[np.ndarray]:
        more, width = spare.get(name.removesuffix(POOLING_WEIGHTS), 0), table_of(model, name)[2]
        for first in range(0, more, _PIECE_ROWS):
            yield np.zeros((min(_PIECE_ROWS, more - first), width), np.float32)

    return lambda name: itertools.chain(pieces(name), zeros(name))
