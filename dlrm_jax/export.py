"""Export a trained model for serving: `python -m dlrm_jax.export --workdir=runs/quickstart --out=models/quickstart`."""

import json
import pathlib

from absl import flags

from dlrm_jax.api.exporting import export
from dlrm_jax.api.trained import open_stored
from dlrm_jax.cli.commands import run_command
from dlrm_jax.data.schema.schema import HELD_OUT, SPLITS
from dlrm_jax.host import files, memory
from dlrm_jax.serving.artifact.quantise import TABLE_TYPES
from dlrm_jax.training.reporting import format_table, json_ready

FLAGS = flags.FLAGS


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
    files.require_output_directory("out", pathlib.Path(FLAGS.out))  # Before the work.
    run = open_stored(pathlib.Path(FLAGS.workdir), FLAGS.checkpoint, FLAGS.data_dir, FLAGS.allow_oversubscription)
    version = export(run, pathlib.Path(FLAGS.out), FLAGS.tables, FLAGS.evaluate)
    print(format_table(version.read_json("metrics.json")))
    shown = ("version", "name", "step", "tables", "table_bytes", "evaluated_on")
    facts = {key: version.manifest[key] for key in shown}
    print(json.dumps(json_ready(facts | {"directory": str(version.directory)})))


def command() -> None:
    """The command, as a console script calls it too."""
    define_flags()
    run_command(main)


if __name__ == "__main__":
    command()
