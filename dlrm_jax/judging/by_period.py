"""Scores of several models period by period (training/online.py), as a table and as a picture."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dlrm_jax.host.texts import aligned
from dlrm_jax.training.online import LIVING, MODELS

_MEASURES = {"auc": "AUC", "log_loss": "log loss", "normalized_entropy": "NE", "calibration": "calibration"}
_COLORS = {name: f"C{i}" for i, name in enumerate(MODELS[:-1])} | {MODELS[-1]: "gray"}


def table(periods: Sequence[Mapping[str, Any]]) -> str:
    """A row a period: its size, then each model's measures; the last row has means over the periods that all scored."""
    models = _models(periods)
    columns = [(model, name) for model in models for name in _MEASURES if _known(periods, model, name)]
    names = [f"{model} {_MEASURES[name]}" for model, name in columns]
    rows = [["period", "rows", "positive", *names]]
    for period in periods:
        values = [_cell(period.get(model, {}).get(name)) for model, name in columns]
        rows.append([period["name"], f"{period['rows']:,}", f"{period['positives'] / period['rows']:.3f}", *values])
    both = shared(periods)
    means = [_cell(_mean([period[model][name] for period in both])) for model, name in columns]
    rows.append([f"mean of {len(both)}", f"{sum(period['rows'] for period in both):,}", "", *means])
    return aligned(rows)


def shared(periods: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The periods that all models scored: behind the one after which one was frozen."""
    return [period for period in periods if all(model in period for model in _models(periods))]


def draw(periods: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Each measure over the periods, a line a model; the first period, before any training, is left out."""
    from matplotlib.figure import Figure  # A second to import; no pyplot, so that no display is asked for.

    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, _MEASURES.items(), strict=True):
        for model in _models(periods):
            if not _known(periods, model, name):
                continue
            values = [(period.get(model) or {}).get(name) for period in periods]
            y = [math.nan if value is None else value for value in values[1:]]
            style = "--" if model == MODELS[-1] else "-"
            axes.plot(range(1, len(values)), y, style, marker="o", markersize=3, color=_COLORS[model], label=model)
        if name == "calibration":
            axes.axhline(1, color="gray", linestyle=":")
        places = range(1, len(periods), max(1, len(periods) // 8))
        axes.set_xticks(places, [periods[i]["name"] for i in places], rotation=30, ha="right", fontsize=8)
        axes.set(title=title)
        axes.grid(alpha=0.3)
        if name == "auc":  # It has all models.
            figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(MODELS))
    figure.savefig(path, dpi=110)


def _models(periods: Sequence[Mapping[str, Any]]) -> list[str]:
    return [model for model in MODELS if any(model in period for period in periods)] or [LIVING]


def _known(periods: Sequence[Mapping[str, Any]], model: str, name: str) -> bool:
    return any(name in (period.get(model) or {}) for period in periods)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
