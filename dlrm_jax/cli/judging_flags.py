"""The flags by which `evaluate` judges a model beyond its metrics, and what they ask for. Only commands import this."""

import dataclasses
import pathlib

from absl import flags

from dlrm_jax.config import require
from dlrm_jax.data.read.prepared import is_prepared
from dlrm_jax.host import files
from dlrm_jax.judging.bootstrap import Bootstrap
from dlrm_jax.judging.importance import Asked as AskedImportance
from dlrm_jax.judging.judge import Options

FLAGS = flags.FLAGS
_NEEDS = {
    "max_slices": "slice_by",
    "importance_repeats": "importance",
    "importance_rows": "importance",
}


@dataclasses.dataclass(frozen=True)
class Judging:
    """What is asked for: nothing, by default."""

    options: Options
    columns_from: pathlib.Path | None
    importance: AskedImportance | None
    compare: pathlib.Path | None
    comparison: Bootstrap
    plots: pathlib.Path | None
    json: pathlib.Path | None

    @property
    def anything(self) -> bool:
        """Whether anything is asked for."""
        asked = (self.importance, self.compare, self.plots, self.json)
        return self.options != Options() or any(one is not None for one in asked)


def define_judging_flags() -> None:
    """Define them."""
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


def judging_from_flags() -> Judging:
    """What the flags ask for; ConfigError for a value that cannot be, or has no effect."""
    for name, needed in _NEEDS.items():
        require(
            bool(FLAGS[needed].value) or not FLAGS[name].present,
            f"--{name}={FLAGS[name].value} has no effect without --{needed}; leave it out",
        )
    require(
        bool(FLAGS.bootstrap or FLAGS.compare) or not FLAGS["confidence"].present,
        f"--confidence={FLAGS.confidence} has no effect without --bootstrap; leave it out",
    )
    require(
        bool(FLAGS.group_by or FLAGS.slice_by) or not FLAGS.columns_from,
        f"--columns_from={FLAGS.columns_from} has no effect without --group_by or --slice_by; leave it out",
    )
    require(
        not FLAGS.columns_from or is_prepared(pathlib.Path(FLAGS.columns_from)),
        f"--columns_from={FLAGS.columns_from} is no prepared dataset (python -m dlrm_jax.prepare makes one)",
    )
    require(0 <= FLAGS.seed < 2**63, f"--seed={FLAGS.seed}; it must be from 0 to 2^63 - 1")
    require(
        not FLAGS.compare or (pathlib.Path(FLAGS.compare) / "config.json").is_file(),
        f"--compare={FLAGS.compare} is no workdir of a training run: it has no config.json",
    )
    files.require_output_file("json", FLAGS.json)
    if FLAGS.plots:
        files.require_output_directory("plots", pathlib.Path(FLAGS.plots))
    bootstrap = Bootstrap(FLAGS.bootstrap, FLAGS.confidence, FLAGS.seed) if FLAGS.bootstrap else None
    importance = AskedImportance(FLAGS.importance_repeats, FLAGS.importance_rows, FLAGS.seed)
    return Judging(
        options=Options(FLAGS.group_by, tuple(FLAGS.slice_by), FLAGS.max_slices, bootstrap),
        columns_from=_path(FLAGS.columns_from),
        importance=importance if FLAGS.importance else None,
        compare=_path(FLAGS.compare),
        comparison=bootstrap or Bootstrap(confidence=FLAGS.confidence, seed=FLAGS.seed),
        plots=_path(FLAGS.plots),
        json=_path(FLAGS.json),
    )


def _path(text: str) -> pathlib.Path | None:
    return pathlib.Path(text) if text else None
