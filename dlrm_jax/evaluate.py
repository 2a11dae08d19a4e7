"""Evaluate a trained model: `python -m dlrm_jax.evaluate --workdir=runs/quickstart --split=test`."""

import csv
import json
import logging
import pathlib
from typing import Any

from absl import flags

from dlrm_jax.cli import judging_flags
from dlrm_jax.cli.commands import run_command
from dlrm_jax.cli.judging import Subject
from dlrm_jax.cli.judging_flags import define_judging_flags, judging_from_flags
from dlrm_jax.cli.trained import Trained, load_config, restore
from dlrm_jax.data.read.dataset import Rows
from dlrm_jax.data.read.pipeline import rows_and_labels
from dlrm_jax.data.schema.schema import SPLITS
from dlrm_jax.host import files, heap
from dlrm_jax.host.memory import TRY_ANYWAY_HELP
from dlrm_jax.training import reporting
from dlrm_jax.training.checkpoint import BEST, LATEST, Checkpoints
from dlrm_jax.training.evaluation import Evaluator, evaluate_splits
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
    define_judging_flags()


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
    asked, workdir = judging_from_flags(), pathlib.Path(FLAGS.workdir)
    run = restored(workdir)
    evaluate = Evaluator(run.config, run.placed, run.dataset)
    subject = Subject(FLAGS.workdir, run, evaluate, FLAGS.split, asked, restored)
    heap.keep_freed_temporaries()
    result = evaluate_splits(run.config, run.dataset, evaluate, run.state) | Speed().summary()
    result = reporting.with_earlier_speed(result, reporting.earlier(workdir, "result.json"))
    split = run.dataset.splits[FLAGS.split]
    shown = result[FLAGS.split] if FLAGS.split in result else evaluate(run.state, split)
    print(reporting.format_table({FLAGS.split: shown}, result.get("optimum") if FLAGS.split == "test" else None))
    line = {"step": result["step"], "split": FLAGS.split} | (shown or {})
    if asked.anything or FLAGS.predictions_out:
        rows = evaluate.score(run.state, split).scored(first=len(split))
        if FLAGS.predictions_out:
            write_predictions(pathlib.Path(FLAGS.predictions_out), split, rows.prob_R.tolist())
        line |= subject.judged(rows) if asked.anything else {}
    print(json.dumps(reporting.json_ready(line)))
    renew_result(workdir, result)


def restored(workdir: pathlib.Path) -> Trained:
    """The run of --workdir, or another at the same checkpoint; where data moved is said for both, if both had it."""
    moved = FLAGS.data_dir
    if moved is not None and load_config(workdir).data != load_config(pathlib.Path(FLAGS.workdir)).data:
        moved = None
    return restore(workdir, FLAGS.checkpoint, moved, FLAGS.allow_oversubscription)


def command() -> None:
    """The command, as a console script calls it too."""
    define_flags()
    flags.adopt_module_key_flags(judging_flags)  # Else --help would not list them.
    run_command(main)


if __name__ == "__main__":
    command()
