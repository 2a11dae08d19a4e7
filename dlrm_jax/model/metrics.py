"""Evaluation metrics, collected on device, mergeable, and exact: AUC by ranks, with ties, not by bins."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlrm_jax.model.loss import binary_cross_entropy


class BatchSums(struct.PyTreeNode):
    """What one evaluated batch adds: weighted sums, and the columns that ranking needs. Weight 0 is padding."""

    loss: jax.Array
    log_loss: jax.Array
    correct: jax.Array
    prob: jax.Array
    label: jax.Array
    weight: jax.Array
    logits_B: jax.Array
    prob_B: jax.Array
    label_B: jax.Array
    weight_B: jax.Array


def batch_sums(
    loss_B: jax.Array, logits_B: jax.Array, prob_B: jax.Array, label_B: jax.Array, weight_B: jax.Array
) -> BatchSums:
    """The sums of one batch, for use inside a jitted step. A probability of exactly 0.5 rounds to 0, as in NumPy.

    A row of weight 0 adds nothing, even where its loss, logit or label is not a number.
    """

    def weighted(values_B: jax.Array) -> jax.Array:
        return jnp.where(weight_B > 0, values_B * weight_B, 0).sum()

    return BatchSums(
        loss=weighted(loss_B),
        log_loss=weighted(binary_cross_entropy(logits_B, label_B)),
        correct=weighted(jnp.round(prob_B) == label_B),
        prob=weighted(prob_B),
        label=weighted(label_B),
        weight=weight_B.sum(),
        logits_B=logits_B,
        prob_B=prob_B,
        label_B=label_B,
        weight_B=weight_B,
    )


class Metrics:
    """Collects BatchSums without waiting for the device, merges with others, computes once."""

    def __init__(self) -> None:
        self._batches: list[BatchSums] = []

    def append(self, sums: BatchSums) -> None:
        """Add a batch."""
        self._batches.append(sums)

    def merge(self, other: "Metrics") -> "Metrics":
        """The metrics of both sets of rows together."""
        merged = Metrics()
        merged._batches = self._batches + other._batches
        return merged

    def compute(self) -> dict[str, Any]:
        """`loss` (the training loss), auc, log_loss, normalized_entropy, calibration, accuracy, num_samples.

        Sums of batches are added in float64. What is not defined (AUC of one class, no rows) is NaN.
        """
        batches = jax.device_get(self._batches)
        total = {
            name: sum(float(getattr(batch, name)) for batch in batches)
            for name in ("loss", "log_loss", "correct", "prob", "label", "weight")
        }
        columns = [
            np.concatenate([getattr(batch, name) for batch in batches]) if batches else np.zeros(0)
            for name in ("logits_B", "label_B", "weight_B")
        ]
        rows = total["weight"]
        log_loss = _ratio(total["log_loss"], rows)
        return {
            "loss": _ratio(total["loss"], rows),
            "auc": auc(*columns),
            "log_loss": log_loss,
            "normalized_entropy": _ratio(log_loss, _entropy(_ratio(total["label"], rows))),
            "calibration": _ratio(total["prob"], total["label"]),
            "accuracy": _ratio(total["correct"], rows),
            "num_samples": int((columns[2] > 0).sum()),
        }


def auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs ranked rightly, ties counting one half.

    Rows of weight 0 do not count; NaN unless both classes occur. Labels above one half are positive.
    """
    scores = np.asarray(scores)
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    keep = weights > 0
    scores, positive, weights = scores[keep], np.asarray(labels)[keep] > 0.5, weights[keep]
    if np.isnan(scores).any() or positive.all() or not positive.any():
        return float("nan")
    order = np.argsort(scores, kind="stable")
    scores = scores[order]
    positive_weight, negative_weight = weights[order] * positive[order], weights[order] * ~positive[order]
    starts = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]]))
    positives, negatives = np.add.reduceat(positive_weight, starts), np.add.reduceat(negative_weight, starts)
    negatives_below = np.cumsum(negatives) - negatives
    ranked_rightly = (positives * (negatives_below + negatives / 2)).sum()
    return float(ranked_rightly / positives.sum() / negatives.sum())


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")


def _entropy(rate: float) -> float:
    """Entropy, in nats, of a click with probability `rate`: the log loss of always predicting the base rate."""
    if not 0 < rate < 1:
        return 0.0
    return float(-rate * np.log(rate) - (1 - rate) * np.log1p(-rate))
