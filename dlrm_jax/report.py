"""Put runs on one page: `python -m dlrm_jax.report --out=report.html runs/one runs/two`.

The page needs nothing from elsewhere: curves of all runs, the settings in which they differ, metrics by split and
slice, predicted beside measured, the parts of a step, versions, pictures.
"""

import pathlib

from absl import flags

from dlrm_jax.api.page import page
from dlrm_jax.api.run import Run
from dlrm_jax.cli.commands import run_command
from dlrm_jax.config import require, require_unique
from dlrm_jax.data.schema.schema import SPLITS
from dlrm_jax.host import files

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define this command's flags."""
    flags.DEFINE_string("out", "report.html", "The page.")
    flags.DEFINE_list("slice_by", [], "Columns by whose values the runs' best models are evaluated anew, on --split.")
    flags.DEFINE_enum("split", "test", SPLITS, "What is sliced.")


def main(*workdirs: str) -> None:
    """Workdirs to a page."""
    require(bool(workdirs), "no run is named; give workdirs behind the flags, as runs/one runs/two")
    require_unique("workdir", [str(pathlib.Path(workdir).absolute()) for workdir in workdirs])
    files.require_output_file("out", FLAGS.out)
    runs = [Run(workdir) for workdir in workdirs]
    with files.whole(pathlib.Path(FLAGS.out), alone=False) as temporary:
        temporary.write_text(page(runs, FLAGS.split, FLAGS.slice_by), encoding="utf-8")
    print(f"{len(runs)} {'runs' if len(runs) > 1 else 'run'}: {FLAGS.out}")


def command() -> None:
    """The command, as a console script calls it too."""
    define_flags()
    run_command(main, words=True)


if __name__ == "__main__":
    command()
