"""Tests `dlrm_jax/model/metrics.py` against scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from dlrm_jax.model.metrics import Metrics, auc, average_precision, batch_sums


def columns(seed: int, size: int = 300, levels: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties, and labels that depend on them."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(-levels, levels, size).astype(np.float32) * 3 / levels
    return logits, (rng.random(size) < 1 / (1 + np.exp(-logits))).astype(np.float32)


def collect(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None, parts: int = 3) -> Metrics:
    weights = np.ones_like(labels) if weights is None else weights
    collected = Metrics()
    for z, t, w in zip(*(np.array_split(x, parts) for x in (logits, labels, weights)), strict=True):
        prob = jax.nn.sigmoid(z)
        loss = jnp.zeros_like(prob)
        collected.append(jax.jit(batch_sums)(loss, jnp.asarray(z), prob, jnp.asarray(t), jnp.asarray(w)))
    return collected


@pytest.mark.parametrize("levels", [1, 7, 10000])
def test_auc_equals_scikit_learn(levels):
    logits, labels = columns(0, levels=levels)
    assert auc(logits, labels) == pytest.approx(sk.roc_auc_score(labels, logits), abs=1e-12)
    wanted = sk.average_precision_score(labels, logits)
    assert average_precision(logits, labels) == pytest.approx(wanted, abs=1e-12)


def test_weighted_areas_equal_scikit_learn():
    logits, labels = columns(1)
    weights = np.random.default_rng(0).integers(0, 4, len(labels))
    assert auc(logits, labels, weights) == pytest.approx(sk.roc_auc_score(labels, logits, sample_weight=weights))
    wanted = sk.average_precision_score(labels, logits, sample_weight=weights)
    assert average_precision(logits, labels, weights) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("labels", [np.zeros(4), np.ones(4), np.zeros(0)])
def test_auc_of_one_class_is_nan(labels):
    assert np.isnan(auc(np.arange(len(labels)), labels))


def test_auc_of_nan_scores_is_nan():
    assert np.isnan(auc(np.array([0.1, np.nan]), np.array([0, 1])))


def test_auc_leaves_out_rows_of_weight_zero():
    assert auc(np.array([1, 2, np.nan]), np.array([0, 1, 0]), np.array([1, 1, 0])) == 1
    assert np.isnan(auc(np.array([1, 2, 3]), np.array([1, 1, 0]), np.array([1, 1, 0])))


def test_metrics_equal_scikit_learn_and_leave_padding_out():
    logits, labels = columns(2)
    weights = (np.arange(len(labels)) < 200).astype(np.float32)
    values = collect(np.where(weights > 0, logits, 99), labels, weights).compute()
    z, t = logits[:200], labels[:200]
    p = 1 / (1 + np.exp(-z.astype(np.float64)))
    assert values["num_samples"] == 200
    assert values["auc"] == pytest.approx(sk.roc_auc_score(t, z))
    assert values["log_loss"] == pytest.approx(sk.log_loss(t, p), rel=1e-6)
    assert values["accuracy"] == pytest.approx(sk.accuracy_score(t, np.round(p)))
    assert values["pr_auc"] == pytest.approx(sk.average_precision_score(t, z))
    assert values["brier"] == pytest.approx(sk.brier_score_loss(t, p), rel=1e-6)
    assert values["calibration"] == pytest.approx(p.sum() / t.sum(), rel=1e-6)
    base = sk.log_loss(t, np.full(200, t.mean()))
    assert values["normalized_entropy"] == pytest.approx(values["log_loss"] / base, rel=1e-6)


def test_merged_metrics_equal_all_rows_in_any_order():
    logits, labels = columns(3)
    first, second = collect(logits[:100], labels[:100]), collect(logits[100:], labels[100:])
    assert first.merge(second).compute() == pytest.approx(collect(logits, labels).compute(), rel=1e-6)
    assert second.merge(first).compute() == pytest.approx(collect(logits, labels).compute(), rel=1e-6)


def test_probability_of_one_half_counts_as_no_click():
    values = collect(np.zeros(4, np.float32), np.array([0, 0, 0, 1], np.float32), parts=1).compute()
    assert values["accuracy"] == 0.75


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_leaves_auc_and_normalized_entropy_undefined(label):
    values = collect(np.zeros(4, np.float32), np.full(4, label, np.float32), parts=1).compute()
    assert np.isnan(values["auc"]) and np.isnan(values["normalized_entropy"])
    assert values["log_loss"] == pytest.approx(np.log(2)) and values["num_samples"] == 4


def test_no_rows_gives_nan_not_an_error():
    values = Metrics().compute()
    assert values["num_samples"] == 0 and np.isnan(values["auc"]) and np.isnan(values["log_loss"])
