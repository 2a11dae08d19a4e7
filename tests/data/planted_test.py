"""Tests `dlrm_jax/data/generate/planted.py`."""

import numpy as np
import pytest

from dlrm_jax.config import EMPTY_SLOT, ConfigError
from dlrm_jax.data.batch import check_ids
from dlrm_jax.data.generate import planted
from dlrm_jax.data.read.periods import rows_of_period
from dlrm_jax.model.metrics import auc
from dlrm_jax.training.run_config import ModelOptions


def test_same_seed_same_data_other_seed_other_data():
    a, b, c = (planted.generate(seed, 1000) for seed in (3, 3, 4))
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()


def test_ids_fit_their_tables_and_follow_a_power_law():
    data = planted.generate(0, 20000)
    model = ModelOptions(embedding_dim=4, bottom_mlp=(4,), top_mlp=(1,)).build(data)
    ids = data.splits["train"].ids_RxK
    check_ids(model, ids)
    counts = np.sort(np.bincount(ids[:, 0], minlength=600))[::-1]
    assert counts[0] > 5 * counts[9] > 0
    assert (ids == EMPTY_SLOT).any()


def test_optimum_is_what_the_teacher_scores_and_beats_a_shuffled_teacher():
    data = planted.generate(0, 20000)
    optimum = data.optimum["test"]
    labels = data.splits["test"].label_R
    base = labels.mean()
    assert 0.75 < optimum["auc"] < 0.95
    assert optimum["log_loss"] < -(base * np.log(base) + (1 - base) * np.log(1 - base))
    assert auc(np.random.default_rng(0).random(len(labels)), labels) < optimum["auc"] - 0.2


def test_labels_are_coin_flips_of_the_teacher():
    # Were the teacher miscalibrated, its expected log loss would not equal the realised one.
    _, prob = planted._Log.of(0).rows(0, 20000)
    entropy = -(prob * np.log(prob) + (1 - prob) * np.log1p(-prob)).mean()
    realised = np.mean([planted.generate(0, 20000).optimum[split]["log_loss"] for split in ("val", "test")])
    assert abs(entropy - realised) < 0.02


def test_too_few_examples_are_refused():
    with pytest.raises(ConfigError, match="num_examples is 9"):
        planted.generate(0, 9)


def test_smallest_log_has_all_splits():
    data = planted.generate(0, 10)
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [8, 1, 1]


def test_a_teacher_walks_from_period_to_period_and_the_optimum_is_its_own():
    still, walking = (planted.generate_periods(0, 20_000, 5, drift) for drift in (0.0, 0.6))
    assert [(one.split, one.first, one.rows) for one in walking.periods] == [
        *(("train", first, 4000) for first in (0, 4000, 8000)),
        ("val", 0, 4000),
        ("test", 0, 4000),
    ]
    for data in (still, walking):
        for period in data.periods:
            rows = rows_of_period(data, period)
            assert rows.label_R.sum() == period.positives and 0.7 < data.optimum[period.name]["auc"] < 0.95
    np.testing.assert_array_equal(still.splits["test"].ids_RxK, walking.splits["test"].ids_RxK)
    log = planted._Log.of(0)
    for data, loses in ((still, False), (walking, True)):
        last = data.splits["test"]
        prob_R = log.teacher.probability(last.dense_RxN, last.ids_RxK)
        assert (auc(prob_R, last.label_R) < data.optimum["test"]["auc"] - 0.05) == loses


@pytest.mark.parametrize(
    ("examples", "periods", "words"),
    [
        (100, 2, "num_periods is 2; train, val and test need 3"),
        (3, 4, "num_periods is 4, more than num_examples, 3"),
        (5_000_001, 4, "kept in memory: at most 5,000,000"),
    ],
)
def test_periods_that_cannot_be_are_refused(examples, periods, words):
    with pytest.raises(ConfigError, match=words):
        planted.generate_periods(0, examples, periods, 0.1)
