"""Evaluate a trained model: `python -m dlrm_jax.evaluate --workdir=runs/quickstart --split=test`."""

import csv
import dataclasses
import json
import logging
import pathlib
from typing import Any

import jax
from absl import flags

from dlrm_jax.cli import judging_flags
from dlrm_jax.cli.commands import run_command
from dlrm_jax.cli.judging_flags import Judging, define_judging_flags, judging_from_flags
from dlrm_jax.cli.trained import Trained, load_config, restore
from dlrm_jax.data.read.dataset import SPLITS, Dataset, Rows
from dlrm_jax.data.read.pipeline import rows_and_labels
from dlrm_jax.data.read.prepared import open_prepared
from dlrm_jax.host import files, heap
from dlrm_jax.host.memory import TRY_ANYWAY_HELP
from dlrm_jax.judging import pictures
from dlrm_jax.judging.importance import Importance, importances, sampled
from dlrm_jax.judging.judge import compare, judge, require_possible, require_same_rows, units_of_split
from dlrm_jax.judging.report import comparison_json, comparison_text, importance_text, report_json, report_text, summary
from dlrm_jax.model.metrics import Scored
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
    flags.DEFINE_string("data_dir", None, "Where the raw log is now, if it moved since training.")
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
    run = restore(workdir, FLAGS.checkpoint, FLAGS.data_dir, FLAGS.allow_oversubscription)
    columns = columns_of(asked, run)
    require_possible(columns.dataset, asked.options)
    heap.keep_freed_temporaries()
    evaluate = Evaluator(run.config, run.placed, run.dataset.expander)
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
        line |= judged(asked, run, columns, evaluate, rows) if asked.anything else {}
    print(json.dumps(reporting.json_ready(line)))
    renew_result(workdir, result)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where the columns of groups and slices are: a dataset with the rows of the run's, and its directory."""

    dataset: Dataset
    data_dir: str


def columns_of(asked: Judging, run: Trained) -> Columns:
    """The run's own, or what --columns_from names; ConfigError where that has other rows."""
    if asked.columns_from is None:
        return Columns(run.dataset, run.config.data.data_dir)
    other = open_prepared(asked.columns_from)
    where = f"--columns_from={asked.columns_from}: its {FLAGS.split} split"
    require_same_rows(run.dataset.splits[FLAGS.split], other.splits[FLAGS.split], where)
    return Columns(other, str(asked.columns_from))


def judged(asked: Judging, run: Trained, columns: Columns, evaluate: Evaluator, rows: Scored) -> dict[str, Any]:
    """Print, draw and write what is asked for; what the last line says of it."""
    split, with_columns = run.dataset.splits[FLAGS.split], columns.dataset.splits[FLAGS.split]
    report = judge(rows, with_columns, columns.dataset, asked.options, columns.data_dir)
    written, models = report_json(report), {FLAGS.workdir: rows}
    if text := report_text(report):
        print(f"\n{text}")
    found: list[Importance] = []
    if asked.importance is not None:
        part = sampled(split, asked.importance.rows, asked.importance.seed)
        found = importances(lambda rows: evaluate.score(run.state, rows), run.dataset, part, asked.importance)
        written["importance"] = [dataclasses.asdict(one) for one in found]
        print(f"\n{importance_text(found, asked.importance.repeats, len(part))}")
    if asked.compare is not None:
        jax.tree.map(lambda array: array.delete(), run.state)  # Both models' tables together may not fit.
        models[str(asked.compare)] = second = scored_by(asked.compare, run, split)
        units = units_of_split(with_columns, columns.dataset, asked.options.group_by)
        comparison = compare(rows, second, units, asked.comparison)
        written["comparison"] = comparison_json(comparison)
        print(f"\n{comparison_text(comparison, FLAGS.workdir, str(asked.compare))}")
    if asked.plots is not None:
        pictures.draw_all(asked.plots, models, found)
    if asked.json is not None:
        reporting.write_json_atomically(asked.json, {"split": FLAGS.split} | written)
    return summary(report)


def scored_by(workdir: pathlib.Path, run: Trained, split: Rows) -> Scored:
    """The scores that another run's same checkpoint gives the rows of `split`; ConfigError where it has other rows."""
    moved = FLAGS.data_dir if load_config(workdir).data == load_config(pathlib.Path(FLAGS.workdir)).data else None
    other = restore(workdir, FLAGS.checkpoint, moved, FLAGS.allow_oversubscription)
    its_split = other.dataset.splits[FLAGS.split]
    require_same_rows(split, its_split, f"--compare={workdir}: its {FLAGS.split} split")
    evaluate = Evaluator(other.config, other.placed, other.dataset.expander)
    return evaluate.score(other.state, its_split).scored(first=len(its_split))


def command() -> None:
    """The command, as a console script calls it too."""
    define_flags()
    flags.adopt_module_key_flags(judging_flags)  # Else --help would not list them.
    run_command(main)


if __name__ == "__main__":
    command()
