"""Export a trained model for serving: `python -m dlrm_jax.export --workdir=runs/quickstart --out=models/quickstart`."""

import json
import pathlib

from absl import flags

from dlrm_jax import files
from dlrm_jax.commands import run_command
from dlrm_jax.config import ConfigError
from dlrm_jax.data.dataset import SPLITS
from dlrm_jax.embedding import named_tables
from dlrm_jax.reporting import format_table, json_ready
from dlrm_jax.serving.export import export_model
from dlrm_jax.serving.quantise import TABLE_TYPES
from dlrm_jax.trained import restore

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define this command's flags."""
    flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
    flags.DEFINE_string("out", None, "Directory of the model's versions; each export adds one.", required=True)
    flags.DEFINE_enum("tables", "float32", TABLE_TYPES, "How embedding rows are stored.")
    flags.DEFINE_string("checkpoint", "best", "best, latest, or a step number.")
    flags.DEFINE_string("data_dir", None, "Where the data is now, if it moved since training.")
    flags.DEFINE_multi_enum("evaluate", ["val", "test"], SPLITS, "Splits that the exported model is evaluated on.")


def main() -> None:
    """Restore, export, say where and how good."""
    import numpy as np

    files.require_output_directory("out", pathlib.Path(FLAGS.out))
    run = restore(pathlib.Path(FLAGS.workdir), FLAGS.checkpoint, FLAGS.data_dir, one_device=True)
    tables = {name: np.asarray(rows) for name, rows in named_tables(run.model, run.state.tables)}
    for name, rows in tables.items():
        if not np.isfinite(rows).all():
            raise ConfigError(f"table {name!r} holds NaN or infinity; export another --checkpoint")
    version = export_model(
        pathlib.Path(FLAGS.out),
        run.model,
        run.config.loss,
        run.state.dense_params,
        tables,
        run.dataset,
        kind=FLAGS.tables,
        data_dir=pathlib.Path(run.config.data.data_dir) if run.config.data.data_dir else None,
        facts={"step": int(run.state.step)},
        evaluated=tuple(FLAGS.evaluate),
    )
    metrics = version.read_json("metrics.json")
    print(format_table(metrics))
    facts = {key: version.manifest[key] for key in ("version", "name", "step", "tables", "table_bytes")}
    print(json.dumps(json_ready(facts | {"directory": str(version.directory)})))


if __name__ == "__main__":
    define_flags()
    run_command(main)
