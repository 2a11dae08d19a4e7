"""Pictures of how scores are: reliability, cumulative gain and lift, importance of columns."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlrm_jax.host.texts import drawn
from dlrm_jax.judging.importance import Importance
from dlrm_jax.model.metrics import Scored

_BINS = 20
_POINTS = 1000
"""Of a curve over any number of rows."""
_MOST_BARS = 40


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Bins of equally many rows in the order of their scores: mean probability, rate of clicks, its error, rows."""

    prob_b: np.ndarray
    rate_b: np.ndarray
    error_b: np.ndarray
    rows_b: np.ndarray


def reliability(rows: Scored, bins: int = _BINS) -> Reliability:
    """Rows in bins by quantiles of their probability; equal probabilities share a bin.

    `error_b` is 1.96 standard errors of a share of as many clicks.
    """
    edges = np.unique(np.quantile(rows.prob_R, np.linspace(0, 1, bins + 1)))
    bin_R = np.searchsorted(edges[1:-1], rows.prob_R, side="right")
    used, bin_R = np.unique(bin_R, return_inverse=True)
    weight_b = np.bincount(bin_R, rows.weight_R, len(used))
    rate_b = np.bincount(bin_R, rows.weight_R * rows.label_R, len(used)) / weight_b
    rows_b = np.bincount(bin_R, minlength=len(used))
    error_b = 1.96 * np.sqrt(rate_b * (1 - rate_b) / rows_b)
    return Reliability(np.bincount(bin_R, rows.weight_R * rows.prob_R, len(used)) / weight_b, rate_b, error_b, rows_b)


def gain_curve(rows: Scored) -> tuple[np.ndarray, np.ndarray]:
    """(share of rows, share of clicks among them), from the highest score on; rows of one score come all at once."""
    order = np.argsort(-rows.logits_R, kind="stable")
    score, weight = rows.logits_R[order], rows.weight_R[order].astype(np.float64)
    ends = np.flatnonzero(np.append(score[1:] != score[:-1], True)[: len(score)])
    if len(ends) > _POINTS:
        ends = ends[np.linspace(0, len(ends) - 1, _POINTS).astype(int)]
    seen, clicks = np.cumsum(weight), np.cumsum(weight * rows.label_R[order])
    with np.errstate(invalid="ignore"):  # Without clicks there is no curve.
        return np.append(0, seen[ends] / seen[-1]), np.append(0, clicks[ends] / clicks[-1])


def draw_all(directory: pathlib.Path, models: Mapping[str, Scored], found: Sequence[Importance]) -> None:
    """calibration.png and lift.png of all models on the same rows, importance.png where there is one."""
    directory.mkdir(parents=True, exist_ok=True)
    counted = {drawn(name): rows.kept(rows.weight_R > 0) for name, rows in models.items()}
    draw_calibration(counted, directory / "calibration.png")
    draw_lift(counted, directory / "lift.png")
    if found:
        draw_importance(found, directory / "importance.png")


def draw_calibration(models: Mapping[str, Scored], path: pathlib.Path) -> None:
    """Rate of clicks against mean probability, and below how many rows have which probability."""
    figure = _figure(figsize=(6, 6.4))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    most = 0.0
    for color, (name, rows) in enumerate(models.items()):
        bins = reliability(rows)
        above.errorbar(bins.prob_b, bins.rate_b, bins.error_b, fmt="o-", color=f"C{color}", markersize=4, label=name)
        below.hist(rows.prob_R, bins=50, weights=rows.weight_R, histtype="step", color=f"C{color}", label=name)
        most = max(most, bins.prob_b.max(), (bins.rate_b + bins.error_b).max())
    above.plot([0, most], [0, most], color="gray", linestyle="--", label="calibrated")
    counts = reliability(next(iter(models.values()))).rows_b
    each = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
    above.set(ylabel="rate of clicks", title=f"{len(counts)} bins by quantiles of the score, {each} rows each")
    below.set(xlabel="predicted probability", ylabel="rows", yscale="log")
    above.legend()
    _finish(figure, (above, below), path)


def draw_lift(models: Mapping[str, Scored], path: pathlib.Path) -> None:
    """Cumulative gain, and lift: how many times the rate of clicks the rows of the highest scores have."""
    figure = _figure(figsize=(10, 4.2))
    gain, lift = figure.subplots(1, 2)
    for name, rows in models.items():
        share, clicks = gain_curve(rows)
        gain.plot(share, clicks, label=name)
        shown = share >= 0.005  # Of fewer rows it is noise.
        lift.plot(share[shown], clicks[shown] / share[shown], label=name)
    rate = float(np.average(rows.label_R, weights=rows.weight_R))
    gain.plot([0, rate, 1], [0, 1, 1], color="gray", linestyle=":", label="best possible")
    gain.plot([0, 1], [0, 1], color="gray", linestyle="--", label="by chance")
    lift.axhline(1, color="gray", linestyle="--", label="by chance")
    gain.set(xlabel="share of rows, highest scores first", ylabel="share of all clicks", title="cumulative gain")
    lift.set(xlabel="share of rows, highest scores first", ylabel="times the rate of clicks", title="lift")
    lift.set_ylim(bottom=0)
    for axes in (gain, lift):
        axes.legend()
    _finish(figure, (gain, lift), path)


def draw_importance(found: Sequence[Importance], path: pathlib.Path) -> None:
    """Bars of what AUC and log loss lose, with the deviation over the repeats; the most important at the top."""
    shown = found[:_MOST_BARS][::-1]
    figure = _figure(figsize=(10, 1.4 + 0.28 * len(shown)))
    areas, losses = figure.subplots(1, 2, sharey=True)
    names = [drawn(one.column) for one in shown]
    for axes, label, values in (
        (areas, "AUC lost", [(one.auc_drop, one.auc_drop_deviation) for one in shown]),
        (losses, "log loss gained", [(one.log_loss_rise, one.log_loss_rise_deviation) for one in shown]),
    ):
        means, deviations = np.array(values).T
        bars = axes.barh(names, means, xerr=np.nan_to_num(deviations), color="C0", ecolor="gray")
        axes.bar_label(bars, fmt="%.4f", padding=3, fontsize=8)
        axes.margins(x=0.12)
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set(xlabel=f"{label} when the column is permuted")
    left_out = len(found) - len(shown)
    figure.suptitle("permutation importance" + (f", the first {len(shown)} of {len(found)} columns" * bool(left_out)))
    _finish(figure, (areas, losses), path)


def _figure(figsize: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure  # A second to import; no pyplot, so that no display is asked for.

    return Figure(figsize=figsize, layout="constrained")


def _finish(figure: Any, all_axes: Sequence[Any], path: pathlib.Path) -> None:
    for axes in all_axes:
        axes.set_axisbelow(True)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
