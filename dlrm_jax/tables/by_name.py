"""Tables of one device by their names, and back to how they are stored."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import ModelConfig
from dlrm_jax.tables.layout import POOLING_WEIGHTS, local_stacks
from dlrm_jax.tables.rows import as_stored


def named_tables(model: ModelConfig, tables: dict[str, jax.Array]) -> Iterator[tuple[str, jax.Array]]:
    """(table name, its (rows, D) part) for every table; pooling weights as `<table name>/pooling_weights`."""
    for stack in local_stacks(model):
        for table, first_row in zip(stack.tables, stack.offset_T, strict=True):
            rows = slice(first_row, first_row + table.num_embeddings)
            found = tables[stack.name][rows]
            yield table.name, found.view(jnp.bfloat16) if stack.dtype == "bfloat16" else found
            if model.learned_pooling:
                yield table.name + POOLING_WEIGHTS, tables[stack.name + POOLING_WEIGHTS][rows]


def stack_tables(model: ModelConfig, named: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The inverse of `named_tables`: arrays by table name to the stored form, with rows of padding behind."""
    arrays = {}
    for stack in local_stacks(model):
        for suffix, filler in (("", 0), (POOLING_WEIGHTS, 1)) if model.learned_pooling else (("", 0),):
            dtype = "float32" if suffix else stack.dtype
            rows = jnp.concatenate([jnp.asarray(named[table.name + suffix], dtype) for table in stack.tables])
            padding = ((0, stack.rows - len(rows)), (0, 0))
            arrays[stack.name + suffix] = as_stored(jnp.pad(rows, padding, constant_values=filler))
    return arrays
