"""Every metric of some rows under any weighting of their units: what the bootstrap asks for thousands of times."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from dlrm_jax.judging.ranking import Ranking, auc_by_group
from dlrm_jax.model.metrics import Scored

MEASURES = ("auc", "gauc", "log_loss", "normalized_entropy", "calibration", "accuracy", "pr_auc", "brier")


@dataclasses.dataclass(frozen=True)
class Units:
    """Rows that are drawn together: `unit_R` numbers each row's unit, of `num_units`. Of `groups` there is a GAUC."""

    unit_R: np.ndarray
    num_units: int
    groups: bool = False

    @classmethod
    def of_rows(cls, num_rows: int) -> "Units":
        """Each row by itself."""
        return cls(np.arange(num_rows), num_rows)

    def only(self, which: np.ndarray) -> "Units":
        """The units of some of the rows, numbered anew: there are no others."""
        units, number_R = np.unique(self.unit_R[which], return_inverse=True)
        return dataclasses.replace(self, unit_R=number_R, num_units=len(units))

    def part(self, which: np.ndarray) -> "Units":
        """Those of a part of the rows, a slice, which stay numbered as in the whole."""
        return dataclasses.replace(self, unit_R=self.unit_R[which])


class Measured:
    """Scored rows, of which every metric is had for any counts of their units, exactly and without another sort.

    Sums are by unit, so that they are a product with the counts; AUC and PR-AUC walk the rows sorted once
    (ranking.py); of a group, its AUC does not depend on how often it is drawn.
    """

    def __init__(self, rows: Scored, units: Units) -> None:
        self.num_rows = len(rows)
        self._num_units = units.num_units
        self._ranking = Ranking(rows.logits_R, rows.label_R, rows.weight_R, units.unit_R)
        self._unit_u, local_R = np.unique(units.unit_R, return_inverse=True)
        columns = _columns(rows)
        self._sums_uxm = np.stack([np.bincount(local_R, c, len(self._unit_u)) for c in columns.values()], axis=1)
        self._names = tuple(columns)
        self._groups = units.groups
        if units.groups:
            auc_u, weight_u = auc_by_group(rows.logits_R, rows.label_R, rows.weight_R, local_R, len(self._unit_u))
            both = ~np.isnan(auc_u)
            self.num_groups, self.one_class_groups = int(both.sum()), int((~both).sum())
            self.one_class_share = _share(weight_u[~both].sum(), weight_u.sum())
            self._weight_of_auc_ux2 = np.stack([np.where(both, auc_u * weight_u, 0), both * weight_u], axis=1)

    def values(self) -> dict[str, float]:
        """The metrics of the rows as they are, float64 sums; NaN for what is not defined."""
        return {name: float(value_b[0]) for name, value_b in self.under(np.ones((1, self._num_units))).items()}

    def under(self, count_bxU: np.ndarray) -> dict[str, np.ndarray]:
        """MEASURES by name, `gauc` where there are groups; each (b,), one number a weighting. Counts are float64."""
        count_bxu = count_bxU if len(self._unit_u) == self._num_units else count_bxU.take(self._unit_u, axis=1)
        sums = dict(zip(self._names, (count_bxu @ self._sums_uxm).T, strict=True))
        auc_b, precision_b = self._ranking.areas(count_bxU)
        with np.errstate(invalid="ignore", divide="ignore"):
            log_loss_b = sums["log_loss"] / sums["weight"]
            out = {
                "auc": auc_b,
                "log_loss": log_loss_b,
                "normalized_entropy": log_loss_b / _entropy(sums["label"] / sums["weight"]),
                "calibration": sums["prob"] / sums["label"],
                "accuracy": sums["correct"] / sums["weight"],
                "pr_auc": precision_b,
                "brier": sums["squared_error"] / sums["weight"],
            }
            if self._groups:
                weighted_b, weight_b = (count_bxu @ self._weight_of_auc_ux2).T
                out["gauc"] = weighted_b / weight_b
        out["calibration"] = np.where(np.isfinite(out["calibration"]), out["calibration"], np.nan)
        return {name: out[name] for name in MEASURES if name in out}


def _columns(rows: Scored) -> Mapping[str, np.ndarray]:
    """What each row adds to the sums, float64."""
    logit, label, weight = (c.astype(np.float64) for c in (rows.logits_R, rows.label_R, rows.weight_R))
    log_loss = np.maximum(logit, 0) - logit * label + np.log1p(np.exp(-np.abs(logit)))
    return {
        "weight": weight,
        "log_loss": weight * log_loss,
        "correct": weight * (np.round(rows.prob_R) == rows.label_R),
        "prob": weight * rows.prob_R,
        "label": weight * label,
        "squared_error": weight * np.square(rows.error_R),
    }


def _entropy(rate_b: np.ndarray) -> np.ndarray:
    """Entropy of a click with each probability, in nats; NaN where all or none are clicks, as 0 times log 0 is."""
    return -rate_b * np.log(rate_b) - (1 - rate_b) * np.log1p(-rate_b)


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
