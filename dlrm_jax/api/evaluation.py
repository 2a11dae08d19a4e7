"""A run judged: its metrics on a split or on raw rows, and what else is asked for; printed, drawn, as values."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

from dlrm_jax.config import require
from dlrm_jax.data.read.dataset import Dataset, Rows
from dlrm_jax.data.read.prepared import is_prepared, open_prepared
from dlrm_jax.host import files
from dlrm_jax.judging import pictures
from dlrm_jax.judging.bootstrap import Bootstrap
from dlrm_jax.judging.importance import Asked as AskedImportance
from dlrm_jax.judging.importance import Importance, importances, sampled
from dlrm_jax.judging.judge import (
    Options,
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
from dlrm_jax.model.metrics import Metrics, Scored


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked for beyond the metrics: nothing, by default."""

    options: Options
    columns_from: pathlib.Path | None
    importance: AskedImportance | None
    compare: pathlib.Path | None
    comparison: Bootstrap
    plots: pathlib.Path | None

    @property
    def anything(self) -> bool:
        """Whether anything is asked for."""
        return self.options != Options() or any(one is not None for one in (self.importance, self.compare, self.plots))


def asked_for(
    *,
    group_by: str = "",
    slice_by: str | Sequence[str] = (),
    max_slices: int | None = None,
    columns_from: str | os.PathLike[str] = "",
    bootstrap: int = 0,
    confidence: float | None = None,
    compare: str | os.PathLike[str] = "",
    importance: bool = False,
    importance_repeats: int | None = None,
    importance_rows: int | None = None,
    seed: int = 0,
    plots: str | os.PathLike[str] = "",
) -> Asked:
    """What is asked for, by the names of the flags; None for what is left out.

    ConfigError for a value that cannot be, or has no effect.
    """
    slice_by = (slice_by,) if isinstance(slice_by, str) else tuple(slice_by)
    for name, value, needs, there in (
        ("max_slices", max_slices, "--slice_by", bool(slice_by)),
        ("importance_repeats", importance_repeats, "--importance", importance),
        ("importance_rows", importance_rows, "--importance", importance),
        ("confidence", confidence, "--bootstrap", bool(bootstrap or compare)),
        ("columns_from", columns_from or None, "--group_by or --slice_by", bool(group_by or slice_by)),
    ):
        require(value is None or there, f"--{name}={value} has no effect without {needs}; leave it out")
    require(
        not columns_from or is_prepared(pathlib.Path(columns_from)),
        f"--columns_from={columns_from} is no prepared dataset (python -m dlrm_jax.prepare makes one)",
    )
    require(0 <= seed < 2**63, f"--seed={seed}; it must be from 0 to 2^63 - 1")
    require(
        not compare or (pathlib.Path(compare) / "config.json").is_file(),
        f"--compare={compare} is no workdir of a training run: it has no config.json",
    )
    if plots:
        files.require_output_directory("plots", pathlib.Path(plots))

    def or_default(value: Any, default: Any) -> Any:
        return default if value is None else value

    how = Bootstrap(bootstrap or Bootstrap.resamples, or_default(confidence, Bootstrap.confidence), seed)
    repeats = or_default(importance_repeats, AskedImportance.repeats)
    most_rows = or_default(importance_rows, AskedImportance.rows)
    slices = or_default(max_slices, Options.max_slices)
    return Asked(
        options=Options(group_by, slice_by, slices, how if bootstrap else None),
        columns_from=_path(columns_from),
        importance=AskedImportance(repeats, most_rows, seed) if importance else None,
        compare=_path(compare),
        comparison=how,
        plots=_path(plots),
    )


def _path(given: str | os.PathLike[str]) -> pathlib.Path | None:
    return pathlib.Path(given) if given else None


class Subject(Protocol):
    """A run that can be judged (run.Run)."""

    @property
    def name(self) -> str:
        """What it is called beside another."""

    @property
    def dataset(self) -> Dataset:
        """Its data."""

    @property
    def step(self) -> int:
        """The step of its weights."""

    def rows(self, what: Any) -> Rows:
        """A split by its name, or raw rows."""

    def score(self, rows: Rows) -> Metrics:
        """The scores of some rows."""

    def another(self, workdir: pathlib.Path) -> "Subject":
        """The run of another workdir; this one's weights may be given up."""


class Evaluation(dict[str, Any]):
    """What was found, by name: the metrics of METRIC_COLUMNS and, where they were asked for, `slices`, `importance`...

    `text` is what is to be read of the latter, `summary` the few numbers of it that belong beside the metrics,
    `scores` those of every row.
    """

    text: str
    summary: dict[str, Any]
    scores: Scored


def evaluate(run: Subject, what: Any, asked: Asked, report: bool = False) -> Evaluation:
    """`run` on a split, or on raw rows; with a `report` even where nothing is asked for.

    ConfigError where columns are asked for that are not there.
    """
    rows = run.rows(what)
    split = what if isinstance(what, str) else "table"
    where = f"its {what} split" if isinstance(what, str) else "its rows"
    with_columns, judged = run.dataset, rows
    if asked.columns_from is not None:
        require(isinstance(what, str), "--columns_from is for a split; a table has its own columns")
        with_columns = open_prepared(asked.columns_from)
        judged = with_columns.splits[what]
        require_same_rows(rows, judged, f"--columns_from={asked.columns_from}: {where}")
    require_possible(with_columns, asked.options)
    metrics = run.score(rows)
    found = Evaluation({"step": run.step, "split": split} | metrics.compute())
    found.scores = metrics.scored(first=len(rows))
    found.text, found.summary = "", {}
    if asked.anything or report:
        _Judge(run, what, where, judged, with_columns, asked).add_to(found, rows)
    return found


@dataclasses.dataclass(frozen=True)
class _Judge:
    run: Subject
    what: Any
    where: str
    judged: Rows
    with_columns: Dataset
    asked: Asked

    def add_to(self, found: Evaluation, rows: Rows) -> None:
        """Everything that is asked for; the run's weights are given up where another is compared."""
        asked, models, texts = self.asked, {self.run.name: found.scores}, []
        report = judge(found.scores, self.judged, self.with_columns, asked.options, self._data_dir)
        found |= report_json(report)
        found.summary = summary(report)
        texts.append(report_text(report))
        important = self._importances(rows, texts)
        if important:
            found["importance"] = [dataclasses.asdict(one) for one in important]
        if asked.compare is not None:
            other = str(asked.compare)
            models[other] = self._scored_by(asked.compare, rows)
            units = units_of_split(self.judged, self.with_columns, asked.options.group_by)
            parts = parts_of_split(self.judged, self.with_columns, asked.options, self._data_dir)
            comparison = compare(found.scores, models[other], units, asked.comparison, parts)
            found["comparison"] = compared_json(comparison.whole)
            found["comparison_by_slice"] = compared_slices_json(comparison)
            texts.append(comparison_text(comparison, self.run.name, other))
        if asked.plots is not None:
            pictures.draw_all(asked.plots, models, important)
        found.text = "\n\n".join(filter(None, texts))

    @property
    def _data_dir(self) -> str:
        return str(self.with_columns.directory or "")

    def _importances(self, rows: Rows, texts: list[str]) -> list[Importance]:
        asked, run = self.asked.importance, self.run
        if asked is None:
            return []
        part = sampled(rows, asked.rows, asked.seed)
        found = importances(run.score, run.dataset, part, asked)
        texts.append(importance_text(found, asked.repeats, len(part)))
        return found

    def _scored_by(self, workdir: pathlib.Path, rows: Rows) -> Scored:
        """The scores that another run gives the same rows; ConfigError where it has others."""
        other = self.run.another(workdir)
        theirs = other.rows(self.what)
        require_same_rows(rows, theirs, f"--compare={workdir}: {self.where}")
        return other.score(theirs).scored(first=len(theirs))
