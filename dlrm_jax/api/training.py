"""Training from Python: the settings are the flags of `python -m dlrm_jax.train`, read and checked by the same code."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from absl.flags import FlagValues

from dlrm_jax.api.exported import open_exported
from dlrm_jax.api.frames import is_table
from dlrm_jax.api.preparing import prepare
from dlrm_jax.api.run import Run
from dlrm_jax.cli.flags import config_from_flags, defaults_taken, flagfile_text, parsed, unchecked_config
from dlrm_jax.config import ConfigError, require
from dlrm_jax.data.read.load import CACHE
from dlrm_jax.data.read.prepared import is_prepared, read_schema
from dlrm_jax.data.schema.schema import Schema
from dlrm_jax.host import files
from dlrm_jax.serving.artifact.publish import open_publisher
from dlrm_jax.training.loop import train_and_evaluate


def train(
    data: Any = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    schema: str | os.PathLike[str] | Mapping[str, Any] | Schema = "infer",
    flagfile: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Train a DLRM, or go on training, in `workdir`; what came of it.

    `data` is a prepared dataset or its directory, or a table in memory (a DataFrame of pandas or polars, a pyarrow
    Table, names with NumPy arrays), which is prepared first, in `workdir`, as `schema` says (see `prepare`). Left out,
    it is what the settings `dataset` and `data_dir` say. `workdir` is by default runs/NAME, by the dataset's name.

    `settings` are the flags of `python -m dlrm_jax.train`, with values of their types: `embedding_dim=16`,
    `top_mlp=[64, 32, 1]`, `table_optimizer="adam"`, `shuffle=False`. Those of `flagfile` come first. A second call with
    the same settings goes on where the first ended; with others it is refused. After Ctrl-C the model is saved, and
    Interrupted says at which step.

    >>> import dlrm_jax
    >>> run = dlrm_jax.train("data/clicks", "runs/clicks", num_steps=20, eval_every=10, log_every=5, progress=False)
    >>> sorted(run.metrics), run.last.step, 0 < run.result["test"]["log_loss"] < 2
    (['train', 'val'], 20, True)

    Raises ConfigError, in the one line of the command, for a name that is no setting's (with the nearest that is), a
    value that cannot be, and data that do not fit.
    """
    given = dict(settings) if workdir is None else settings | {"workdir": os.fspath(workdir)}
    if data is not None:
        require("data_dir" not in settings, "data and data_dir both name the data; leave one out")
        require(
            is_table(data) or isinstance(data, str | os.PathLike),
            f"data is {type(data).__name__}; give a prepared dataset, its directory, or a table in memory",
        )
        require(
            "workdir" in given or not is_table(data),
            "workdir is missing; it says where the table is prepared, and the run is kept",
        )
        given["data_dir"] = os.path.join(given["workdir"], CACHE) if is_table(data) else os.fspath(data)
    values = parsed(given, flagfile)
    if is_table(data):
        unchecked_config(values)  # What cannot be is said before the work.
        prepare(data, given["data_dir"], schema, progress=progress)
    return Run(begin(values, progress)[0])


def begin(values: FlagValues, progress: bool = True) -> tuple[pathlib.Path, dict[str, Any]]:
    """Train as a set of flags says: (the workdir, what `result.json` says)."""
    config = config_from_flags(values, publishes=True)
    workdir = workdir_of(values)
    if config.publishing.model_dir:
        files.require_output_directory("publish", pathlib.Path(config.publishing.model_dir))
    texts = flagfile_text(values), defaults_taken(values)
    return workdir, train_and_evaluate(config, workdir, *texts, open_exported, open_publisher, progress)


def workdir_of(values: FlagValues) -> pathlib.Path:
    """Where the run is kept: as --workdir says, for prepared data by default under its name."""
    data_dir, said = pathlib.Path(values["data_dir"].value), values["workdir"].value
    if not said and not is_prepared(data_dir):
        raise ConfigError("--workdir is missing; it says where checkpoints, logs and results go")
    workdir = pathlib.Path(said or f"runs/{read_schema(data_dir).name}")
    files.require_output_directory("workdir", workdir)
    return workdir
