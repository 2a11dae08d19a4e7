"""A click log with a known answer: a hidden DLRM-like teacher labels power-law ids, so the best score is known.

Each id has a bias and a short vector, a bag is the sum of its ids; the teacher's logit adds the biases, a small
nonlinear function of the dense features, and all dot products of features. Labels are coin flips with its probability.
"""

import dataclasses

import numpy as np

from dlrm_jax.batch import EMPTY_SLOT
from dlrm_jax.config import ConfigError, FeatureConfig
from dlrm_jax.data.dataset import Dataset, Split
from dlrm_jax.metrics import auc

DEFAULT_EXAMPLES = 400_000
_NUM_DENSE = 6
_TEACHER_DIM = 3
_POWER = 1.1
"""Exponent of the id frequencies: the k-th most frequent id occurs in proportion to k^-1.1."""

_TABLE_SIZES = {"user": 600, "item": 300, "publisher": 100, "topic": 60, "hour": 24, "device": 8, "country": 40}
_FEATURES = (
    FeatureConfig("user", "user"),
    FeatureConfig("item", "item"),
    FeatureConfig("recent_items", "item", hotness=4),
    FeatureConfig("publisher", "publisher"),
    FeatureConfig("topics", "topic", hotness=3, pooling="mean"),
    FeatureConfig("hour", "hour"),
    FeatureConfig("device", "device"),
    FeatureConfig("country", "country"),
)
_INTERCEPT = -1.2
_BIAS_SCALE = 0.6
_VECTOR_SCALE = 0.2


@dataclasses.dataclass(frozen=True)
class _Teacher:
    bias: dict[str, np.ndarray]
    vector: dict[str, np.ndarray]
    dense_weight_N: np.ndarray
    dense_square_N: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "_Teacher":
        return cls(
            bias={name: rng.normal(0, _BIAS_SCALE, rows) for name, rows in _TABLE_SIZES.items()},
            vector={name: rng.normal(0, _VECTOR_SCALE, (rows, _TEACHER_DIM)) for name, rows in _TABLE_SIZES.items()},
            dense_weight_N=rng.normal(0, 0.3, _NUM_DENSE),
            dense_square_N=rng.normal(0, 0.2, _NUM_DENSE),
        )

    def probability(self, dense_RxN: np.ndarray, ids_RxK: np.ndarray) -> np.ndarray:
        centred_RxN = dense_RxN.astype(np.float64) - 0.5
        logit_R = _INTERCEPT + 2 * centred_RxN @ self.dense_weight_N + 4 * centred_RxN**2 @ self.dense_square_N
        total_RxD = np.zeros((len(ids_RxK), _TEACHER_DIM))
        squares_R = np.zeros(len(ids_RxK))
        start = 0
        for feature in _FEATURES:
            ids_RxH = ids_RxK[:, start : start + feature.hotness]
            start += feature.hotness
            share_RxH = (ids_RxH != EMPTY_SLOT) / _bag_divisor(feature, ids_RxH)
            logit_R += (self.bias[feature.table][ids_RxH] * share_RxH).sum(axis=1)
            pooled_RxD = np.einsum("rhd,rh->rd", self.vector[feature.table][ids_RxH], share_RxH)
            total_RxD += pooled_RxD
            squares_R += (pooled_RxD**2).sum(axis=1)
        # The sum of all pairs' dot products is half of (square of the sum minus sum of the squares).
        logit_R += ((total_RxD**2).sum(axis=1) - squares_R) / 2
        return 1 / (1 + np.exp(-logit_R))


def _bag_divisor(feature: FeatureConfig, ids_RxH: np.ndarray) -> np.ndarray | float:
    """Divides a bag's sum: its length for a mean, the root of its hotness for a sum, to keep features alike."""
    if feature.pooling == "mean":
        return np.maximum((ids_RxH != EMPTY_SLOT).sum(axis=1, keepdims=True), 1)
    return feature.hotness**0.5


def _draw_ids(rng: np.random.Generator, num_examples: int) -> np.ndarray:
    columns = []
    name_of_rank = {name: rng.permutation(rows) for name, rows in _TABLE_SIZES.items()}
    for feature in _FEATURES:
        rows = _TABLE_SIZES[feature.table]
        cumulative = np.cumsum(np.arange(1, rows + 1) ** -_POWER)
        draws = rng.random((num_examples, feature.hotness)) * cumulative[-1]
        ids = name_of_rank[feature.table][np.searchsorted(cumulative, draws, side="right").clip(max=rows - 1)]
        if feature.hotness > 1:
            lengths = rng.integers(0, feature.hotness + 1, (num_examples, 1))
            ids = np.where(np.arange(feature.hotness) < lengths, ids, EMPTY_SLOT)
        columns.append(ids)
    return np.concatenate(columns, axis=1).astype(np.int32)


def generate(seed: int, num_examples: int = DEFAULT_EXAMPLES) -> Dataset:
    """`num_examples` rows, 80 % train, 10 % val, 10 % test; everything follows from `seed`."""
    if num_examples < 10:
        raise ConfigError(
            f"num_examples is {num_examples}; the planted log needs at least 10 rows for its three splits"
        )
    rng = np.random.default_rng((seed, 0))
    teacher = _Teacher.draw(rng)
    ids_RxK = _draw_ids(rng, num_examples)
    dense_RxN = rng.random((num_examples, _NUM_DENSE), np.float32)
    prob_R = teacher.probability(dense_RxN, ids_RxK)
    label_R = (rng.random(num_examples) < prob_R).astype(np.float32)
    bounds = {"train": (0.0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1.0)}
    splits, optimum = {}, {}
    for name, (start, stop) in bounds.items():
        rows = slice(int(num_examples * start), int(num_examples * stop))
        splits[name] = Split(dense_RxN[rows], ids_RxK[rows], label_R[rows], np.arange(num_examples)[rows])
        optimum[name] = {"auc": auc(prob_R[rows], label_R[rows]), "log_loss": _log_loss(prob_R[rows], label_R[rows])}
    return Dataset(
        name="planted",
        dense_names=tuple(f"dense_{i}" for i in range(_NUM_DENSE)),
        features=_FEATURES,
        table_sizes=_TABLE_SIZES,
        splits=splits,
        optimum=optimum,
    )


def _log_loss(prob_R: np.ndarray, label_R: np.ndarray) -> float:
    return float(-np.where(label_R > 0, np.log(prob_R), np.log1p(-prob_R)).mean())
