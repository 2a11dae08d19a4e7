"""Probabilities of a few rows as a version will score them, before it is one: of rows of tables that lie elsewhere.

A version's own program reads all of its tables, which a training that publishes has no second time in memory. Here only
the rows that are looked up are read, stored and read back as the version stores them, and pooled by NumPy; the rest is
the model itself.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlrm_jax.config import LossConfig, ModelConfig
from dlrm_jax.data.batch import Batch
from dlrm_jax.model.dlrm import DLRM
from dlrm_jax.model.loss import probability
from dlrm_jax.serving.artifact.quantise import BITS, dequantise_rows
from dlrm_jax.serving.artifact.written import floats_of, stored_as, stored_rows, table_of
from dlrm_jax.tables.forms.bags import slot_scale
from dlrm_jax.tables.id_maps import row_numbers
from dlrm_jax.tables.pooling import POOLING_WEIGHTS
from dlrm_jax.tables.reshard import Source

RowsAt = Callable[[str, np.ndarray], np.ndarray]
"""(a table, or `<table>/pooling_weights`; row_M) -> these rows."""


def floats_at(model: ModelConfig, rows: Source) -> RowsAt:
    """float32 rows of a model in training."""

    def at(name: str, row_M: np.ndarray) -> np.ndarray:
        table, kind, _ = table_of(model, name)
        return floats_of(table, kind, rows.at(kind, table.name, row_M))

    return at


def live_score(
    model: ModelConfig, loss: LossConfig, kind: str, params: Any, rows_at: RowsAt, batch: Batch
) -> tuple[np.ndarray, np.ndarray]:
    """(probability_B, logit_B) of a batch, tables stored as `kind`; `model` and `params` have no batch norm."""
    ids_BxK = np.asarray(batch.ids_BxK)
    scale = slot_scale(model, jnp.asarray(ids_BxK), None)
    scale_BxK = (ids_BxK >= 0).astype(np.float32) if scale is None else np.asarray(scale)
    starts = np.cumsum([0, *(feature.hotness for feature in model.features)])
    pooled: dict[int, list[np.ndarray]] = {dim: [] for dim in model.dims}
    for one in model.lookups:
        table, slots = model.table(one.part.table), slice(starts[one.feature], starts[one.feature + 1])
        rows_Bxh = np.maximum(row_numbers(one.part, table.num_embeddings, ids_BxK[:, slots]), 0)
        row_M, place = np.unique(rows_Bxh, return_inverse=True)
        place_Bxh, weight_Bxh = place.reshape(rows_Bxh.shape), scale_BxK[:, slots]
        if model.learned_pooling:
            weight_Bxh = weight_Bxh * rows_at(table.name + POOLING_WEIGHTS, row_M)[place_Bxh][..., 0]
        vectors_MxD = _served(table.name, rows_at(table.name, row_M), kind)
        pooled[table.embedding_dim].append((vectors_MxD[place_Bxh] * weight_Bxh[..., None]).sum(axis=1))
    arrays = tuple(np.stack(of_dim, axis=1) for of_dim in pooled.values())
    scored = _head(model, loss.threshold)(params, batch.dense_BxN, arrays[0] if len(arrays) == 1 else arrays)
    probability_B, logit_B = map(np.array, scored)
    return probability_B, logit_B


def _served(name: str, rows_MxD: np.ndarray, kind: str) -> np.ndarray:
    (stored,) = stored_rows(name, [rows_MxD], stored_as(name, kind))
    if kind in BITS:
        return np.asarray(dequantise_rows(jnp.asarray(stored), BITS[kind], rows_MxD.shape[1]))
    return stored.astype(np.float32)


@functools.lru_cache(maxsize=4)
def _head(model: ModelConfig, threshold: float) -> Any:
    """The model above its tables, compiled."""

    def score(params: Any, dense_BxN: jax.Array, pooled: Any) -> tuple[jax.Array, jax.Array]:
        logit_B = DLRM(model).apply({"params": params}, dense_BxN, pooled)
        return probability(logit_B, threshold), logit_B

    return jax.jit(score)
