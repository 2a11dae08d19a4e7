"""Dense columns: what a number becomes, in preparation and in serving. NumPy alone."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlrm_jax.data.schema.schema import Dense
from dlrm_jax.data.values.transforms import TRANSFORMS

LARGEST = 1e30
"""Numbers whose mean is taken must stay squarable, and fit into float32."""

_ROUNDING = 64 * 2.0**-52
"""What the mean of a column can be off by, as a share of it: pairwise sums of chunks, merged one after the other."""


@dataclasses.dataclass
class DenseStatistics:
    """Of one dense column over all rows, missing ones left out."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""
    least: float = float("inf")

    def add(self, values: np.ndarray) -> None:
        """Merge the statistics of some values (Chan, Golub, LeVeque 1979, equation 2.1)."""
        values = values[~np.isnan(values)]
        if not len(values):
            return
        mean = float(values.mean())
        count, delta = self.count + len(values), mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + delta**2 * self.count * len(values) / count
        self.mean += delta * len(values) / count
        self.count, self.least = count, min(self.least, float(values.min()))

    @property
    def constant(self) -> bool:
        """Whether all values are one number, but for what rounding makes of sums of it."""
        if not self.count:
            return True
        return bool((self.squares / self.count) ** 0.5 <= _ROUNDING * max(abs(self.mean), abs(self.least)))

    @property
    def centre(self) -> float:
        """The mean; of a constant column its number itself, so that nothing is left when it is taken off."""
        return self.least if self.constant and self.count else self.mean

    @property
    def deviation(self) -> float:
        """The standard deviation; 1 for a constant column."""
        return 1.0 if self.constant else float((self.squares / self.count) ** 0.5)


def transform(name: str, numbers: np.ndarray) -> np.ndarray:
    """The transforms that need nothing but the number, as float32; not finite where they are not defined."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return TRANSFORMS.get(name)(numbers).astype(np.float32)


def finish_dense(dense: Dense, values: np.ndarray, own: DenseStatistics, least: float) -> np.ndarray:
    """The transforms that need statistics, NaN being missing; `least` is that of all torchrec_log columns."""
    values = np.where(np.isnan(values), own.centre, values)
    if dense.transform == "torchrec_log":
        values = np.log(values - least + 2)
    elif dense.transform == "standardise":
        values = (values - own.centre) / own.deviation
    else:
        values = transform(dense.transform, values)
    return values.astype(np.float32)


def inverse(name: str, values: np.ndarray) -> np.ndarray:
    """The numbers that `transform` made `values` of; those below 0 as 0, where it took them so."""
    if name == "log1p":
        return np.expm1(values)
    return np.exp(values) - 3 if name == "nvidia_log" else values


def in_log(schema_dense: Sequence[Dense], name: str, values: np.ndarray, statistics: Mapping[str, Any]) -> np.ndarray:
    """`values` of column `name`, as the model gets them, as the log has them; `statistics` as statistics.json has them.

    KeyError for a transform of which nobody knows the way back.
    """
    dense = next(one for one in schema_dense if one.name == name)
    if dense.transform == "standardise":
        own = DenseStatistics(**statistics[name])
        return values * own.deviation + own.centre
    if dense.transform == "torchrec_log":
        least = min(statistics[one.name]["least"] for one in schema_dense if one.transform == "torchrec_log")
        return np.exp(values) - 2 + least
    if dense.transform not in ("none", "log1p", "nvidia_log"):
        raise KeyError(dense.transform)
    return inverse(dense.transform, values)


@dataclasses.dataclass
class DenseRange:
    """What a person wants to know of a dense column: least, most, mean of the log's numbers, how many are missing."""

    rows: int = 0
    missing: int = 0
    total: float = 0.0
    least: float = float("inf")
    most: float = -float("inf")

    def add(self, numbers: np.ndarray, missing: np.ndarray) -> None:
        """Count some rows; what stands in `numbers` where they are missing does not matter."""
        count = int(missing.sum())
        self.rows, self.missing = self.rows + len(numbers), self.missing + count
        present = numbers[~missing] if count else numbers
        if len(present):
            self.total += float(present.sum(dtype=np.float64))
            self.least, self.most = min(self.least, float(present.min())), max(self.most, float(present.max()))

    def summary(self) -> dict[str, float | None]:
        """As statistics.json has it; None for the numbers of a column without any."""
        count = self.rows - self.missing
        share = round(self.missing / self.rows, 6) if self.rows else None
        if not count:
            return {"least": None, "most": None, "mean": None, "missing_share": share}
        return {"least": self.least, "most": self.most, "mean": self.total / count, "missing_share": share}
