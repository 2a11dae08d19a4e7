"""Evaluate a trained model: `python -m dlrm_jax.evaluate --workdir=runs/quickstart --split=test`."""

import csv
import json
import logging
import pathlib
from typing import Any

from absl import flags

from dlrm_jax.api.evaluation import asked_for, evaluate
from dlrm_jax.api.run import Run
from dlrm_jax.cli.commands import run_command
from dlrm_jax.data.read.dataset import Rows
from dlrm_jax.data.read.pipeline import rows_and_labels
from dlrm_jax.data.schema.schema import SPLITS
from dlrm_jax.host import files, heap
from dlrm_jax.host.memory import TRY_ANYWAY_HELP
from dlrm_jax.judging.judge import require_possible
from dlrm_jax.training import reporting
from dlrm_jax.training.checkpoint import BEST, LATEST, Checkpoints
from dlrm_jax.training.evaluation import evaluate_splits
from dlrm_jax.training.monitor import Speed

FLAGS = flags.FLAGS
_LOG = logging.getLogger("dlrm_jax")


def define_flags() -> None:
    """Define this command's flags."""
    flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
    flags.DEFINE_string("checkpoint", "best", "best, latest, or a step number.")
    flags.DEFINE_enum("split", "test", SPLITS, "Rows that are printed, and predicted with --predictions_out.")
    flags.DEFINE_string("predictions_out", None, "CSV file for row number, label and probability of every row.")
    flags.DEFINE_bool("allow_oversubscription", False, TRY_ANYWAY_HELP)
    flags.DEFINE_string("data_dir", None, "Where the data is now, if it moved since training.")
    _define_judging_flags()


def _define_judging_flags() -> None:
    flags.DEFINE_string(
        "group_by", "", "Report GAUC: AUC within the rows of each value of this column, as the user, by impressions."
    )
    flags.DEFINE_list(
        "slice_by",
        [],
        "Report every metric for each value of these columns, each on its own; of a bag its first id counts, numbers "
        "of many values go into buckets by quantiles.",
    )
    flags.DEFINE_string(
        "columns_from",
        "",
        "A prepared dataset of the same log and split, for columns of --group_by and --slice_by that the model does "
        "not use: prepare the log again, with a schema that has them.",
    )
    flags.DEFINE_integer("max_slices", 20, "Slices of a column at most: the rarest values are taken together.")
    flags.DEFINE_integer(
        "bootstrap", 0, "Resamples for confidence intervals, of the groups of --group_by, else of rows; 0: none."
    )
    flags.DEFINE_float("confidence", 0.95, "What share of resamples an interval covers.")
    flags.DEFINE_string(
        "compare",
        "",
        "The workdir of another run, whose same checkpoint is scored on the same rows: differences of all metrics by "
        "paired bootstrap (1000 resamples where --bootstrap says nothing).",
    )
    flags.DEFINE_bool("importance", False, "Report what AUC and log loss lose when each column is permuted.")
    flags.DEFINE_integer("importance_repeats", 5, "Permutations of each column.")
    flags.DEFINE_integer("importance_rows", 100_000, "Rows on which columns are permuted, at most.")
    flags.DEFINE_integer("seed", 0, "Decides the resamples, the permutations, and the rows of --importance_rows.")
    flags.DEFINE_string("plots", "", "Directory for calibration.png, lift.png and, with --importance, importance.png.")
    flags.DEFINE_string("json", "", "File for everything that is reported, with the intervals of all slices.")


def write_predictions(path: pathlib.Path, split: Rows, probabilities: list[float]) -> None:
    """CSV `id,label,probability`; id is the row's number in the raw log, counted from 0."""
    row_R, label_R = rows_and_labels(split)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "label", "probability"))
        writer.writerows(zip(row_R.tolist(), label_R.tolist(), probabilities, strict=True))


def renew_result(workdir: pathlib.Path, result: dict[str, Any]) -> None:
    """Write result.json with what is of the best checkpoint (of the latest where none was validated).

    Where a training is running, which will, or nobody may, that is said instead.
    """
    path = workdir / "result.json"
    with Checkpoints(workdir, read_only=True) as checkpoints:
        kinds = [kind for kind in (BEST, LATEST) if checkpoints.step(kind) is not None]
        best = checkpoints.step(kinds[0]) if kinds else result["step"]
    if result["step"] != best:
        _LOG.info("%s is left as it is: it is of the %s checkpoint, of step %d", path.name, kinds[0], best)
        return
    if files.is_held(workdir / files.LOCK):
        _LOG.warning("a training is running in %s: %s is left to it", workdir, path.name)
        return
    try:
        reporting.write_json_atomically(path, result)
    except OSError as error:
        _LOG.warning("%s is not renewed: %s", path, error.strerror)


def main() -> None:
    """Restore, evaluate, print, judge, and renew result.json."""
    files.require_output_file("predictions_out", FLAGS.predictions_out)
    files.require_output_file("json", FLAGS.json)
    asked = asked_for(**{name: FLAGS[name].value for name in _ASKED} | {name: _given(name) for name in _GIVEN})
    run = Run(
        FLAGS.workdir, FLAGS.checkpoint, data_dir=FLAGS.data_dir, allow_oversubscription=FLAGS.allow_oversubscription
    )
    if asked.columns_from is None:
        require_possible(run.dataset, asked.options)  # Before the work.
    heap.keep_freed_temporaries()
    result = evaluate_splits(run.config, run.dataset, run.evaluator, run.state) | Speed().summary()
    result = reporting.with_earlier_speed(result, reporting.earlier(run.workdir, "result.json"))
    split = run.dataset.splits[FLAGS.split]
    shown = result[FLAGS.split] if FLAGS.split in result else run.evaluator(run.state, split)
    print(reporting.format_table({FLAGS.split: shown}, result.get("optimum") if FLAGS.split == "test" else None))
    line = {"step": result["step"], "split": FLAGS.split} | (shown or {})
    if asked.anything or FLAGS.json or FLAGS.predictions_out:
        found = evaluate(run, FLAGS.split, asked, report=bool(FLAGS.json))
        if FLAGS.predictions_out:
            write_predictions(pathlib.Path(FLAGS.predictions_out), split, found.scores.prob_R.tolist())
        if FLAGS.json:
            reporting.write_json_atomically(pathlib.Path(FLAGS.json), dict(found))
        print(f"\n{found.text}" if found.text else "", end="\n" if found.text else "")
        line |= found.summary
    print(json.dumps(reporting.json_ready(line)))
    renew_result(run.workdir, result)


_ASKED = ("group_by", "slice_by", "columns_from", "bootstrap", "compare", "importance", "seed", "plots")
_GIVEN = ("max_slices", "confidence", "importance_repeats", "importance_rows")
"""Flags that have no effect without others, where somebody types them."""


def _given(name: str) -> Any:
    return FLAGS[name].value if FLAGS[name].present else None


def command() -> None:
    """The command, as a console script calls it too."""
    define_flags()
    run_command(main)


if __name__ == "__main__":
    command()
