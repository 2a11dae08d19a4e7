"""Evaluation metrics, collected on device, mergeable, and exact: areas by ranks, with ties, not by bins."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlrm_jax.config import LossConfig
from dlrm_jax.model.loss import binary_cross_entropy, clipped, example_losses


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


def scored_sums(
    loss: LossConfig, logits_B: jax.Array, prob_B: jax.Array, label_B: jax.Array, weight_B: jax.Array
) -> BatchSums:
    """`batch_sums` of a model's bare logits and of the probabilities that it predicts: with a threshold all metrics are
    of these."""
    losses_B = example_losses(loss, logits_B, label_B)
    return batch_sums(losses_B, clipped(logits_B, loss.threshold), prob_B, label_B, weight_B)


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scored rows on the host, float32: logit (clipped as the loss clips), probability, label and weight of each."""

    logits_R: np.ndarray
    prob_R: np.ndarray
    label_R: np.ndarray
    weight_R: np.ndarray

    def __len__(self) -> int:
        return len(self.label_R)

    @property
    def error_R(self) -> np.ndarray:
        """Probability minus label, float64."""
        return self.prob_R.astype(np.float64) - self.label_R

    def kept(self, which: np.ndarray | slice) -> "Scored":
        """Some of them."""
        return Scored(*(column[which] for column in (self.logits_R, self.prob_R, self.label_R, self.weight_R)))


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

    def scored(self, first: int | None = None) -> Scored:
        """The `first` rows that were collected, whatever their weight; without it all but those of weight 0."""
        rows = _scored(jax.device_get(self._batches))
        return rows.kept(rows.weight_R > 0) if first is None else rows.kept(slice(first))

    def compute(self) -> dict[str, Any]:
        """The metrics by name, those of reporting.METRIC_COLUMNS and `loss`, the training loss.

        `pr_auc` is the average precision, `brier` the mean square of probability minus label. Sums of batches are
        added in float64. What is not defined (AUC of one class, no rows) is NaN.
        """
        batches = jax.device_get(self._batches)
        total = {
            name: sum(float(getattr(batch, name)) for batch in batches)
            for name in ("loss", "log_loss", "correct", "prob", "label", "weight")
        }
        rows = _scored(batches)
        rows = rows.kept(rows.weight_R > 0)
        of_auc, of_precision = areas(rows.logits_R, rows.label_R, rows.weight_R)
        weight = total["weight"]
        log_loss = _ratio(total["log_loss"], weight)
        return {
            "loss": _ratio(total["loss"], weight),
            "auc": of_auc,
            "log_loss": log_loss,
            "normalized_entropy": _ratio(log_loss, _entropy(_ratio(total["label"], weight))),
            "calibration": _ratio(total["prob"], total["label"]),
            "accuracy": _ratio(total["correct"], weight),
            "pr_auc": of_precision,
            "brier": _ratio(float((rows.weight_R * np.square(rows.error_R)).sum()), weight),
            "num_samples": len(rows),
        }


def _scored(batches: list[BatchSums]) -> Scored:
    return Scored(
        *(
            np.concatenate([np.zeros(0, np.float32), *(getattr(batch, name) for batch in batches)])
            for name in ("logits_B", "prob_B", "label_B", "weight_B")
        )
    )


def auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs ranked rightly, ties counting one half.

    Rows of weight 0 do not count; NaN unless both classes occur. Labels above one half are positive.
    """
    return areas(scores, labels, weights)[0]


def average_precision(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Area under the precision-recall curve: the mean precision at each positive, equal scores being taken at once.

    By steps, not by trapezoids, which would promise too much (Davis and Goadrich, 2006); rows as in `auc`.
    """
    return areas(scores, labels, weights)[1]


def areas(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """(`auc`, `average_precision`) from one sort."""
    scores = np.asarray(scores)
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    keep = weights > 0
    scores, positive, weights = scores[keep], np.asarray(labels)[keep] > 0.5, weights[keep]
    if np.isnan(scores).any() or positive.all() or not positive.any():
        return float("nan"), float("nan")
    order = np.argsort(scores, kind="stable")
    scores = scores[order]
    positive_weight, negative_weight = weights[order] * positive[order], weights[order] * ~positive[order]
    starts = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]]))
    positives, negatives = np.add.reduceat(positive_weight, starts), np.add.reduceat(negative_weight, starts)
    negatives_below = np.cumsum(negatives) - negatives
    ranked_rightly = (positives * (negatives_below + negatives / 2)).sum()
    at_least, at_least_negative = (np.cumsum(part[::-1])[::-1] for part in (positives, negatives))
    precision = at_least / (at_least + at_least_negative)
    of_auc = float(ranked_rightly / positives.sum() / negatives.sum())
    return of_auc, float((positives * precision).sum() / positives.sum())


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")


def _entropy(rate: float) -> float:
    """Entropy, in nats, of a click with probability `rate`: the log loss of always predicting the base rate."""
    if not 0 < rate < 1:
        return 0.0
    return float(-rate * np.log(rate) - (1 - rate) * np.log1p(-rate))
