"""Tests `dlrm_jax/judging/importance.py` against scikit-learn on a model of two columns out of four."""

import jax
import numpy as np
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.inspection import permutation_importance

from dlrm_jax.config import ConfigError
from dlrm_jax.data.read.dataset import Split
from dlrm_jax.data.read.windows import GeneratedSplit, slice_rows
from dlrm_jax.judging.importance import Asked, importances, sampled
from dlrm_jax.model.loss import binary_cross_entropy
from dlrm_jax.model.metrics import Metrics, batch_sums
from tests.judging.logs import log_of, scored


def logits_of(user: np.ndarray, hour: np.ndarray) -> np.ndarray:
    return (np.sin(user) * 2 + hour * 0.3 - 1).astype(np.float32)


def labelled(rows: int = 600):
    """A log whose labels follow `user` and `hour`."""
    data = log_of(scored(0, rows))
    split = data.splits["test"]
    z = logits_of(split.ids_RxK[:, 0], split.dense_RxN[:, 0])
    label = (np.random.default_rng(1).random(rows) < 1 / (1 + np.exp(-z))).astype(np.float32)
    return data, Split(split.dense_RxN, split.ids_RxK, label, split.row_R)


@jax.jit
def _sums(z, label):
    loss, weight = binary_cross_entropy(z, label), jax.numpy.ones_like(z)
    return batch_sums(loss, z, jax.nn.sigmoid(z), label, weight)


def score(split: Split) -> Metrics:
    collected = Metrics()
    collected.append(_sums(logits_of(split.ids_RxK[:, 0], split.dense_RxN[:, 0]), split.label_R))
    return collected


class Model(ClassifierMixin, BaseEstimator):
    """The same for scikit-learn, of columns user and hour."""

    classes_ = np.array([0, 1])

    def fit(self, x, y):
        return self

    def predict_proba(self, x):
        p = 1 / (1 + np.exp(-logits_of(x[:, 0], x[:, 1]).astype(np.float64)))
        return np.stack([1 - p, p], axis=1)


def test_importances_are_scikit_learns_and_an_unused_column_has_none():
    data, split = labelled()
    found = {one.column: one for one in importances(score, data, split, Asked(repeats=20))}
    x = np.stack([split.ids_RxK[:, 0], split.dense_RxN[:, 0]], axis=1).astype(np.float64)
    scoring = ["roc_auc", "neg_log_loss"]
    want = permutation_importance(Model(), x, split.label_R, scoring=scoring, n_repeats=20, random_state=0)
    for i, name in enumerate(("user", "hour")):
        for scorer, mean, spread in (
            ("roc_auc", found[name].auc_drop, found[name].auc_drop_deviation),
            ("neg_log_loss", found[name].log_loss_rise, found[name].log_loss_rise_deviation),
        ):
            theirs = want[scorer]
            error = np.hypot(spread, theirs.importances_std[i]) / np.sqrt(20)
            assert abs(mean - theirs.importances_mean[i]) < 4 * error
            assert spread == pytest.approx(theirs.importances_std[i], rel=0.6)
    for name in ("history", "price"):
        assert (found[name].auc_drop, found[name].log_loss_rise, found[name].auc_drop_deviation) == (0, 0, 0)
    assert list(found)[:2] == ["user", "hour"] and found["user"].kind == "ids" and found["hour"].kind == "number"


def test_a_permutation_moves_a_whole_bag_and_nothing_else():
    data, split = labelled(50)
    seen = []

    def recording(part: Split) -> Metrics:
        seen.append(part)
        return score(part)

    importances(recording, data, split, Asked(repeats=1))
    before, _, history, hour, _ = seen
    assert before is split
    np.testing.assert_array_equal(history.ids_RxK[:, 0], split.ids_RxK[:, 0])
    np.testing.assert_array_equal(history.dense_RxN, split.dense_RxN)
    assert sorted(map(tuple, history.ids_RxK[:, 1:])) == sorted(map(tuple, split.ids_RxK[:, 1:]))
    assert (history.ids_RxK != split.ids_RxK).any()
    np.testing.assert_array_equal(hour.ids_RxK, split.ids_RxK)
    assert (hour.dense_RxN[:, 0] != split.dense_RxN[:, 0]).any()
    np.testing.assert_array_equal(hour.dense_RxN[:, 1], split.dense_RxN[:, 1])


def test_the_seed_decides_and_nothing_else():
    data, split = labelled(100)
    first = importances(score, data, split, Asked(repeats=3, seed=1))
    assert importances(score, data, split, Asked(repeats=3, seed=1)) == first
    assert importances(score, data, split, Asked(repeats=3, seed=2)) != first


def test_sampled_rows_are_some_of_them_in_order_whatever_the_windows():
    _, split = labelled(100)
    part = sampled(split, 30, seed=3)
    assert len(part) == 30 and (np.diff(part.row_R) > 0).all()
    np.testing.assert_array_equal(part.ids_RxK, split.ids_RxK[part.row_R])
    blocked = GeneratedSplit(0, 100, 7, lambda i: slice_rows(split, 7 * i, min(7 * i + 7, 100)))
    np.testing.assert_array_equal(sampled(blocked, 30, seed=3).row_R, part.row_R)
    assert len(sampled(split, 1000, seed=3)) == 100


@pytest.mark.parametrize(("asked", "words"), [({"repeats": 0}, "repeats=0"), ({"rows": 1}, "rows=1")])
def test_what_cannot_be_asked_is_refused(asked, words):
    with pytest.raises(ConfigError, match=words):
        Asked(**asked)
