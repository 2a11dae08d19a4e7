"""Tables of one device by their names, and back to how they are stored."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import ModelConfig
from dlrm_jax.tables.layout import local_stacks
from dlrm_jax.tables.pooling import POOLING_WEIGHTS


def named_tables(model: ModelConfig, tables: dict[str, jax.Array]) -> Iterator[tuple[str, jax.Array]]:
    """(table name, its (rows, D) part) for every table; pooling weights as `<table name>/pooling_weights`."""
    for stack in local_stacks(model):
        for table, first_row in zip(stack.tables, stack.offset_T, strict=True):
            rows = slice(first_row, first_row + table.num_embeddings)
            yield table.name, stack.dtype.numbers(tables[stack.name][rows])
            if model.learned_pooling:
                yield table.name + POOLING_WEIGHTS, tables[stack.name + POOLING_WEIGHTS][rows]


def stack_tables(model: ModelConfig, named: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The inverse of `named_tables`: arrays by table name to the stored form, with rows of padding behind."""
    arrays = {}
    for stack in local_stacks(model):
        for suffix, filler in (("", 0), (POOLING_WEIGHTS, 1)) if model.learned_pooling else (("", 0),):
            rows = jnp.concatenate([jnp.asarray(named[table.name + suffix], "float32") for table in stack.tables])
            rows = jnp.pad(rows, ((0, stack.rows - len(rows)), (0, 0)), constant_values=filler)
            arrays[stack.name + suffix] = rows if suffix else stack.dtype.from_floats(rows)
    return arrays
