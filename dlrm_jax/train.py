"""Train a DLRM: `python -m dlrm_jax.train --flagfile=experiments/quickstart.flags`."""

import contextlib
import logging
import sys
from collections.abc import Iterator

from absl import flags

from dlrm_jax.api.exported import open_exported
from dlrm_jax.api.training import begin, workdir_of
from dlrm_jax.cli.commands import run_command
from dlrm_jax.cli.flags import config_from_flags, defaults_taken, define_run_flags, flagfile_text, settings_text
from dlrm_jax.config import require
from dlrm_jax.data.schema.schema import HELD_OUT
from dlrm_jax.host import processes
from dlrm_jax.training.loop import ResultNotWritten
from dlrm_jax.training.monitor import Interrupted
from dlrm_jax.training.reporting import format_cost, format_table
from dlrm_jax.training.seeds import SEEDS, format_seeds, train_seeds

FLAGS = flags.FLAGS


def define_process_flags() -> None:
    """Which of several processes this is: not kept in flags.txt, since it differs between them."""
    flags.DEFINE_string(
        "coordinator_address", "", "HOST:PORT of process 0, where several processes train together; the same for all."
    )
    flags.DEFINE_integer("num_processes", 0, "How many processes train together; 0: one, or what the cluster says.")
    flags.DEFINE_integer("process_id", -1, "This process's number among them, from 0.")


def define_seed_flags() -> None:
    """How many runs: each keeps its own settings in its own directory, so that this is none of them."""
    flags.DEFINE_integer(
        "num_seeds",
        1,
        "Train this often, with --seed and the numbers after it on the same data, in WORKDIR/seed-N; the same command "
        "goes on where it was stopped. WORKDIR/seeds.json has how far their metrics lie apart.",
    )


def main() -> None:
    """Flags to config, config to result, result to the screen."""
    processes.join(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id, settings_text())
    if not processes.is_first():
        logging.getLogger("dlrm_jax").setLevel(logging.WARNING)  # Said once is enough.
    unwritten = None
    with exiting_when_interrupted(), processes.ending_together(but_for=Interrupted):
        if FLAGS.num_seeds != 1:
            _train_seeds()
            return
        try:
            workdir, result = begin(FLAGS)
        except ResultNotWritten as error:
            workdir, result, unwritten = workdir_of(FLAGS), error.result, error
    if not processes.is_first():
        return
    print(format_table({name: result[name] for name in HELD_OUT}, result.get("optimum")))
    if result["input_wait_fraction"] is not None:
        waits = f"{result['input_wait_fraction']:.1%} of the time waiting for input"
        host = f"{result['host_wait_fraction']:.1%} for the host"
        print(f"{result['samples_per_second']:,.0f} samples/s; {waits}, {host}")
    print(format_cost(result["step_cost"]))
    if unwritten is not None:
        raise unwritten
    print(f"step {result['step']}; results, curves and checkpoints are in {workdir}")


def _train_seeds() -> None:
    config, workdir = config_from_flags(publishes=True), workdir_of(FLAGS)
    require(not config.publishing.model_dir, "--publish is for one run; leave it or --num_seeds out")
    written = train_seeds(config, workdir, FLAGS.num_seeds, flagfile_text(), defaults_taken(), open_exported)
    print(format_seeds(written))
    print(f"{FLAGS.num_seeds} seeds; all results are in {workdir / SEEDS}")


@contextlib.contextmanager
def exiting_when_interrupted() -> Iterator[None]:
    """A training that a signal stopped, once it is saved, ends with the shell's status for that signal."""
    try:
        yield
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(128 + interrupted.signum)


def command() -> None:
    """The command, as a console script calls it too."""
    define_process_flags()
    define_seed_flags()
    define_run_flags()
    run_command(main)


if __name__ == "__main__":
    command()
