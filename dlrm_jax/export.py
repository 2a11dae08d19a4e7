"""Export a trained model for serving: `python -m dlrm_jax.export --workdir=runs/quickstart --out=models/quickstart`."""

import json
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags

from dlrm_jax.cli.commands import run_command
from dlrm_jax.cli.trained import Stored, open_stored
from dlrm_jax.config import ModelConfig
from dlrm_jax.data.schema.schema import HELD_OUT, SPLITS
from dlrm_jax.host import files, memory
from dlrm_jax.serving.artifact.export import export_model
from dlrm_jax.serving.artifact.loaded import MakeEngine
from dlrm_jax.serving.artifact.placed import engine_maker
from dlrm_jax.serving.artifact.quantise import TABLE_TYPES, stored_table
from dlrm_jax.tables import reshard
from dlrm_jax.tables.dtypes import table_dtype
from dlrm_jax.tables.pooling import POOLING_WEIGHTS
from dlrm_jax.training.options import ShardingOptions
from dlrm_jax.training.reporting import format_table, json_ready

FLAGS = flags.FLAGS
_PIECE_FLOATS = 2**22
"""Floats of a table that are read, quantised and written at a time."""
_LARGEST_BATCH = 16384
_REMEDY = "--tables=bfloat16, int8 or int4, or a machine or an accelerator with more memory"


def define_flags() -> None:
    """Define this command's flags."""
    flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
    flags.DEFINE_string("out", None, "Directory of the model's versions; each export adds one.", required=True)
    flags.DEFINE_enum("tables", "float32", TABLE_TYPES, "How embedding rows are stored.")
    flags.DEFINE_string("checkpoint", "best", "best, latest, or a step number.")
    flags.DEFINE_string("data_dir", None, "Where the data is now, if it moved since training.")
    flags.DEFINE_bool("allow_oversubscription", False, memory.TRY_ANYWAY_HELP)
    flags.DEFINE_multi_enum("evaluate", list(HELD_OUT), SPLITS, "Splits that the exported model is evaluated on.")


def main() -> None:
    """Open, export, say where and how good."""
    files.require_output_directory("out", pathlib.Path(FLAGS.out))
    run = open_stored(pathlib.Path(FLAGS.workdir), FLAGS.checkpoint, FLAGS.data_dir, FLAGS.allow_oversubscription)
    table = max(run.model.tables, key=lambda table: table.num_embeddings)
    largest = f"table {table.name!r} ({table.num_embeddings:,} rows of {table.embedding_dim})"
    with memory.named(largest, _REMEDY):
        version = export_model(
            pathlib.Path(FLAGS.out),
            run.model,
            run.config.loss,
            run.dense_params,
            lambda name: _pieces(run, name),
            run.dataset,
            kind=FLAGS.tables,
            facts={"step": run.step},
            evaluated=tuple(FLAGS.evaluate),
            make_engine=_engine(run.model, largest),
            batch_stats=run.batch_stats,
        )
    metrics = version.read_json("metrics.json")
    print(format_table(metrics))
    shown = ("version", "name", "step", "tables", "table_bytes", "evaluated_on")
    facts = {key: version.manifest[key] for key in shown}
    print(json.dumps(json_ready(facts | {"directory": str(version.directory)})))


def _pieces(run: Stored, name: str) -> Iterator[np.ndarray]:
    """The rows of a table, or of its pooling weights, from the checkpoint."""
    of_weights = name.endswith(POOLING_WEIGHTS)
    table = run.model.table(name.removesuffix(POOLING_WEIGHTS))
    kind = reshard.Kind("tables", of_weights, per_row=of_weights)
    piece = max(1, _PIECE_FLOATS // (1 if of_weights else table.embedding_dim))
    for first in range(0, table.num_embeddings, piece):
        rows = run.rows.rows(kind, table.name, first, 1, min(piece, table.num_embeddings - first))
        yield rows if of_weights else np.asarray(table_dtype(table.dtype).numbers(rows))


def _engine(model: ModelConfig, largest: str) -> MakeEngine | None:
    """None where the exported program scores on one device; several where only they hold the tables.

    ConfigError where neither does: what is exported is evaluated, and scored for who loads it to compare.
    """
    row = stored_table(np.zeros((1, model.embedding_dim), np.float32), FLAGS.tables).nbytes
    needed = sum(table.num_embeddings for table in model.tables) * (row + 4 * model.learned_pooling)
    device, oversubscribe = jax.devices()[0], FLAGS.allow_oversubscription
    on_host = device.platform == "cpu"
    free = memory.host_available() if on_host else memory.device_available(device)
    if not on_host and free is not None and needed > free and jax.device_count() > 1 and not oversubscribe:
        return engine_maker(ShardingOptions(), _LARGEST_BATCH)
    where = "this machine's memory" if on_host else f"the memory of a {device.device_kind}"
    memory.require_room("evaluating what is exported", needed, free, where, largest, _REMEDY, oversubscribe)
    return None


def command() -> None:
    """The command, as a console script calls it too."""
    define_flags()
    run_command(main)


if __name__ == "__main__":
    command()
