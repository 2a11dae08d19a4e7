"""Confidence intervals by the bootstrap over units, and of a difference of two models by the paired one.

As many units (groups such as users, else rows) as there are, drawn with replacement: the multinomial counts of Efron
and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 8 for units of several rows. Rows of one user are
alike, so that drawing rows would give intervals that are too narrow. Counts are weights on rows sorted once, so that
each resample's AUC is exact. Intervals are percentiles of the resamples.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from dlrm_jax.config import require
from dlrm_jax.judging.measures import Measured

_HELD = 1 << 20
"""Counts that are held at a time."""


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """How often to draw, how much an interval shall cover, and the seed that decides every draw."""

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            0 < self.confidence < 1, f"--confidence={self.confidence}: a share between 0 and 1, as 0.95, is expected"
        )
        least = int(np.ceil(round(2 / (1 - self.confidence), 6)))
        require(
            self.resamples >= least,
            f"--bootstrap={self.resamples} does not reach the tails of --confidence={self.confidence}; it takes at "
            f"least {least} resamples, better 1000",
        )

    def interval(self, samples_B: np.ndarray) -> tuple[float, float]:
        """(from, to) of some resamples; those where the metric is not defined are left out, NaN if most are."""
        defined = samples_B[~np.isnan(samples_B)]
        if 2 * len(defined) <= len(samples_B):
            return float("nan"), float("nan")
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(defined, [tail, 1 - tail])
        return float(low), float(high)

    def intervals(self, samples: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
        """`interval` of each metric."""
        return {name: self.interval(samples_B) for name, samples_B in samples.items()}


def draws(num_units: int, bootstrap: Bootstrap) -> Iterator[np.ndarray]:
    """How often each unit is drawn, (b, U) float64, until there are all resamples. Resample i is of (seed, i) alone."""
    at_once = max(1, min(64, _HELD // max(num_units, 1)))
    for start in range(0, bootstrap.resamples, at_once):
        numbers = range(start, min(start + at_once, bootstrap.resamples))
        count_bxU = np.empty((len(numbers), num_units))
        for place, number in enumerate(numbers):
            drawn = np.random.default_rng((bootstrap.seed, number)).integers(0, num_units, num_units)
            count_bxU[place] = np.bincount(drawn, minlength=num_units)
        yield count_bxU


def resampled(sets: Sequence[Measured], num_units: int, bootstrap: Bootstrap) -> list[dict[str, np.ndarray]]:
    """Of each set of rows its metrics in every resample, (B,) by name. All sets see the same draws.

    So two models' metrics are paired, and a slice is what of it the resampled log has.
    """
    parts: list[list[dict[str, np.ndarray]]] = [[] for _ in sets]
    for count_bxU in draws(num_units, bootstrap):
        for one, held in zip(sets, parts, strict=True):
            held.append(one.under(count_bxU))
    return [{name: np.concatenate([part[name] for part in held]) for name in held[0]} for held in parts]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Second model minus first: the difference, its interval, and `p`, what share of resamples speak against it.

    `p` is twice the share of resamples on the other side of zero, at most 1; zero itself counts once.
    """

    value: float
    low: float
    high: float
    p: float


def difference(first: float, second: float, first_B: np.ndarray, second_B: np.ndarray, how: Bootstrap) -> Difference:
    """The paired difference of one metric."""
    delta_B = second_B - first_B
    low, high = how.interval(delta_B)
    defined = delta_B[~np.isnan(delta_B)]
    least = min((defined <= 0).sum(), (defined >= 0).sum())
    share = min(1.0, 2 * (1 + least) / (len(defined) + 1)) if low == low else float("nan")
    return Difference(second - first, low, high, float(share))
