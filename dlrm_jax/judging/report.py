"""A judgement as text for people and as JSON for programs."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from dlrm_jax.host.texts import aligned
from dlrm_jax.judging.importance import Importance
from dlrm_jax.judging.judge import Compared, Comparison, Judgement, Report
from dlrm_jax.judging.measures import MEASURES

_WIDEST = 40
"""Characters of a slice's name that are shown."""


def report_text(report: Report) -> str:
    """The whole with intervals, what GAUC is of, and a table for each column of slices."""
    parts = []
    if report.groups is not None or report.bootstrap is not None:
        parts.append(_whole(report))
    if report.groups is not None:
        groups = report.groups
        parts.append(
            f"gauc: mean AUC within {groups.num_groups:,} groups by {groups.column}, weighted by impressions; "
            f"left out: {groups.one_class_groups:,} groups of one class, {groups.one_class_share:.1%} of impressions"
        )
    if report.bootstrap is not None:
        units = "rows" if report.groups is None else f"groups by {report.groups.column}"
        parts.append(
            f"intervals of {100 * report.bootstrap.confidence:g}%: percentiles of {report.bootstrap.resamples:,} "
            f"bootstrap resamples of {units}"
        )
    parts += [f"by {name}\n{_slices(own)}" for name, own in report.slices.items()]
    return "\n\n".join(parts)


def _whole(report: Report) -> str:
    names = [name for name in MEASURES if name in report.whole.values]
    rows = [["", *names], ["all", *(_number(report.whole.values[name]) for name in names)]]
    if report.bootstrap is not None:
        for place, text in enumerate(("from", "to")):
            rows.append([text, *(_number(report.whole.intervals[name][place]) for name in names)])
    return aligned(rows)


def _slices(slices: Sequence[Judgement]) -> str:
    """A row a slice; of the intervals, those of AUC and log loss. JSON has all of them."""
    names = [name for name in MEASURES if name in slices[0].values]
    total = sum(one.num_rows for one in slices)
    header = ["slice", "rows", "share"]
    for name in names:
        header += [name, "interval"] if name in ("auc", "log_loss") and slices[0].intervals else [name]
    rows = [header]
    for one in slices:
        row = [one.text[:_WIDEST], f"{one.num_rows:,}", f"{one.num_rows / total:.1%}"]
        for name in names:
            row.append(_number(one.values[name]))
            if name in ("auc", "log_loss") and one.intervals:
                row.append(_interval(one.intervals[name]))
        rows.append(row)
    return aligned(rows)


def importance_text(found: Sequence[Importance], repeats: int, num_rows: int) -> str:
    """The table of columns, the most important first."""
    rows = [["column", "kind", "auc_drop", "+-", "log_loss_rise", "+-"]]
    for one in found:
        numbers = (one.auc_drop, one.auc_drop_deviation, one.log_loss_rise, one.log_loss_rise_deviation)
        rows.append([one.column[:_WIDEST], one.kind, *map(_number, numbers)])
    head = f"permutation importance: each column dealt out anew among {num_rows:,} rows, {repeats} times"
    return f"{head}\n{aligned(rows)}"


def comparison_text(comparison: Comparison, first: str, second: str) -> str:
    """Both models beside each other, the difference with its interval, and the share that speaks against it.

    Of slices AUC and log loss; JSON has all metrics.
    """
    rows = [["metric", first, second, "difference", "interval", "p"]]
    rows += [[name, *_beside(comparison.whole, name)] for name in comparison.whole.differences]
    how = comparison.bootstrap
    text = (
        f"{second} minus {first} on the same rows; intervals of {100 * how.confidence:g}% by {how.resamples:,} paired "
        f"resamples, p twice the share of them on the other side of zero\n{aligned(rows)}"
    )
    for column, slices in comparison.slices.items():
        rows = [["slice", "rows", "metric", first, second, "difference", "interval", "p"]]
        for one in slices:
            for name in ("auc", "log_loss"):
                rows.append([one.text[:_WIDEST], f"{one.num_rows:,}", name, *_beside(one, name)])
        text += f"\n\nby {column}\n{aligned(rows, left=(0, 2))}"
    return text


def _beside(one: Compared, name: str) -> list[str]:
    delta = one.differences[name]
    values = [_number(one.first[name]), _number(one.second[name]), _signed(delta.value)]
    return [*values, f"{_signed(delta.low)} to {_signed(delta.high)}", _number(delta.p, 3)]


def report_json(report: Report) -> dict[str, Any]:
    """Everything by name."""
    out: dict[str, Any] = _judgement(report.whole)
    out["groups"] = None if report.groups is None else dataclasses.asdict(report.groups)
    out["bootstrap"] = None if report.bootstrap is None else dataclasses.asdict(report.bootstrap)
    out["slices"] = {
        name: [{"slice": one.text} | _judgement(one) for one in own] for name, own in report.slices.items()
    }
    return out


def _judgement(one: Judgement) -> dict[str, Any]:
    intervals = {name: list(interval) for name, interval in one.intervals.items()}
    return {"num_samples": one.num_rows, "metrics": dict(one.values), "intervals": intervals}


def compared_json(one: Compared) -> dict[str, Any]:
    """By metric: both values, the difference, its interval, p."""
    return {
        name: {"first": one.first[name], "second": one.second[name]} | dataclasses.asdict(delta)
        for name, delta in one.differences.items()
    }


def compared_slices_json(comparison: Comparison) -> dict[str, Any]:
    """By column: each slice, its rows and what `compared_json` has of it."""
    return {
        name: [{"slice": one.text, "num_samples": one.num_rows, "metrics": compared_json(one)} for one in slices]
        for name, slices in comparison.slices.items()
    }


def _number(value: float, digits: int = 5) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.5f}"


def _interval(interval: tuple[float, float]) -> str:
    return "-" if math.isnan(interval[0]) else f"{interval[0]:.4f} to {interval[1]:.4f}"


def summary(report: Report) -> dict[str, Any]:
    """What the last line of `evaluate` says besides the metrics that training says: GAUC, and the intervals."""
    out: dict[str, Any] = {}
    if report.groups is not None:
        out |= {"gauc": report.whole.values["gauc"], "gauc_groups": report.groups.num_groups}
    if report.bootstrap is not None:
        out["intervals"] = {name: list(interval) for name, interval in report.whole.intervals.items()}
    return out
