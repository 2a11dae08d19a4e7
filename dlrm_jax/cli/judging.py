"""A run judged as the flags ask: printed, drawn, written down."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from dlrm_jax.cli.judging_flags import Judging
from dlrm_jax.cli.trained import Trained
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.data.read.prepared import open_prepared
from dlrm_jax.judging import pictures
from dlrm_jax.judging.importance import Importance, importances, sampled
from dlrm_jax.judging.judge import (
    compare,
    judge,
    parts_of_split,
    require_possible,
    require_same_rows,
    units_of_split,
)
from dlrm_jax.judging.report import (
    compared_json,
    compared_slices_json,
    comparison_text,
    importance_text,
    report_json,
    report_text,
    summary,
)
from dlrm_jax.model.metrics import Scored
from dlrm_jax.training import reporting
from dlrm_jax.training.evaluation import Evaluator


@dataclasses.dataclass(frozen=True)
class Subject:
    """One split of a run, called `name` in what is printed, and what is asked of it; `restore` opens other workdirs.

    ConfigError where columns are asked for that are not there.
    """

    name: str
    run: Trained
    evaluate: Evaluator
    split: str
    asked: Judging
    restore: Callable[[pathlib.Path], Trained]
    with_columns: Dataset = dataclasses.field(init=False)
    """What has the columns of groups and slices: the run's own data, or that of --columns_from."""

    def __post_init__(self) -> None:
        dataset, asked = self.run.dataset, self.asked
        if asked.columns_from is not None:
            dataset = open_prepared(asked.columns_from)
            self._require_same_rows(dataset, f"--columns_from={asked.columns_from}")
        require_possible(dataset, asked.options)
        object.__setattr__(self, "with_columns", dataset)

    def _require_same_rows(self, other: Dataset, flag: str) -> None:
        ours, theirs = self.run.dataset.splits[self.split], other.splits[self.split]
        require_same_rows(ours, theirs, f"{flag}: its {self.split} split")

    def judged(self, rows: Scored) -> dict[str, Any]:
        """Print, draw and write what is asked for; what the last line says of it. `rows` are the split's scores.

        The run's weights are given up where another is compared.
        """
        asked, models = self.asked, {self.name: rows}
        split = self.with_columns.splits[self.split]
        report = judge(rows, split, self.with_columns, asked.options, self._data_dir())
        written = report_json(report)
        if text := report_text(report):
            print(f"\n{text}")
        found = self._importances()
        if found:
            written["importance"] = [dataclasses.asdict(one) for one in found]
        if asked.compare is not None:
            other = str(asked.compare)
            models[other] = self._scored_by(asked.compare)
            units = units_of_split(split, self.with_columns, asked.options.group_by)
            parts = parts_of_split(split, self.with_columns, asked.options, self._data_dir())
            comparison = compare(rows, models[other], units, asked.comparison, parts)
            written["comparison"] = compared_json(comparison.whole)
            written["comparison_by_slice"] = compared_slices_json(comparison)
            print(f"\n{comparison_text(comparison, self.name, other)}")
        if asked.plots is not None:
            pictures.draw_all(asked.plots, models, found)
        if asked.json is not None:
            reporting.write_json_atomically(asked.json, {"split": self.split} | written)
        return summary(report)

    def _data_dir(self) -> str:
        return str(self.asked.columns_from or self.run.config.data.data_dir)

    def _importances(self) -> list[Importance]:
        asked, run = self.asked.importance, self.run
        if asked is None:
            return []
        part = sampled(run.dataset.splits[self.split], asked.rows, asked.seed)
        found = importances(lambda rows: self.evaluate.score(run.state, rows), run.dataset, part, asked)
        print(f"\n{importance_text(found, asked.repeats, len(part))}")
        return found

    def _scored_by(self, workdir: pathlib.Path) -> Scored:
        """The scores that another run gives the same rows; ConfigError where it has others."""
        jax.tree.map(lambda array: array.delete(), self.run.state)  # Both models' tables together may not fit.
        other = self.restore(workdir)
        self._require_same_rows(other.dataset, f"--compare={workdir}")
        split = other.dataset.splits[self.split]
        evaluate = Evaluator(other.config, other.placed, other.dataset)
        return evaluate.score(other.state, split).scored(first=len(split))
