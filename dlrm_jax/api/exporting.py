"""A run's checkpoint to a version of an exported model."""

import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from dlrm_jax.api.trained import Stored
from dlrm_jax.config import ModelConfig
from dlrm_jax.data.schema.schema import HELD_OUT
from dlrm_jax.host import files, memory
from dlrm_jax.serving.artifact.export import export_model
from dlrm_jax.serving.artifact.loaded import MakeEngine
from dlrm_jax.serving.artifact.placed import engine_maker
from dlrm_jax.serving.artifact.quantise import stored_table
from dlrm_jax.serving.artifact.store import Version
from dlrm_jax.tables import reshard
from dlrm_jax.tables.dtypes import table_dtype
from dlrm_jax.tables.pooling import POOLING_WEIGHTS
from dlrm_jax.training.options import ShardingOptions

_PIECE_FLOATS = 2**22
"""Floats of a table that are read, quantised and written at a time."""
_LARGEST_BATCH = 16384
_REMEDY = "--tables=bfloat16, int8 or int4, or a machine or an accelerator with more memory"


def export(run: Stored, out: pathlib.Path, tables: str = "float32", evaluate: Sequence[str] = HELD_OUT) -> Version:
    """Write the next version of the model in `out`, its rows stored as `tables` says, and score it on some splits."""
    files.require_output_directory("out", out)
    table = max(run.model.tables, key=lambda table: table.num_embeddings)
    largest = f"table {table.name!r} ({table.num_embeddings:,} rows of {table.embedding_dim})"
    with memory.named(largest, _REMEDY):
        return export_model(
            out,
            run.model,
            run.config.loss,
            run.dense_params,
            lambda name: pieces(run, name),
            run.dataset,
            kind=tables,
            facts={"step": run.step},
            evaluated=tuple(evaluate),
            make_engine=_engine(run.model, tables, largest, run.config.allow_oversubscription),
            batch_stats=run.batch_stats,
        )


def pieces(run: Stored, name: str, first: int = 0, count: int | None = None) -> Iterator[np.ndarray]:
    """`count` rows of a table, or of its pooling weights, from the checkpoint, from row `first` on; all by default."""
    of_weights = name.endswith(POOLING_WEIGHTS)
    table = run.model.table(name.removesuffix(POOLING_WEIGHTS))
    kind = reshard.Kind("tables", of_weights, per_row=of_weights)
    piece = max(1, _PIECE_FLOATS // (1 if of_weights else table.embedding_dim))
    end = table.num_embeddings if count is None else first + count
    for start in range(first, end, piece):
        rows = run.rows.rows(kind, table.name, start, 1, min(piece, end - start))
        yield rows if of_weights else np.asarray(table_dtype(table.dtype).numbers(rows))


def _engine(model: ModelConfig, tables: str, largest: str, oversubscribe: bool) -> MakeEngine | None:
    """None where the exported program scores on one device; several where only they hold the tables.

    ConfigError where neither does: what is exported is evaluated, and scored for who loads it to compare.
    """
    row = stored_table(np.zeros((1, model.embedding_dim), np.float32), tables).nbytes
    needed = sum(table.num_embeddings for table in model.tables) * (row + 4 * model.learned_pooling)
    device = jax.devices()[0]
    on_host = device.platform == "cpu"
    free = memory.host_available() if on_host else memory.device_available(device)
    if not on_host and free is not None and needed > free and jax.device_count() > 1 and not oversubscribe:
        return engine_maker(ShardingOptions(), _LARGEST_BATCH)
    where = "this machine's memory" if on_host else f"the memory of a {device.device_kind}"
    memory.require_room("evaluating what is exported", needed, free, where, largest, _REMEDY, oversubscribe)
    return None
