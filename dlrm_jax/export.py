"""Export a trained model for serving: `python -m dlrm_jax.export --workdir=runs/quickstart --out=models/quickstart`."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from dlrm_jax.cli.commands import run_command
from dlrm_jax.cli.trained import open_stored
from dlrm_jax.config import ModelConfig, require
from dlrm_jax.data.schema.schema import HELD_OUT, SPLITS
from dlrm_jax.host import files, memory
from dlrm_jax.serving.artifact.export import MakeScore, by_engine, by_the_program, export_model
from dlrm_jax.serving.artifact.export_delta import differing, export_delta, fold
from dlrm_jax.serving.artifact.placed import engine_maker
from dlrm_jax.serving.artifact.quantise import TABLE_TYPES, stored_table
from dlrm_jax.serving.artifact.store import Version, open_version
from dlrm_jax.serving.artifact.written import pieces_of
from dlrm_jax.training.options import ShardingOptions
from dlrm_jax.training.reporting import format_table, json_ready

FLAGS = flags.FLAGS
_LARGEST_BATCH = 16384
_NEWEST = "newest"
_REMEDY = "--tables=bfloat16, int8 or int4, or a machine or an accelerator with more memory"


def define_flags() -> None:
    """Define this command's flags."""
    flags.DEFINE_string("workdir", "", "The workdir of a training run.")
    flags.DEFINE_string("out", None, "Directory of the model's versions; each export adds one.", required=True)
    flags.DEFINE_enum("tables", "float32", TABLE_TYPES, "How embedding rows are stored.")
    flags.DEFINE_string("checkpoint", "best", "best, latest, or a step number.")
    flags.DEFINE_string("data_dir", None, "Where the data is now, if it moved since training.")
    flags.DEFINE_bool("allow_oversubscription", False, memory.TRY_ANYWAY_HELP)
    flags.DEFINE_multi_enum("evaluate", list(HELD_OUT), SPLITS, "Splits that the exported model is evaluated on.")
    flags.DEFINE_string(
        "delta_from",
        "",
        "A version of --out, or newest: write only what is other than there, which a server writes into its memory.",
    )
    flags.DEFINE_float(
        "spare_rows",
        0.0,
        "Share of its rows that each table gets more, for values that deltas bring when the data grew; 0: none.",
    )
    flags.DEFINE_string(
        "fold",
        "",
        "In place of --workdir: a version, as models/m/7, or a directory of them for the newest; it is written whole, "
        "whatever deltas it comes of.",
    )


def main() -> None:
    """Open, export, say where and how good."""
    files.require_output_directory("out", pathlib.Path(FLAGS.out))
    require(0 <= FLAGS.spare_rows <= 10, f"--spare_rows={FLAGS.spare_rows:g}; give a share of the rows, from 0 to 10")
    require(bool(FLAGS.workdir) != bool(FLAGS.fold), "give either --workdir, of a training run, or --fold, a version")
    version = _folded() if FLAGS.fold else _exported()
    print(format_table(version.read_json("metrics.json")))
    shown = ("version", "name", "step", "tables", "table_bytes", "parent", "rows", "evaluated_on")
    facts = {key: version.manifest[key] for key in shown if key in version.manifest}
    print(json.dumps(json_ready(facts | {"directory": str(version.directory)})))


def _folded() -> Version:
    path = pathlib.Path(FLAGS.fold)
    given = [
        f"--{name}" for name in ("delta_from", "tables", "checkpoint", "data_dir", "spare_rows") if FLAGS[name].present
    ]
    require(not given, f"{' '.join(given[:1])} has no effect with --fold: a version is written as it is; leave it out")
    model_dir, number = (path.parent, int(path.name)) if path.name.isdecimal() else (path, None)
    return fold(open_version(model_dir, number), pathlib.Path(FLAGS.out))


def _exported() -> Version:
    out = pathlib.Path(FLAGS.out)
    parent = _parent(out) if FLAGS.delta_from else None
    run = open_stored(pathlib.Path(FLAGS.workdir), FLAGS.checkpoint, FLAGS.data_dir, FLAGS.allow_oversubscription)
    table = max(run.model.tables, key=lambda table: table.num_embeddings)
    largest = f"table {table.name!r} ({table.num_embeddings:,} rows of {table.embedding_dim})"
    kind = FLAGS.tables if parent is None else parent.manifest["tables"]
    common: dict[str, Any] = {
        "dataset": run.dataset,
        "facts": {"step": run.step},
        "evaluated": tuple(FLAGS.evaluate),
        "batch_stats": run.batch_stats,
    }
    pieces = pieces_of(run.model, run.rows)
    with memory.named(largest, _REMEDY):
        common["make_score"] = _make_score(run.model, largest, kind)
        if parent is None:
            common |= {"kind": kind, "spare_rows": FLAGS.spare_rows}
            return export_model(out, run.model, run.config.loss, run.dense_params, pieces, **common)
        rows_of = differing(pieces, kind)
        return export_delta(out, parent, run.model, run.config.loss, run.dense_params, rows_of, **common)


def _parent(out: pathlib.Path) -> Version:
    """The version of `out` that --delta_from names."""
    said = FLAGS.delta_from
    require(said == _NEWEST or said.isdecimal(), f"--delta_from={said} is no version; give its number, or {_NEWEST}")
    require(
        not FLAGS.spare_rows, "--spare_rows is for a whole version, whose deltas use them; leave it or --delta_from out"
    )
    parent = open_version(out, None if said == _NEWEST else int(said))
    kind = parent.manifest["tables"]
    require(
        not FLAGS["tables"].present or FLAGS.tables == kind,
        f"--tables={FLAGS.tables}: version {parent.number} has tables of {kind}, and so has what changes it; leave "
        "--tables out, or --delta_from",
    )
    return parent


def _make_score(model: ModelConfig, largest: str, kind: str) -> MakeScore:
    """The exported program on one device; several where only they hold the tables.

    ConfigError where neither does: what is exported is evaluated, and scored for who loads it to compare.
    """
    row = stored_table(np.zeros((1, model.embedding_dim), np.float32), kind).nbytes
    needed = sum(table.num_embeddings for table in model.tables) * (row + 4 * model.learned_pooling)
    device, oversubscribe = jax.devices()[0], FLAGS.allow_oversubscription
    on_host = device.platform == "cpu"
    free = memory.host_available() if on_host else memory.device_available(device)
    if not on_host and free is not None and needed > free and jax.device_count() > 1 and not oversubscribe:
        return by_engine(engine_maker(ShardingOptions(), _LARGEST_BATCH))
    where = "this machine's memory" if on_host else f"the memory of a {device.device_kind}"
    memory.require_room("evaluating what is exported", needed, free, where, largest, _REMEDY, oversubscribe)
    return by_the_program


def command() -> None:
    """The command, as a console script calls it too."""
    define_flags()
    run_command(main)


if __name__ == "__main__":
    command()
