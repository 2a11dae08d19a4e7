"""Runs beside each other on one HTML page, which needs nothing from elsewhere: to keep, to send, to read on a phone."""

import base64
import datetime
import html
import io
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dlrm_jax.api.run import Run
from dlrm_jax.data.schema.schema import HELD_OUT
from dlrm_jax.host.texts import drawn
from dlrm_jax.judging.measures import MEASURES
from dlrm_jax.training import reporting

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 1rem auto; padding: 0 1rem; color: #222;
  overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } figure { margin: 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .9rem .2rem 0; text-align: left; white-space: nowrap; vertical-align: top; }
td.text { white-space: normal; min-width: 8rem; } svg, img { max-width: 100%; height: auto; }
.beside { display: flex; flex-wrap: wrap; } .beside svg { width: 31rem; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load for it: nothing."""

_LONG = 40
"""Characters of a cell beyond which it breaks into lines."""

Rows = Sequence[Sequence[str]]


def page(runs: Sequence[Run], split: str = "test", slice_by: Sequence[str] = ()) -> str:
    """The page of some runs; with `slice_by` their models are evaluated on `split`, else nothing is computed."""
    names = _short_names(runs)
    by_name = dict(zip(names, runs, strict=True))
    results = {name: run.result for name, run in by_name.items()}
    parts = [
        _section("Curves", _curves(by_name)),
        _section("Settings that differ" if len(runs) > 1 else "Settings", _table(*_settings(by_name))),
        *(_section(f"Metrics on {held}", _table(_metrics(results, held), "Not scored.")) for held in HELD_OUT),
        *_slices(by_name, split, slice_by),
        _section("Predicted beside measured", _table(_costs(results), "Not measured.")),
        _section("Parts of a step, predicted, and waiting, measured", _table(_parts(results), "Not measured.")),
        _section("Environment", _table(_environment(results), "Not noted.")),
        _section("Pictures", "".join(_pictures(by_name))),
    ]
    title = f"{len(runs)} runs" if len(runs) > 1 else names[0]
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1><p>{when}</p>\n{''.join(parts)}</body></html>\n"
    )


def _short_names(runs: Sequence[Run]) -> list[str]:
    """Workdirs without the folders that all of them share, each once."""
    paths = [run.workdir.absolute() for run in runs]
    depth = 0
    while len(paths) > 1 and all(len(path.parts) > depth + 1 for path in paths):
        if len({path.parts[depth] for path in paths}) > 1:
            break
        depth += 1
    return [str(pathlib.Path(*path.parts[depth:])) if len(paths) > 1 else path.name for path in paths]


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{content}\n" if content else ""


def _table(rows: Rows, otherwise: str) -> str:
    """Rows of texts, the first one the head; `otherwise` where there is nothing below it."""
    if len(rows) < 2:
        return f"<p>{html.escape(otherwise)}</p>"
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _cell(text: str) -> str:
    kind = " class=text" if len(text) > _LONG else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _number(value: Any, form: str = ".5f") -> str:
    if value is None or value != value:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:{form}}"


_CURVES = {"loss": (("train", "loss"), ("val", "loss")), "AUC": (("val", "auc"),)}
"""What a picture shows: split and metric of its lines."""


def _curves(runs: Mapping[str, Run]) -> str:
    """Loss and AUC of all runs over their steps, as an SVG each, below each other where the page is narrow."""
    from matplotlib import rc_context  # A second to import.
    from matplotlib.figure import Figure

    pictures = []
    for what, lines in _CURVES.items():
        figure = Figure(figsize=(5, 4), layout="constrained")
        axis = figure.subplots()
        for i, (name, run) in enumerate(runs.items()):
            for split, key in lines:
                curves = run.metrics.get(split, {})
                if key in curves:
                    line, marker = ("-", "o") if split == "val" else (":", "None")
                    label = f"{drawn(name)}, {split}"
                    axis.plot(curves["step"], curves[key], line, color=f"C{i % 10}", marker=marker, ms=3, label=label)
        axis.set(xlabel="step", ylabel=what)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        text = io.StringIO()
        with rc_context({"svg.fonttype": "none"}):  # Texts stay texts, which can be searched and read aloud.
            figure.savefig(text, format="svg", metadata={"Date": None})
        svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
        pictures.append(svg[svg.index("<svg") :])
    return f"<figure class=beside>{''.join(pictures)}</figure>"


def _settings(runs: Mapping[str, Run]) -> tuple[Rows, str]:
    """Settings in which several runs differ, or those of one that are not the default; and what to say without any.

    An empty cell is the default.
    """
    settings = {name: {"data_dir": run.config.data.data_dir} | run.settings for name, run in runs.items()}
    texts = {name: {flag: _told(value) for flag, value in own.items()} for name, own in settings.items()}
    known = dict.fromkeys(flag for own in texts.values() for flag in own)
    several = len(runs) > 1
    compared = list(texts.values()) if several else [*texts.values(), {}]
    shown = [flag for flag in known if len({own.get(flag, "") for own in compared}) > 1]
    rows = [[flag, *(own.get(flag, "") for own in texts.values())] for flag in shown]
    return [["setting", *runs], *rows], "They have the same settings." if several else "All are the defaults."


def _told(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _metrics(results: Mapping[str, Mapping[str, Any]], split: str) -> Rows:
    """A row a run; the optimum, where the data has one, is the last."""
    rows = [["run", *reporting.METRIC_COLUMNS]]
    for name, result in results.items():
        if result.get(split):
            rows.append([name, *(_number(result[split].get(column)) for column in reporting.METRIC_COLUMNS)])
    optimum = next((result["optimum"] for result in results.values() if result.get("optimum")), None)
    if optimum is not None and split == "test" and len(rows) > 1:
        rows.append(["optimum", *(_number(optimum.get(column)) for column in reporting.METRIC_COLUMNS)])
    return rows


def _slices(runs: Mapping[str, Run], split: str, slice_by: Sequence[str]) -> Iterable[str]:
    """For each column a table: a row for each slice of each run."""
    if not slice_by:
        return
    found = {name: run.evaluate(split, slice_by=slice_by)["slices"] for name, run in runs.items()}
    names = [name for name in MEASURES if name != "gauc"]
    for column in slice_by:
        rows = [["slice", "run", "rows", *names]]
        for text in dict.fromkeys(one["slice"] for slices in found.values() for one in slices.get(column, ())):
            for run, slices in found.items():
                for one in slices.get(column, ()):
                    if one["slice"] == text:
                        values = [_number(one["metrics"].get(name)) for name in names]
                        rows.append([text, run, _number(one["num_samples"]), *values])
        yield _section(f"{split.capitalize()} by {column}", _table(rows, "It has no rows."))


def _costs(results: Mapping[str, Mapping[str, Any]]) -> Rows:
    rows = [["run", "step, ms: predicted", "measured", "a device, MB: predicted", "measured", "samples/s"]]
    for name, result in results.items():
        cost = result.get("step_cost")
        if cost:
            pair = cost["predicted"], cost["measured"]
            seconds = [_scaled(one["seconds"], 1e3) for one in pair]
            held = [_scaled(one["bytes"], 1e-6) for one in pair]
            rows.append([name, *seconds, *held, _number(result.get("samples_per_second"), ",.0f")])
    return rows


def _scaled(value: float | None, by: float) -> str:
    return "-" if value is None else f"{value * by:,.3f}"


def _parts(results: Mapping[str, Mapping[str, Any]]) -> Rows:
    """What a step is predicted to be made of, and the shares of its time that it was measured to wait."""
    costs = {name: (result.get("step_cost") or {}).get("predicted", {}) for name, result in results.items()}
    parts = list(dict.fromkeys(part for own in costs.values() for part in own.get("parts", ())))
    rows = [["run", *(f"{part}, ms" for part in parts), "waits for input", "for the host"]]
    for name, result in results.items():
        waits = [result.get(key) for key in ("input_wait_fraction", "host_wait_fraction")]
        own = costs[name].get("parts", {})
        if own or any(wait is not None for wait in waits):
            seconds = [_scaled(own.get(part), 1e3) for part in parts]
            rows.append([name, *seconds, *(_number(wait, ".1%") for wait in waits)])
    return rows


def _environment(results: Mapping[str, Mapping[str, Any]]) -> Rows:
    versions = {name: result["versions"] for name, result in results.items() if result.get("versions")}
    known = dict.fromkeys(what for own in versions.values() for what in own)
    return [["", *versions], *([what, *(str(own.get(what) or "-") for own in versions.values())] for what in known)]


def _pictures(runs: Mapping[str, Run]) -> Iterable[str]:
    """The pictures of the workdirs, but for the curves, which are above."""
    for name, run in runs.items():
        for path in sorted(run.workdir.glob("*.png")):
            if path.name != "curves.png":
                source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
                text = html.escape(f"{name}: {path.name}")
                yield f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>\n'
