"""Tests `dlrm_jax/judging/bootstrap.py`: who decides the draws, that pairs are pairs, and what intervals cover."""

import numpy as np
import pytest

from dlrm_jax.config import ConfigError
from dlrm_jax.judging import bootstrap
from dlrm_jax.judging.bootstrap import Bootstrap, difference, draws, resampled
from dlrm_jax.judging.measures import Measured, Units
from dlrm_jax.model.metrics import Scored
from tests.judging.logs import scored


def test_a_resample_is_of_seed_and_number_alone(monkeypatch):
    def all_of(how):
        return np.concatenate(list(draws(30, how)))

    first = all_of(Bootstrap(100, seed=5))
    assert first.shape == (100, 30) and (first.sum(axis=1) == 30).all()
    np.testing.assert_array_equal(all_of(Bootstrap(40, seed=5)), first[:40])
    assert (all_of(Bootstrap(100, seed=6)) != first).any()
    monkeypatch.setattr(bootstrap, "_HELD", 90)
    np.testing.assert_array_equal(all_of(Bootstrap(100, seed=5)), first)


def test_resampled_metrics_are_those_of_the_repeated_rows():
    rows, how = scored(0, rows=60), Bootstrap(40)
    of_all, of_part = (Measured(rows.kept(part), Units.of_rows(60).part(part)) for part in (slice(None), slice(20)))
    whole, part = resampled([of_all, of_part], 60, how)
    count_U = np.concatenate(list(draws(60, how)))[3].astype(int)
    for samples, drawn in ((whole, np.repeat(np.arange(60), count_U)), (part, np.repeat(np.arange(20), count_U[:20]))):
        want = Measured(rows.kept(drawn), Units.of_rows(len(drawn))).values()
        assert {name: values[3] for name, values in samples.items()} == pytest.approx(want, abs=1e-12)


def clustered(seed: int, users: int = 40, rows: int = 8) -> tuple[Scored, np.ndarray]:
    """Labels whose rate is a user's own, uniform in 0.2 to 0.8, and a model that says 0.5: its Brier score is 1/4.

    So is its calibration 1 in expectation, whatever the users, and varies with them.
    """
    rng = np.random.default_rng((11, seed))
    user_R = np.repeat(np.arange(users), rows)
    label = (rng.random(users * rows) < rng.uniform(0.2, 0.8, users)[user_R]).astype(np.float32)
    half = np.full(len(label), 0.5, np.float32)
    return Scored(np.zeros(len(label), np.float32), half, label, np.ones(len(label), np.float32)), user_R


def test_intervals_over_groups_cover_the_truth_as_often_as_they_say():
    how, covered = Bootstrap(200, confidence=0.9), []
    for seed in range(150):
        rows, user_R = clustered(seed)
        low, high = how.interval(resampled([Measured(rows, Units(user_R, 40, True))], 40, how)[0]["calibration"])
        covered.append(low <= 1 <= high)
    # Two and a half standard deviations of 150 trials around nine in ten; percentiles of 40 users are a little narrow.
    assert 0.82 <= np.mean(covered) <= 0.965


def test_rows_of_one_user_drawn_alone_would_give_too_narrow_intervals():
    rows, user_R = clustered(1, users=60, rows=30)
    how = Bootstrap(200)
    widths = []
    for units in (Units(user_R, 60, True), Units.of_rows(len(rows))):
        low, high = how.interval(resampled([Measured(rows, units)], units.num_units, how)[0]["calibration"])
        widths.append(high - low)
    assert widths[0] > 1.4 * widths[1]


def test_a_model_beside_itself_differs_by_nothing_and_a_better_one_shows():
    rows, how = scored(2), Bootstrap(200)
    noisy = Scored(rows.logits_R + np.random.default_rng(0).normal(size=400).astype(np.float32), *vars_of(rows))
    sets = [Measured(one, Units.of_rows(400)) for one in (rows, rows, noisy)]
    values, samples = [one.values()["auc"] for one in sets], [s["auc"] for s in resampled(sets, 400, how)]
    same = difference(values[0], values[1], samples[0], samples[1], how)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    worse = difference(values[0], values[2], samples[0], samples[2], how)
    assert worse.low <= worse.value <= worse.high < 0 and worse.p == pytest.approx(2 / 201)
    paired, unpaired = np.std(samples[2] - samples[0]), np.hypot(np.std(samples[2]), np.std(samples[0]))
    assert paired < 0.7 * unpaired


def vars_of(rows: Scored) -> tuple[np.ndarray, ...]:
    return rows.prob_R, rows.label_R, rows.weight_R


def test_undefined_resamples_are_left_out_and_most_of_them_give_nothing():
    how = Bootstrap(40, confidence=0.5)
    assert how.interval(np.array([1, 2, 3, np.nan])) == (1.5, 2.5)
    assert np.isnan(how.interval(np.array([1, np.nan]))).all()


@pytest.mark.parametrize(
    ("values", "words"), [((39, 0.95), "at least 40"), ((1000, 1.0), "between 0 and 1"), ((1000, 0.0), "between 0 and")]
)
def test_a_bootstrap_that_shows_no_tail_is_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        Bootstrap(*values)
