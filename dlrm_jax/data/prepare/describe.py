"""The statistics of a prepared dataset for a person: a table, and pictures beside the data."""

import datetime
import functools
import pathlib
from collections.abc import Callable
from typing import Any

from dlrm_jax.config import ConfigError
from dlrm_jax.data.read.prepared import is_prepared, read_json, read_schema
from dlrm_jax.data.schema.schema import HELD_OUT
from dlrm_jax.data.values.periods import units_a_second
from dlrm_jax.host.texts import aligned, drawn

_MAX_CURVES = 12
_MAX_PERIODS = 30


def describe(directory: pathlib.Path) -> str:
    """Tables as text; draws DIR/statistics.png, or the working directory's where DIR cannot be written."""
    if not is_prepared(directory):
        raise ConfigError(f"{directory} is not a prepared dataset; give the --output of dlrm_jax.prepare")
    statistics = read_json(directory / "statistics.json")
    clock = _clock(statistics) if read_schema(directory).timestamp else None
    path = directory / "statistics.png"
    try:
        _draw(statistics, clock, path)
        drawn = f"pictures: {path}"
    except OSError:
        drawn = _draw_here(statistics, clock)
    time = [_span(statistics, clock)] if clock else []
    tables = [
        _splits(statistics),
        *_periods(statistics),
        *time,
        _dense(statistics),
        _features(statistics),
        _tables(statistics),
    ]
    return "\n\n".join([*tables, drawn])


def _draw_here(statistics: dict[str, Any], clock: Callable[[float], datetime.datetime] | None) -> str:
    path = pathlib.Path("statistics.png")
    try:
        _draw(statistics, clock, path)
    except OSError as error:
        return f"no pictures: neither the dataset's directory nor this one can be written ({error.strerror})"
    return f"pictures: {path}"


def _time_range(statistics: dict[str, Any]) -> list[float]:
    """The first and the last time; older versions noted bins alone, equally wide, the last one beyond the last row."""
    bins = statistics["positives_over_time"]
    width = (bins[-1][0] - bins[0][0]) / max(len(bins) - 1, 1)
    return statistics.get("time_range", [bins[0][0], bins[-1][0] + width - 1])


def _clock(statistics: dict[str, Any]) -> Callable[[float], datetime.datetime] | None:
    """What makes a date (UTC) of a timestamp; None where the log's timestamps are other numbers, as days from 0."""
    units = units_a_second(*_time_range(statistics))
    return functools.partial(_date, units) if units else None


def _date(units: int, time: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(time / units, datetime.UTC)


def _span(statistics: dict[str, Any], clock: Callable[[float], datetime.datetime]) -> str:
    """When the log begins and ends."""
    half = datetime.timedelta(seconds=0.5)  # To the nearest second.
    first, last = (f"{clock(time) + half:%Y-%m-%d %H:%M:%S}" for time in _time_range(statistics))
    return f"time: {first} to {last} UTC"


def _dense(statistics: dict[str, Any]) -> str:
    columns = statistics.get("dense_columns")
    if columns is None:
        return "dense columns: not counted when this dataset was prepared; prepare it anew to see them"
    rows = [["dense column", "least", "most", "mean", "missing"]]
    for name, column in columns.items():
        numbers = ["-" if column[key] is None else f"{column[key]:,.5g}" for key in ("least", "most", "mean")]
        rows.append([name, *numbers, _percent(column["missing_share"])])
    return aligned(rows) if columns else "dense columns: none"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _splits(statistics: dict[str, Any]) -> str:
    rows = [["split", "rows", "positive rate"]]
    for name, split in statistics["splits"].items():
        rows.append([name, f"{split['rows']:,}", _percent(split["positive_rate"])])
    skipped = statistics["skipped"]["rows"]
    return aligned(rows) + (f"\nskipped: {skipped:,} rows" if skipped else "")


def _periods(statistics: dict[str, Any]) -> list[str]:
    """A table of the periods by which the log is split, where it is: the last ones, of many."""
    found = statistics.get("periods", [])[-_MAX_PERIODS:]
    rows = [["period", "split", "rows", "positive rate"]]
    rows += [[p["name"], p["split"], f"{p['rows']:,}", _percent(p["positives"] / p["rows"])] for p in found]
    return [aligned(rows)] if found else []


def _features(statistics: dict[str, Any]) -> str:
    rows = [["feature", "table", "hotness", "mean", "empty bags", "truncated ids"]]
    for name, feature in statistics["features"].items():
        mean, empty = f"{feature['mean_hotness']:.2f}", _percent(feature["empty_share"])
        rows.append([name, feature["table"], str(feature["hotness"]), mean, empty, f"{feature['truncated_ids']:,}"])
    return aligned(rows)


def _tables(statistics: dict[str, Any]) -> str:
    header = [
        "table",
        "rows",
        "ids in use",
        "coverage",
        "val seen in train",
        "test seen in train",
        "top 10",
        "most frequent",
    ]
    rows = [header]
    for name, table in statistics["tables"].items():
        top = table["top"][0] if table["top"] else None
        seen = [_percent(table["seen_in_train"][split]) for split in HELD_OUT]
        coverage = _percent(table.get("coverage", {}).get("train"))
        most = f"{top['value'][:24]} ({_percent(top['share'])})" if top else "-"
        share = _percent(table["top_10_share"])
        rows.append([name, f"{table['rows']:,}", f"{table['distinct']:,}", coverage, *seen, share, most])
    return aligned(rows)


def _draw(statistics: dict[str, Any], clock: Callable[[float], datetime.datetime] | None, path: pathlib.Path) -> None:
    from matplotlib.figure import Figure  # A second to import; no pyplot, so that no display is asked for.

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    curves, sizes, rate = figure.subplots(1, 3)
    tables = statistics["tables"]
    largest = sorted(tables, key=lambda name: -tables[name]["distinct"])[:_MAX_CURVES]
    for name in largest:
        points = tables[name]["frequency_curve"]
        if points:
            curves.plot(*zip(*points, strict=True), label=drawn(name), marker="." if len(points) < 3 else "None")
    curves.set(xscale="log", yscale="log", xlabel="rank of the id", ylabel="occurrences", title="id frequencies")
    curves.legend(fontsize=7, ncols=2)
    shown = sorted(tables, key=lambda name: tables[name]["distinct"])[-40:]
    sizes.barh([drawn(name) for name in shown], [max(tables[name]["distinct"], 1) for name in shown])
    sizes.set(xscale="log", xlabel="distinct ids", title="cardinalities")
    sizes.set_xlim(left=0.9)  # From one on, so that lengths compare, and the ticks are powers of ten.
    sizes.tick_params(axis="y", labelsize=7)
    bins = [
        (clock(start) if clock else start, positives / rows)
        for start, rows, positives in statistics["positives_over_time"]
        if rows
    ]
    rate.plot(*zip(*bins, strict=True), marker="." if len(bins) < 3 else "None")
    rate.set(xlabel="time, UTC" if clock else "time, or position in the log", ylabel="positive rate")
    rate.set_title("positive rate")
    if clock:
        rate.tick_params(axis="x", rotation=30)
    rate.set_ylim(bottom=0)
    for axes in (curves, sizes, rate):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
