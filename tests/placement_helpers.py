"""Placed states as tables by name, on the host: what placement must not change."""

import dataclasses
import types

import jax
import numpy as np
from jax.experimental import multihost_utils

from dlrm_jax.config import EMPTY_SLOT
from dlrm_jax.data.batch import Batch
from dlrm_jax.tables.exchange import stack_rule
from dlrm_jax.tables.forms import form_of
from dlrm_jax.tables.pooling import POOLING_WEIGHTS
from dlrm_jax.tables.rules import ROW


def slots_by_name(placed, states) -> dict[str, np.ndarray]:
    """Each slot of each table, by `<table>/<slot>`."""
    named = {}
    for stack in placed.stacks:
        for slot in stack_rule(placed.optimizer, stack).slots:
            form = form_of("data_parallel") if stack.form.splits_columns else stack.form
            narrow = {"width": 1, "dim": 1, "form": form}
            as_stored = dataclasses.replace(stack, **(narrow if slot.per == ROW else {}))
            holder = types.SimpleNamespace(stacks=[as_stored])
            arrays = by_name(holder, {stack.name: states[stack.name][slot.name]})
            named |= {f"{table}/{slot.name}": array for table, array in arrays.items()}
    return named


def by_name(placed, arrays) -> dict[str, np.ndarray]:
    """Each table's logical (rows, D) array, and its learned weights, from how they are stored. Slow and plain."""
    named = {}
    for stack in placed.stacks:
        everything = rows_and_columns(stack, whole(arrays[stack.name]), stack.width)
        for t, table in enumerate(stack.tables):
            rows = everything[row_numbers(stack, t)][:, : stack.dim]
            of_slots = rows.dtype != stack.dtype.stored
            named[table.name] = rows if of_slots else stack.dtype.numbers(np.ascontiguousarray(rows))
        if stack.name + POOLING_WEIGHTS in arrays:
            column = one_a_row(stack, whole(arrays[stack.name + POOLING_WEIGHTS]))
            for t, table in enumerate(stack.tables):
                named[table.name + POOLING_WEIGHTS] = column[row_numbers(stack, t)]
    return named


def one_a_row(stack, array: np.ndarray) -> np.ndarray:
    """(all shards' rows, 1) of an array that holds one number a row."""
    parts = np.split(array, stack.row_shards)
    return np.concatenate([part.reshape(-1)[: stack.rows] for part in parts])[:, None]


def store(placed, named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `by_name`."""
    arrays = {}
    for stack in placed.stacks:
        shards, columns = stack.row_shards, stack.column_shards * stack.width
        everything = np.zeros((shards * stack.rows, columns), named[stack.tables[0].name].dtype)
        weights = np.zeros((shards, stack.row_shape()[0] * stack.row_shape()[1] // shards), everything.dtype)
        for t, table in enumerate(stack.tables):
            rows = row_numbers(stack, t)
            everything[rows, : stack.dim] = named[table.name]
            if table.name + POOLING_WEIGHTS in named:
                weights[rows // stack.rows, rows % stack.rows] = named[table.name + POOLING_WEIGHTS][:, 0]
        parts = np.split(everything, columns // stack.width, axis=1)
        arrays[stack.name] = np.concatenate([part.reshape(-1, stack.local_shape[1]) for part in parts], axis=1)
        if stack.tables[0].name + POOLING_WEIGHTS in named:
            arrays[stack.name + POOLING_WEIGHTS] = weights.reshape(stack.row_shape())
    return arrays


def whole(array) -> np.ndarray:
    """A global array on the host, whichever processes hold it."""
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


def local(batch: Batch) -> Batch:
    """This process's rows."""
    return jax.tree.map(lambda x: np.split(x, jax.process_count())[jax.process_index()], batch)


def rows_and_columns(stack, array: np.ndarray, width: int) -> np.ndarray:
    """(all shards' rows, all columns), lines unpacked."""
    parts = np.split(array, stack.column_shards, axis=1)
    return np.concatenate([part.reshape(-1, width) for part in parts], axis=1)


def row_numbers(stack, t: int) -> np.ndarray:
    """Where each row of table `t` is in the stored rows."""
    return np.array(
        [
            (stack.first_T[t] + row % stack.count_T[t]) * (stack.rows if stack.form.splits_rows else 0)
            + stack.offset_T[t]
            + row // stack.count_T[t]
            for row in range(stack.tables[t].num_embeddings)
        ]
    )


def pad(batch: Batch, multiple: int) -> Batch:
    """The batch with rows of weight 0 behind, up to a multiple."""
    size = len(batch.label_B)
    missing = -size % multiple

    def more(column, filler):
        return None if column is None else np.concatenate([column, np.full((missing, *column.shape[1:]), filler)])

    padded = Batch(
        dense_BxN=more(batch.dense_BxN, 0),
        ids_BxK=more(batch.ids_BxK, EMPTY_SLOT),
        label_B=more(batch.label_B, 0),
        weight_B=more(batch.weight_B, 0),
        id_weights_BxK=more(batch.id_weights_BxK, 0),
    )
    kinds = ("float32", "int32", "float32", "float32", "float32")
    names = ("dense_BxN", "ids_BxK", "label_B", "weight_B", "id_weights_BxK")
    return Batch(
        **{
            name: None if getattr(padded, name) is None else getattr(padded, name).astype(kind)
            for name, kind in zip(names, kinds, strict=True)
        }
    )


def largest(arrays: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(array).max()) for array in arrays.values())


def difference(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """The largest difference of any weight over the largest weight."""
    assert got.keys() == want.keys()
    return max(float(np.abs(got[name] - want[name]).max()) for name in want) / largest(want)
