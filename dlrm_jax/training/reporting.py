"""What a run writes for people: metrics.jsonl, TensorBoard events, curves, tables, a progress bar."""

import json
import math
import pathlib
import platform
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from types import TracebackType
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dlrm_jax.config import ConfigError
from dlrm_jax.config.documents import from_json
from dlrm_jax.host import files
from dlrm_jax.host.texts import aligned

METRIC_COLUMNS = (
    "auc",
    "log_loss",
    "normalized_entropy",
    "calibration",
    "accuracy",
    "pr_auc",
    "brier",
    "num_samples",
)
_PLAIN_PROGRESS_SECONDS = 5.0
_UPDATE_SECONDS = 0.1
_MUCH_WAITING = 0.01


def json_ready(value: Any) -> Any:
    """The same value with NaN and infinities as None, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json_atomically(path: pathlib.Path, value: Any) -> None:
    """Write `value` to `path` so that a reader sees the old file or the new one, never a part."""
    _write_text_atomically(path, json.dumps(json_ready(value), indent=1) + "\n")


def _write_text_atomically(path: pathlib.Path, text: str) -> None:
    with files.whole(path, alone=False) as temporary:  # Two evaluations may end at once.
        temporary.write_text(text)


def versions() -> dict[str, str | None]:
    """Versions and device that a result depends on; None for what is not installed, as dlrm_jax in a clone."""
    packages = ("dlrm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {package: _version(package) for package in packages}
    device = {"backend": jax.default_backend(), "device": jax.devices()[0].device_kind}
    return {"python": platform.python_version(), **found, **device}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a half-written last line, left by a killed run, is left out."""
    path = workdir / "metrics.jsonl"
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class MetricsLog:
    """Appends to metrics.jsonl and TensorBoard; lines beyond `resume_step` are dropped: they will come again.

    Nothing at all if `silent`, as in all but one of several processes.
    """

    def __init__(self, workdir: pathlib.Path, resume_step: int, silent: bool = False) -> None:
        self._silent = silent
        if silent:
            return
        from tensorboardX import SummaryWriter  # Half a second to import, and only training needs it.

        path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= resume_step]
        _write_text_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, error, traceback
        if self._silent:
            return
        self._file.close()
        self._events.close()

    def write(self, step: int, split: str, values: dict[str, Any]) -> None:
        """One line `{"step", "split", **values}`, on disk when this returns."""
        if self._silent:
            return
        values = json_ready(values)
        try:
            self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                f"cannot write {self._file.name}: {error.strerror}; mend that, and the same command goes on from the "
                "last checkpoint"
            ) from error
        for name, value in values.items():
            if value is not None:
                self._events.add_scalar(f"{split}/{name}", value, step)

    def write_histogram(
        self, step: int, name: str, found: Mapping[str, Any], limits: np.ndarray, counts: np.ndarray
    ) -> None:
        """`counts` of numbers up to each of `limits`; `found` has their `least`, `most`, `sum` and sum of `squares`."""
        if self._silent:
            return
        least, most, total, squares = (float(found[key]) for key in ("least", "most", "sum", "squares"))
        number = int(counts.sum())
        self._events.add_histogram_raw(
            name, least, most, number, total, squares, limits.tolist(), counts.tolist(), step
        )


class Progress:
    """A bar with samples/s, loss and time left on a terminal, and a plain line every few seconds elsewhere.

    Nothing at all if `silent`, as in all but one of several processes.
    """

    def __init__(self, num_steps: int, start_step: int, batch_size: int, silent: bool = False) -> None:
        self._batch_size, self._num_steps = batch_size, num_steps
        self._silent, self._terminal = silent, sys.stderr.isatty() and not silent
        self._bar = tqdm(
            total=num_steps,
            initial=start_step,
            disable=not self._terminal,
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",  # tqdm's own rate counts compilation.
        )
        self._last_print, self._last_update = time.perf_counter(), -_UPDATE_SECONDS

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, error, traceback
        self._bar.close()

    def update(self, step: int, loss: float, rate: float | None, waits: dict[str, float | None]) -> None:
        """Show that `step` steps are done at `rate` samples a second; `loss` is NaN, `rate` None before one is known.

        `waits` are the shares of the time that the device waited (monitor.WAITS), said where they are much. Rate and
        shares are the run's own (monitor.Clock), without compilation: the same that the result will say.
        """
        now, at_end = time.perf_counter(), step == self._num_steps
        if self._silent or (now - self._last_update < _UPDATE_SECONDS and not at_end):
            return
        self._last_update = now
        parts = [] if rate is None else [f"{rate:,.0f} samples/s"]
        parts += [
            f"{wait:.0%} waiting for {name.partition('_')[0]}"
            for name, wait in waits.items()
            if wait is not None and wait >= _MUCH_WAITING
        ]
        parts += [] if math.isnan(loss) else [f"loss {loss:.4f}"]
        if rate:
            parts.append(f"{(self._num_steps - step) * self._batch_size / rate:.0f} s left")
        shown = ", ".join(parts)
        if self._terminal:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._last_print > _PLAIN_PROGRESS_SECONDS or at_end:
            self._last_print = now
            print(f"step {step}/{self._num_steps}  {shown}", file=sys.stderr, flush=True)


def format_table(results: dict[str, dict[str, Any] | None], optimum: dict[str, float] | None = None) -> str:
    """Metrics as an aligned table, a row a split; `optimum`, where known, is the last row."""
    rows = [["split", *METRIC_COLUMNS]]
    for name, values in results.items():
        rows.append([name, *(_cell((values or {}).get(column)) for column in METRIC_COLUMNS)])
    if optimum is not None:
        rows.append(["optimum", *(_cell(optimum.get(column)) for column in METRIC_COLUMNS)])
    return aligned(rows, left=())


def format_cost(cost: dict[str, dict[str, Any]]) -> str:
    """Predicted beside measured: time of a step, memory of a device; and what the prediction is of."""

    def one(values: dict[str, Any]) -> str:
        seconds, held = values["seconds"], values["bytes"]
        time_text = "-" if seconds is None else f"{seconds * 1e3:,.3f} ms a step"
        return f"{time_text}, {'-' if held is None else f'{held / 1e6:,.1f} MB a device'}"

    text = f"predicted {one(cost['predicted'])}; measured {one(cost['measured'])}"
    if cost["measured"]["seconds"] is None or "hardware" not in cost["predicted"]:
        return text
    return (
        f"{text}\nthe prediction is of a step alone at the rates listed for {cost['predicted']['hardware']}; input, "
        "logging and a busy or other machine come on top (python -m dlrm_jax.plan --calibrate measures this one)"
    )


def earlier(workdir: pathlib.Path, name: str) -> dict[str, Any]:
    """What a JSON file of a run, as `result.json`, says so far; nothing where there is none that can be read."""
    try:
        values = from_json((workdir / name).read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def with_earlier_speed(result: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """`result`, with the speed and cost that an earlier one has where this run took no step and so measured none."""
    if result.get("samples_per_second") is not None:
        return result
    names = ("samples_per_second", "input_wait_fraction", "host_wait_fraction", "step_cost")
    return result | {name: earlier[name] for name in names if earlier.get(name) is not None}


def _cell(value: float | int | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5f}"


def plot_curves(workdir: pathlib.Path, optimum: dict[str, float] | None = None) -> None:
    """Draw `curves.png`."""
    curves(workdir, optimum).savefig(workdir / "curves.png", dpi=120)


def curves(workdir: pathlib.Path, optimum: dict[str, float] | None = None) -> Any:
    """Loss and validation AUC over steps, from metrics.jsonl, as a matplotlib Figure."""
    from matplotlib.figure import Figure  # A second to import; no pyplot, so that no display is asked for.

    lines = read_metrics(workdir)
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, auc_axes = figure.subplots(1, 2)
    for split in ("train", "val"):
        _plot(loss_axes, lines, split, "loss")
    _plot(auc_axes, lines, "val", "auc")
    for axes, name, key in ((loss_axes, "loss", "log_loss"), (auc_axes, "AUC", "auc")):
        if optimum is not None:
            axes.axhline(optimum[key], color="gray", linestyle="--", label="optimum")
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure


def _plot(axes: Any, lines: list[dict[str, Any]], split: str, key: str) -> None:
    points = [(line["step"], line[key]) for line in lines if line["split"] == split and line.get(key) is not None]
    if points:
        marked = split == "val" or len(points) == 1  # A line through one point shows nothing.
        color, marker = {"train": "C0", "val": "C1"}[split], "o" if marked else "None"
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=split, markersize=4)
