"""Tests `dlrm_jax/judging/measures.py` and `ranking.py` against scikit-learn and pandas, on rows that are repeated."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from dlrm_jax.judging.measures import MEASURES, Measured, Units
from dlrm_jax.judging.ranking import auc_by_group
from dlrm_jax.model.metrics import Scored
from tests.judging.logs import scored


def by_scikit_learn(rows: Scored, weight_R: np.ndarray) -> dict[str, float]:
    p, y, kept = rows.prob_R.astype(np.float64), rows.label_R, {"sample_weight": weight_R}
    rate = np.average(y, weights=weight_R)
    log_loss = sk.log_loss(y, p, **kept)
    return {
        "auc": sk.roc_auc_score(y, rows.logits_R, **kept),
        "log_loss": log_loss,
        "normalized_entropy": log_loss / sk.log_loss(y, np.full(len(y), rate), **kept),
        "calibration": np.average(p, weights=weight_R) / rate,
        "accuracy": sk.accuracy_score(y, np.round(p), **kept),
        "pr_auc": sk.average_precision_score(y, rows.logits_R, **kept),
        "brier": sk.brier_score_loss(y, p, **kept),
    }


def gauc_by_pandas(rows: Scored, group_R: np.ndarray, weight_R: np.ndarray) -> tuple[float, int]:
    """(GAUC, groups of one class)."""
    frame = pd.DataFrame({"group": group_R, "z": rows.logits_R, "y": rows.label_R, "w": weight_R})
    both = frame[frame.w > 0].groupby("group").filter(lambda part: part.y.nunique() == 2).groupby("group")
    of_group = both.apply(lambda part: sk.roc_auc_score(part.y, part.z, sample_weight=part.w))
    return float(np.average(of_group, weights=both.w.sum())), frame.group.nunique() - len(of_group)


@pytest.mark.parametrize("levels", [2, 9, 10**6], ids=["two scores", "ties", "no ties"])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_metric_under_counts_equals_scikit_learn(levels, weighted):
    rows = scored(1, levels=levels, weighted=weighted)
    rng = np.random.default_rng(2)
    group_R = rng.integers(0, 30, len(rows))
    counts = rng.integers(0, 3, (40, 30)).astype(float)
    got = Measured(rows, Units(group_R, 30, groups=True)).under(counts)
    assert set(got) == set(MEASURES)
    for i in (0, 7, 39):
        want = by_scikit_learn(rows, rows.weight_R * counts[i][group_R])
        assert {name: got[name][i] for name in want} == pytest.approx(want, abs=1e-7)


def test_gauc_equals_pandas_and_counts_groups_of_one_class():
    rows = scored(3, rows=300)
    group_R = np.random.default_rng(4).integers(0, 90, len(rows))
    want, left_out = gauc_by_pandas(rows, group_R, rows.weight_R)
    of_all = Measured(rows, Units(group_R, 90, groups=True))
    assert of_all.values()["gauc"] == pytest.approx(want, abs=1e-12)
    assert of_all.one_class_groups == left_out > 0 and of_all.num_groups == len(np.unique(group_R)) - left_out
    # A group drawn twice has its AUC once, and its impressions twice.
    auc_G, weight_G = auc_by_group(rows.logits_R, rows.label_R, rows.weight_R, group_R, 90)
    counts_G = np.arange(90.0) % 3
    kept = ~np.isnan(auc_G)
    drawn = float(np.average(auc_G[kept], weights=(counts_G * weight_G)[kept]))
    assert of_all.under(counts_G[None])["gauc"][0] == pytest.approx(drawn, abs=1e-12)


def test_weighted_gauc_equals_pandas():
    rows = scored(5, rows=300, weighted=True)
    group_R = np.arange(300) % 20
    kept = rows.weight_R > 0
    rows, group_R = rows.kept(kept), group_R[kept]
    want, _ = gauc_by_pandas(rows, group_R, rows.weight_R)
    assert Measured(rows, Units(group_R, 20, groups=True)).values()["gauc"] == pytest.approx(want, abs=1e-12)


def test_what_is_not_defined_is_nan():
    rows = scored(6, rows=20)
    one_class = rows.kept(rows.label_R == 0)
    values = Measured(one_class, Units.of_rows(len(one_class))).values()
    assert all(np.isnan(values[name]) for name in ("auc", "pr_auc", "normalized_entropy", "calibration"))
    assert values["log_loss"] > 0
    nothing = Measured(rows, Units.of_rows(20)).under(np.zeros((1, 20)))
    assert all(np.isnan(value_b[0]) for value_b in nothing.values())
