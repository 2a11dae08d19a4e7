"""Tests `dlrm_jax/judging/pictures.py`: what is drawn equals scikit-learn's, and files are pictures."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from dlrm_jax.judging.importance import Importance
from dlrm_jax.judging.pictures import draw_all, gain_curve, reliability
from tests.judging.logs import scored


def test_reliability_is_scikit_learns_and_counts_all_rows():
    rows = scored(0, levels=10**6)
    bins = reliability(rows, 10)
    rate, prob = calibration_curve(rows.label_R, rows.prob_R, n_bins=10, strategy="quantile")
    np.testing.assert_allclose(bins.rate_b, rate)
    np.testing.assert_allclose(bins.prob_b, prob, rtol=1e-6)
    assert bins.rows_b.tolist() == [40] * 10
    np.testing.assert_allclose(bins.error_b, 1.96 * np.sqrt(rate * (1 - rate) / 40))
    assert reliability(scored(0, levels=1), 10).rows_b.sum() == 400


def test_gain_takes_ties_at_once_and_counts_weights():
    rows = scored(1, levels=2, weighted=True)
    share, clicks = gain_curve(rows)
    assert share[0] == clicks[0] == 0 and share[-1] == pytest.approx(1) and clicks[-1] == pytest.approx(1)
    assert len(share) == len(np.unique(rows.logits_R)) + 1
    top = rows.logits_R == rows.logits_R.max()
    assert share[1] == pytest.approx(rows.weight_R[top].sum() / rows.weight_R.sum())
    assert clicks[1] == pytest.approx((rows.weight_R * rows.label_R)[top].sum() / (rows.weight_R * rows.label_R).sum())


def test_pictures_are_written(tmp_path):
    found = [Importance(f"column $^{i}$", "ids", 0.1 / (i + 1), float("nan"), 0.2, 0.01) for i in range(50)]
    draw_all(tmp_path / "new", {"runs/$a^^$": scored(0), "b": scored(0, levels=3, weighted=True)}, found)
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"calibration.png", "lift.png", "importance.png"}
    assert all((tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG") for name in names)


@pytest.mark.filterwarnings("error")
def test_one_class_and_one_score_are_drawn_without_a_warning(tmp_path):
    rows = scored(0)
    for name, part in {"none": rows.label_R < 1, "all": rows.label_R > 0, "one": np.arange(400) < 1}.items():
        found = [Importance("user", "ids", float("nan"), float("nan"), 0.0, 0.0)]
        draw_all(tmp_path / name, {name: rows.kept(part)}, found)
        assert (tmp_path / name / "calibration.png").read_bytes().startswith(b"\x89PNG")
