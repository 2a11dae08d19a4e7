"""Score each period of a log, then train on it: `python -m dlrm_jax.online --data_dir=data/mine --workdir=runs/on`."""

import logging
import pathlib

from absl import flags

from dlrm_jax.api.exported import open_exported
from dlrm_jax.cli.commands import run_command
from dlrm_jax.cli.flags import config_from_flags, define_run_flags, flagfile_text
from dlrm_jax.config import require
from dlrm_jax.host import files, processes
from dlrm_jax.judging import by_period
from dlrm_jax.serving.artifact.publish import open_publisher
from dlrm_jax.train import exiting_when_interrupted
from dlrm_jax.training.online import RESULTS, validate_progressively
from dlrm_jax.training.periods import OnlineOptions

FLAGS = flags.FLAGS
_LOG = logging.getLogger("dlrm_jax")
_AS_IF = {"num_steps": 0, "num_epochs": 1, "eval_every": 0, "checkpoint_every": 0, "patience": 0, "target_value": None}
"""What flags of a training would say of what is done here, whatever they say."""


def define_flags() -> None:
    """Define this command's own flags."""
    flags.DEFINE_string("periods", "", "FIRST:LAST by name, both included; either may be left out. Empty: all.")
    flags.DEFINE_integer("frozen_after", 1, "Periods after which a copy of the model learns no more; 0: none is kept.")
    flags.DEFINE_integer(
        "retrain",
        0,
        "Before each period also train a fresh model in so many passes over all rows before it, which must fit into "
        "memory: the work grows with the square of the periods. 0: no.",
    )
    flags.DEFINE_float(
        "decay_sums",
        1.0,
        "Multiply Adagrad's sums of squares, of tables and dense parameters, with this behind each period, so that "
        "later ones still move the model; 1: no.",
    )
    flags.DEFINE_integer(
        "evict_after",
        0,
        "Behind each period, give rows that none of the last so many periods asked for the weights of their table's "
        "out-of-vocabulary row; their number is in online.json. 0: no.",
    )


def _options() -> OnlineOptions:
    return OnlineOptions(FLAGS.periods, FLAGS.frozen_after, FLAGS.retrain, FLAGS.decay_sums, FLAGS.evict_after)


def main() -> None:
    """Flags to config, config to scores, scores to the screen, a file and a picture."""
    config, options = config_from_flags(publishes=True), _options()
    asked = config.records.asked
    require(not asked, f"{' and '.join(asked)}: for dlrm_jax.train alone; leave it out here")
    require(bool(FLAGS.workdir), "--workdir is missing; it says where the model, its scores and the picture go")
    workdir = pathlib.Path(FLAGS.workdir)
    files.require_output_directory("workdir", workdir)
    if config.publishing.model_dir:
        files.require_output_directory("publish", pathlib.Path(config.publishing.model_dir))
    ignored = [f"--{name}" for name, value in _AS_IF.items() if FLAGS[name].present and FLAGS[name].value != value]
    if ignored:
        _LOG.warning("without effect: %s; each period is gone through once", ", ".join(ignored))
    with exiting_when_interrupted():
        result = validate_progressively(config, options, workdir, flagfile_text(), open_exported, open_publisher)
    if not processes.is_first():
        return
    print(by_period.table(result["periods"]))
    by_period.draw(result["periods"], workdir / "online.png")
    print(f"scores are in {workdir / RESULTS}, a picture in {workdir / 'online.png'}")


def command() -> None:
    """The command, as a console script calls it too."""
    define_flags()
    define_run_flags()
    run_command(main)


if __name__ == "__main__":
    command()
