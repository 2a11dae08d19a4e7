"""The quality gate (`experiments/quality_gate.py`): what is a regression, and what is none."""

import json
import math

import pytest

from dlrm_jax.training.reporting import METRIC_COLUMNS
from experiments.quality_gate import BASELINES, Baseline, check, read_baselines

AUC = Baseline(0.8, 0.01, "higher")
LOSS = Baseline(0.5, 0.01, "lower")
CALIBRATION = Baseline(1.0, 0.05, "near")


@pytest.mark.parametrize(
    ("baseline", "value", "worse", "better"),
    [
        (AUC, 0.8, False, False),
        (AUC, 0.791, False, False),
        (AUC, 0.789, True, False),
        (AUC, 0.811, False, True),
        (LOSS, 0.509, False, False),
        (LOSS, 0.511, True, False),
        (LOSS, 0.48, False, True),
        (CALIBRATION, 1.04, False, False),
        (CALIBRATION, 1.06, True, False),
        (CALIBRATION, 0.94, True, False),
        (CALIBRATION, 1.0, False, False),
        (AUC, math.nan, True, False),
        (AUC, math.inf, True, False),
        (LOSS, -math.inf, True, False),
        (AUC, None, True, False),
        (AUC, "0.9", True, False),
        (AUC, True, True, False),
    ],
)
def test_a_metric_is_worse_in_its_own_direction(baseline, value, worse, better):
    verdict = check({"metric": value, "other": 0}, {"metric": baseline})
    assert (bool(verdict.regressions), bool(verdict.gains)) == (worse, better)
    assert all("metric is" in line for line in verdict.regressions + verdict.gains)


def test_a_metric_that_is_missing_is_a_regression():
    (line,) = check({"auc": 0.9}, {"log_loss": LOSS}).regressions
    assert line.startswith("log_loss is missing; the baseline 0.5")


@pytest.mark.parametrize("values", [(0.8, 0.0, "higher"), (math.nan, 0.1, "lower"), (0.8, 0.1, "more")])
def test_a_baseline_that_would_let_all_pass_is_none(values):
    with pytest.raises(ValueError, match=r"better is|must be finite"):
        Baseline(*values)


def test_baselines_are_of_metrics_that_a_result_has():
    for run in json.loads(BASELINES.read_text()):
        assert {"auc", "log_loss"} <= set(read_baselines(run)) <= set(METRIC_COLUMNS)
    with pytest.raises(ValueError, match="no run 'nobody'"):
        read_baselines("nobody")
