"""A training run as a value: its settings and curves, and its model, which judges, predicts and is exported."""

import functools
import os
import pathlib
from typing import Any

import jax
import numpy as np

from dlrm_jax.api import evaluation, exporting
from dlrm_jax.api.exported_model import Model
from dlrm_jax.api.frames import is_table
from dlrm_jax.api.raw_rows import is_rows, reader_of, to_evaluate, to_predict
from dlrm_jax.api.tables import Tables
from dlrm_jax.api.trained import Stored, Trained, load_config, open_stored, restore
from dlrm_jax.cli.flags import given, parsed
from dlrm_jax.config import ConfigError, require_choice
from dlrm_jax.data.read.dataset import Dataset, Rows
from dlrm_jax.data.schema.schema import HELD_OUT, SPLITS
from dlrm_jax.model.metrics import Metrics
from dlrm_jax.serving.artifact.transform import Reader
from dlrm_jax.training import reporting
from dlrm_jax.training.checkpoint import BEST, LATEST
from dlrm_jax.training.evaluation import Evaluator
from dlrm_jax.training.run_config import RunConfig


class Run:
    """A training run, as `train` gives it, or found again: `Run("runs/mine")`.

    Its model is that of a `checkpoint`: `best` on val, `latest`, or a step's number. `data_dir` says where the data is
    now, if it moved. Nothing is read but the settings before it is asked for; then the weights stay on the devices.

    >>> import dlrm_jax
    >>> run = dlrm_jax.Run("runs/clicks")
    >>> run.metrics["train"]["step"], run.last.step, run.config.model.embedding_dim
    (array([ 5, 10, 15, 20]), 20, 16)
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        checkpoint: str | int = BEST,
        *,
        data_dir: str | os.PathLike[str] | None = None,
        allow_oversubscription: bool = False,
    ) -> None:
        """ConfigError where `workdir` is no training run's."""
        self.workdir, self.checkpoint = pathlib.Path(workdir), str(checkpoint)
        self._data_dir = None if data_dir is None else os.fspath(data_dir)
        self._allow_oversubscription = allow_oversubscription
        self.config: RunConfig = load_config(self.workdir, self._data_dir)

    def __repr__(self) -> str:
        return f"Run({str(self.workdir)!r}, checkpoint={self.checkpoint!r})"

    def __fspath__(self) -> str:
        return str(self.workdir)

    @property
    def name(self) -> str:
        """Its workdir."""
        return str(self.workdir)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that are not defaults, as `train` takes them, but for the data and the workdir.

        `train(data, "runs/next", **run.settings | {"seed": 1})` trains again with another seed. Empty where no flags
        were kept; ConfigError where they are of a version that knew others.
        """
        path = self.workdir / "flags.txt"
        found = given(parsed({}, path)) if path.is_file() else {}
        return {name: value for name, value in found.items() if name != "data_dir"}

    @property
    def result(self) -> dict[str, Any]:
        """What `result.json` says: metrics of the best model on val and test, speed, versions; empty before its end."""
        return reporting.earlier(self.workdir, "result.json")

    @property
    def metrics(self) -> dict[str, dict[str, np.ndarray]]:
        """The curves: by split (`train`, `val`) the `step` and each metric, as float64 arrays, NaN where there is none.

        `step` is int64. What a split has not is not there.
        """
        lines = reporting.read_metrics(self.workdir)
        found: dict[str, dict[str, np.ndarray]] = {}
        for split in dict.fromkeys(line["split"] for line in lines):
            own = [line for line in lines if line["split"] == split]
            names = dict.fromkeys(name for line in own for name, value in line.items() if _is_number(value))
            arrays = {name: np.array([_number(line.get(name)) for line in own]) for name in names}
            found[split] = arrays | {"step": arrays["step"].astype(np.int64)}
        return found

    @functools.cached_property
    def best(self) -> "Run":
        """The same run with the model that was best on val."""
        return self._at(BEST)

    @functools.cached_property
    def last(self) -> "Run":
        """The same run with the model of its last checkpoint."""
        return self._at(LATEST)

    def _at(self, checkpoint: str) -> "Run":
        return self if checkpoint == self.checkpoint else self._other(self.workdir, checkpoint, self._data_dir)

    def _other(self, workdir: str | os.PathLike[str], checkpoint: str, data_dir: str | None) -> "Run":
        return Run(workdir, checkpoint, data_dir=data_dir, allow_oversubscription=self._allow_oversubscription)

    @functools.cached_property
    def _trained(self) -> Trained:
        return restore(self.workdir, self.checkpoint, self._data_dir, self._allow_oversubscription)

    @functools.cached_property
    def _stored(self) -> Stored:
        return open_stored(self.workdir, self.checkpoint, self._data_dir, self._allow_oversubscription)

    @functools.cached_property
    def _evaluator(self) -> Evaluator:
        trained = self._trained
        return Evaluator(trained.config, trained.placed, trained.dataset)

    @functools.cached_property
    def _reader(self) -> Reader:
        """What reads raw rows."""
        opened = self.__dict__.get("_stored") or self._trained
        return reader_of(opened.model, opened.dataset)

    @property
    def dataset(self) -> Dataset:
        """The data as training reads it."""
        return self._trained.dataset

    @property
    def step(self) -> int:
        """The step of the model's weights."""
        return int(self._trained.state.step)

    @property
    def evaluator(self) -> Evaluator:
        """What scores splits (training/evaluation.py), for `self.state`."""
        return self._evaluator

    @property
    def state(self) -> Any:
        """The weights and what the optimizers keep, on the devices (training/state.py)."""
        return self._trained.state

    def score(self, rows: Rows) -> Metrics:
        """The scores of some rows (model/metrics.py)."""
        try:
            return self._evaluator.score(self.state, rows)
        finally:
            if not any(rows is split for split in self.dataset.splits.values()):
                self._evaluator.forget(rows)

    def rows(self, what: Any) -> Rows:
        """A split by its name, or a table of raw rows with their labels."""
        if isinstance(what, str):
            require_choice("split", what, SPLITS)
            return self.dataset.splits[what]
        _require_table(what)
        return to_evaluate(self._reader, what, self.dataset)

    def evaluate(self, what: Any = "test", **asked: Any) -> evaluation.Evaluation:
        """Every metric on a split (train, val, test), or on a table of raw rows with their labels.

        What else is asked for has the names of the flags of `python -m dlrm_jax.evaluate`: `slice_by=["hour"]`,
        `group_by="user"`, `bootstrap=1000`, `importance=True`, `compare="runs/other"`, `plots="pictures"`... The result
        is a dictionary; its `text` is the report for people.

        >>> import dlrm_jax
        >>> found = dlrm_jax.Run("runs/clicks").evaluate("val", slice_by=["user"], max_slices=3)
        >>> found["num_samples"] == sum(one["num_samples"] for one in found["slices"]["user"])
        True

        ConfigError for a column that there is not, a row that cannot be read, and for what has no effect.
        """
        return evaluation.evaluate(self, what, evaluation.asked_for(**asked))

    def predict(self, what: Any) -> np.ndarray:
        """The probability of a click of each row, float32: of a split by its name, or of a table of raw rows.

        A table needs the columns that the model uses, with values as the log had them; what training did not know gets
        what preparation decided for it. A list of rows, each names with values, is a table too.

        >>> import dlrm_jax
        >>> run = dlrm_jax.Run("runs/clicks")
        >>> run.predict({"price": [3, 4], "user": ["u1", "nobody"]}).shape
        (2,)

        ConfigError for a column that is missing; BadRequest, a ValueError, names row and column of a wrong value.
        """
        if isinstance(what, str):
            rows = self.rows(what)
            return self.score(rows).scored(first=len(rows)).prob_R
        _require_table(what)
        padded, count = to_predict(self._reader, what)
        return self.score(padded).scored(first=count).prob_R

    def export(
        self,
        out: str | os.PathLike[str],
        tables: str | None = None,
        evaluate: tuple[str, ...] = HELD_OUT,
        delta_from: int | str = "",
        spare_rows: float = 0.0,
    ) -> Model:
        """Write the model for serving as the next version in `out`, and load it; `tables` may be bfloat16, int8, int4.

        It is scored on the splits of `evaluate`. With `delta_from`, a version's number or "newest", only what changed
        since then is written; `spare_rows` is a share of its rows that each table gets more, for deltas of data that
        grew. Needs the extra `serve` (flatbuffers).

        >>> import dlrm_jax
        >>> run = dlrm_jax.Run("runs/clicks")
        >>> model = run.export("models/clicks")
        >>> abs(model.metrics["test"]["auc"] - run.result["test"]["auc"]) < 1e-6
        True
        """
        version = exporting.export(self._stored, pathlib.Path(out), tables, evaluate, str(delta_from), spare_rows)
        return Model(out, version.number)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """The curves of loss and AUC as a matplotlib Figure, saved at `path` if one is given (PNG, PDF or SVG)."""
        figure = reporting.curves(self.workdir)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    @functools.cached_property
    def tables(self) -> Tables:
        """The embedding tables, read from the checkpoint as they are asked for: `run.tables["user"]["u42"]`."""
        return Tables(self._stored, lambda: self._reader)

    def another(self, workdir: str | os.PathLike[str]) -> "Run":
        """The run of another workdir at the same checkpoint; this one's weights leave the devices until they are asked.

        Where the data moved, that is said for both, if both had the same.
        """
        moved = self._data_dir
        if moved is not None and load_config(pathlib.Path(workdir)).data != load_config(self.workdir).data:
            moved = None
        trained = self.__dict__.pop("_trained", None)
        if trained is not None:  # Both models' tables together may not fit.
            jax.tree.map(lambda array: array.delete(), trained.state)
            self.__dict__.pop("_evaluator", None)
        return self._other(workdir, self.checkpoint, moved)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else float("nan")


def _require_table(what: Any) -> None:
    if not (is_table(what) or is_rows(what)):
        raise ConfigError(
            f"rows are given as {type(what).__name__}; give a table in memory (a DataFrame, a pyarrow Table, names "
            "with arrays, a list of rows), or the name of a split"
        )
