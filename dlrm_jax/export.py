"""Export a trained model for serving: `python -m dlrm_jax.export --workdir=runs/quickstart --out=models/quickstart`."""

import json
import pathlib

from absl import flags

from dlrm_jax.api.exporting import export, parent_of
from dlrm_jax.api.trained import open_stored
from dlrm_jax.cli.commands import run_command
from dlrm_jax.config import require
from dlrm_jax.data.schema.schema import HELD_OUT, SPLITS
from dlrm_jax.host import files, memory
from dlrm_jax.serving.artifact.export_delta import fold
from dlrm_jax.serving.artifact.quantise import TABLE_TYPES
from dlrm_jax.serving.artifact.store import Version, open_version
from dlrm_jax.training.publish_options import SPARE_ROWS
from dlrm_jax.training.reporting import format_table, json_ready

FLAGS = flags.FLAGS
_OF_A_WORKDIR = ("delta_from", "tables", "checkpoint", "data_dir", "spare_rows", "int8_layers")


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
    flags.DEFINE_float("spare_rows", 0.0, SPARE_ROWS)
    flags.DEFINE_bool(
        "int8_layers",
        False,
        "Measure what int8 layers of the C++ scorer change, so that dlrm_jax.serve --kernels=native_int8 may use them; "
        "refused where they move the AUC of a split of --evaluate by more than 1e-4. It needs a CPU and a C++ "
        "compiler.",
    )
    flags.DEFINE_string(
        "fold",
        "",
        "In place of --workdir: a version, as models/m/7, or a directory of them for the newest; it is written whole, "
        "whatever deltas it comes of.",
    )


def main() -> None:
    """Open, export, say where and how good."""
    out = pathlib.Path(FLAGS.out)
    files.require_output_directory("out", out)  # Before the work.
    require(bool(FLAGS.workdir) != bool(FLAGS.fold), "give either --workdir, of a training run, or --fold, a version")
    version = _folded(out) if FLAGS.fold else _exported(out)
    print(format_table(version.read_json("metrics.json")))
    shown = ("version", "name", "step", "tables", "table_bytes", "parent", "rows", "evaluated_on", "int8_layers")
    facts = {key: version.manifest[key] for key in shown if key in version.manifest}
    print(json.dumps(json_ready(facts | {"directory": str(version.directory)})))


def _exported(out: pathlib.Path) -> Version:
    tables = FLAGS.tables if FLAGS["tables"].present else None
    parent_of(out, FLAGS.delta_from, tables, FLAGS.spare_rows)  # What cannot be is said before the run is opened.
    run = open_stored(pathlib.Path(FLAGS.workdir), FLAGS.checkpoint, FLAGS.data_dir, FLAGS.allow_oversubscription)
    return export(run, out, tables, FLAGS.evaluate, FLAGS.delta_from, FLAGS.spare_rows, FLAGS.int8_layers)


def _folded(out: pathlib.Path) -> Version:
    path = pathlib.Path(FLAGS.fold)
    given = [f"--{name}" for name in _OF_A_WORKDIR if FLAGS[name].present]
    require(not given, f"{' '.join(given[:1])} has no effect with --fold: a version is written as it is; leave it out")
    model_dir, number = (path.parent, int(path.name)) if path.name.isdecimal() else (path, None)
    return fold(open_version(model_dir, number), out)


def command() -> None:
    """The command, as a console script calls it too."""
    define_flags()
    run_command(main)


if __name__ == "__main__":
    command()
