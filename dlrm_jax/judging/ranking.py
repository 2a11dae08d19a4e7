"""Areas under curves for many weightings of the same rows from one sort, and AUC within groups."""

import numpy as np

_PIECE = 1 << 17
"""Weights that are worked on at a time: a megabyte, so that they stay in a core's cache."""


class Ranking:
    """Rows in the order of their scores, the highest first; each further weighting of them costs no sort.

    `unit_R` says which unit (a row, a user) each row belongs to: a weighting gives each unit a count, and a row weighs
    its `weight_R` times the count of its unit. Labels above one half are positive, as in model/metrics.py.
    """

    def __init__(self, score_R: np.ndarray, label_R: np.ndarray, weight_R: np.ndarray, unit_R: np.ndarray) -> None:
        order = np.argsort(-score_R, kind="stable")
        score_R, positive_R, weight_R = score_R[order], label_R[order] > 0.5, weight_R[order].astype(np.float64)
        self._defined = not np.isnan(score_R).any()
        self._unit_R = unit_R[order]
        self._positive_R, self._negative_R = weight_R * positive_R, weight_R * ~positive_R
        last_R = np.append(score_R[1:] != score_R[:-1], True)[: len(score_R)]
        ends_T = np.flatnonzero(last_R) + 1  # Rows of one score are a tie: they come all at once.
        starts_T = np.concatenate([[0], ends_T[:-1]]) if len(ends_T) else ends_T
        has_positive = np.add.reduceat(positive_R, starts_T) > 0 if len(ends_T) else np.zeros(0, bool)
        self._starts_T, self._ends_T = starts_T[has_positive], ends_T[has_positive]

    def areas(self, count_bxU: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(AUC_b, average precision_b), one of each weighting; NaN where it leaves no row of one class."""
        rows = max(1, _PIECE // max(len(self._unit_R), 1))
        parts = [self._areas(count_bxU[i : i + rows]) for i in range(0, len(count_bxU), rows)]
        auc_b, precision_b = (np.concatenate(part) for part in zip(*parts, strict=True))
        return auc_b, precision_b

    def _areas(self, count_bxU: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not self._defined or not len(self._ends_T):
            return np.full(len(count_bxU), np.nan), np.full(len(count_bxU), np.nan)
        count_bxR = count_bxU.take(self._unit_R, axis=1)
        positives_bxR = _running_sum(count_bxR * self._positive_R)
        negatives_bxR = _running_sum(count_bxR * self._negative_R)
        # What is scored above each tie that has a positive, and what is scored so or above.
        above_p, with_p = (positives_bxR.take(i, axis=1) for i in (self._starts_T, self._ends_T))
        above_n, with_n = (negatives_bxR.take(i, axis=1) for i in (self._starts_T, self._ends_T))
        positive, negative = positives_bxR[:, -1], negatives_bxR[:, -1]
        here = with_p - above_p
        with np.errstate(invalid="ignore", divide="ignore"):
            below = negative[:, None] - (above_n + with_n) / 2  # Ties count one half.
            auc_b = (here * below).sum(axis=1) / (positive * negative)
            precision = np.where(here > 0, with_p / (with_p + with_n), 0)
            precision_b = np.where(negative > 0, (here * precision).sum(axis=1) / positive, np.nan)
        return auc_b, precision_b


def _running_sum(values_bxR: np.ndarray) -> np.ndarray:
    """(b, R + 1): the sum of what comes before each row, and of all."""
    out = np.empty((len(values_bxR), values_bxR.shape[1] + 1))
    out[:, 0] = 0
    np.cumsum(values_bxR, axis=1, out=out[:, 1:])
    return out


def auc_by_group(
    score_R: np.ndarray, label_R: np.ndarray, weight_R: np.ndarray, group_R: np.ndarray, num_groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """(AUC_G, weight_G) of the rows of each group; NaN for a group that has not both classes.

    The weighted mean of what is not NaN is GAUC (Zhu et al., 2017, "Optimized Cost per Click in Taobao").
    """
    weight_R = weight_R.astype(np.float64)
    order = np.lexsort((score_R, group_R))
    score, group, positive = score_R[order], group_R[order], label_R[order] > 0.5
    new_group = np.append(True, group[1:] != group[:-1])[: len(group)]
    first_T = np.flatnonzero(new_group | np.append(True, score[1:] != score[:-1])[: len(group)])
    auc_G, weight_G = np.full(num_groups, np.nan), np.bincount(group_R, weight_R, num_groups)
    if not len(first_T):
        return auc_G, weight_G
    positive_T = np.add.reduceat(weight_R[order] * positive, first_T)
    negative_T = np.add.reduceat(weight_R[order] * ~positive, first_T)
    group_T = group[first_T]
    positive_G, negative_G = (np.bincount(group_T, part, num_groups) for part in (positive_T, negative_T))
    before_G = np.cumsum(negative_G) - negative_G  # In groups that are sorted before this one.
    below_T = np.cumsum(negative_T) - negative_T - before_G[group_T]
    right_G = np.bincount(group_T, positive_T * (below_T + negative_T / 2), num_groups)
    both = (positive_G > 0) & (negative_G > 0)
    auc_G[both] = right_G[both] / (positive_G[both] * negative_G[both])
    return auc_G, weight_G
