"""Prepare a click log for training: `python -m dlrm_jax.prepare --input='day_*.gz' --output=data/x --schema=infer`."""

import os
import pathlib
import sys

from absl import flags

from dlrm_jax.api.preparing import Prepared, prepare
from dlrm_jax.cli import commands
from dlrm_jax.config import ConfigError
from dlrm_jax.data.prepare.blocks import COMPRESSIONS
from dlrm_jax.data.prepare.preparation import BAD_ROW_POLICIES
from dlrm_jax.data.schema.presets import PRESETS

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define this command's flags."""
    presets = "; ".join(f"{name}: {text}" for name, (text, _) in PRESETS.items())
    flags.DEFINE_string(
        "input",
        "",
        "Files or globs, separated by commas; a name that is there is taken as it is. Plain, gzip, zstd or bz2.",
    )
    flags.DEFINE_string("output", "", "The new dataset's directory; the same command goes on in it after a stop.")
    flags.DEFINE_string(
        "schema",
        "infer",
        f"A YAML or JSON file; infer, which guesses and writes OUTPUT/schema.yaml with its reasons; or {presets}.",
    )
    flags.DEFINE_enum(
        "on_bad_row", "error", BAD_ROW_POLICIES, "A row that cannot be used ends the run, or is left out and counted."
    )
    flags.DEFINE_string("max_memory", "", "Upper limit for memory, as 4GB; the run ends clearly before it goes beyond.")
    flags.DEFINE_enum("compression", "none", COMPRESSIONS, "Of the records: zstd halves the disk, none reads faster.")
    flags.DEFINE_string(
        "extend",
        "",
        "A finished dataset: OUTPUT is it and the rows of --input, known values keep their ids, its files are linked.",
    )
    flags.DEFINE_bool("refit", False, "With --extend: fit transforms to all days for the new rows, and for serving.")
    flags.DEFINE_string("describe", "", "Show the statistics of this prepared dataset as a table and pictures instead.")


def main() -> None:
    """Flags to a dataset; say what there is now."""
    if FLAGS.describe:
        from dlrm_jax.data.prepare.describe import describe  # Draws pictures, which takes a second to import.

        print(describe(pathlib.Path(FLAGS.describe)))
        return
    if not FLAGS.output:
        raise ConfigError("--output is missing; it names the new dataset's directory")
    names = ("on_bad_row", "max_memory", "compression", "refit")
    options = {name: FLAGS[name].value for name in names} | {"extend": FLAGS.extend or None}
    _show(prepare(FLAGS.input, FLAGS.output, FLAGS.schema, **options))


def _show(prepared: Prepared) -> None:
    *notes, summary = str(prepared).splitlines()
    print("\n".join([*notes, ""]), end="")
    for warning in prepared.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    rate = f"{prepared.new_rows / prepared.seconds:,.0f} rows/s"
    print(summary)
    print(f"prepared in {prepared.seconds:.1f} s ({rate}); train with --data_dir={os.fspath(prepared)}")


def command() -> None:
    """The command, as a console script calls it too."""
    define_flags()
    commands.run_command(main)


if __name__ == "__main__":
    command()
