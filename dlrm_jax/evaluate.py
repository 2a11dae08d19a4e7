"""Evaluate a trained model: `python -m dlrm_jax.evaluate --workdir=runs/quickstart --split=test`."""

import csv
import dataclasses
import json
import pathlib

from absl import flags

from dlrm_jax import checkpoint, reporting, run_config
from dlrm_jax.commands import run_command
from dlrm_jax.config import ConfigError, differences
from dlrm_jax.data.dataset import SPLITS, Rows
from dlrm_jax.data.load import load_dataset
from dlrm_jax.data.pipeline import rows_and_labels
from dlrm_jax.evaluation import Evaluator, evaluate_splits
from dlrm_jax.monitor import Speed
from dlrm_jax.placement import place_run
from dlrm_jax.sharding.options import ShardingOptions

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define this command's flags."""
    flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
    flags.DEFINE_string("checkpoint", "best", "best, latest, or a step number.")
    flags.DEFINE_enum("split", "test", SPLITS, "Rows that are printed, and predicted with --predictions_out.")
    flags.DEFINE_string("predictions_out", None, "CSV file for row number, label and probability of every row.")
    flags.DEFINE_string("data_dir", None, "Where the raw log is now, if it moved since training.")


def load_config(workdir: pathlib.Path) -> run_config.RunConfig:
    """The RunConfig saved in a workdir."""
    path = workdir / "config.json"
    try:
        config = run_config.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; --workdir must name the directory of a training run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a run's configuration: {error}") from error
    if FLAGS.data_dir is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=FLAGS.data_dir))
    return config


def write_predictions(path: pathlib.Path, split: Rows, probabilities: list[float]) -> None:
    """CSV `id,label,probability`; id is the row's number in the raw log, counted from 0."""
    row_R, label_R = rows_and_labels(split)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "label", "probability"))
        writer.writerows(zip(row_R.tolist(), label_R.tolist(), probabilities, strict=True))


def main() -> None:
    """Restore, evaluate, print, and renew result.json."""
    workdir = pathlib.Path(FLAGS.workdir)
    config = load_config(workdir)
    raw = load_dataset(config.data)
    model = config.model.build(raw)
    dataset, _ = run_config.check_dataset(raw, model, config.ids_out_of_range)

    placed = place_run(dataclasses.replace(config, sharding=ShardingOptions()), model, dataset)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        kind, step = checkpoints.find(FLAGS.checkpoint)
        identity = json.loads(json.dumps(config.identity(model, raw)))
        different = differences(identity, checkpoints.record(kind)["identity"])
        if different:
            raise ConfigError(f"the checkpoint belongs to other data (now != then): {'; '.join(different[:8])}")
        state = checkpoints.restore(kind, placed, step)
    evaluate = Evaluator(config, placed, raw.expander)
    result = evaluate_splits(config, dataset, evaluate, state) | Speed().summary()
    split = dataset.splits[FLAGS.split]
    shown = result[FLAGS.split] if FLAGS.split in result else evaluate(state, split)
    print(reporting.format_table({FLAGS.split: shown}, result.get("optimum") if FLAGS.split == "test" else None))
    print(json.dumps(reporting.json_ready({"step": result["step"], "split": FLAGS.split} | (shown or {}))))
    if FLAGS.predictions_out:
        write_predictions(pathlib.Path(FLAGS.predictions_out), split, evaluate.predict(state, split).tolist())
    reporting.write_json_atomically(workdir / "result.json", result)


if __name__ == "__main__":
    define_flags()
    run_command(main)
