"""A click log with a known answer: a hidden DLRM-like teacher labels power-law ids, so the best score is known.

Each id has a bias and a short vector, a bag is the sum of its ids; the teacher's logit adds the biases, a small
nonlinear function of the dense features, and all dot products of features. Labels are coin flips with its probability.
The logit is a sum of floats, whose last bit is the platform's: rows are made once, by the host, and not in a step as
those of synthetic.py, or a flip near its probability would fall otherwise there.
"""

import dataclasses
from typing import Any

import numpy as np

from dlrm_jax.config import EMPTY_SLOT, ConfigError, FeatureConfig, require
from dlrm_jax.data.read.dataset import Dataset, Period, Rows, Split
from dlrm_jax.data.read.windows import GeneratedSplit, concatenate, slice_rows
from dlrm_jax.data.schema.schema import SPLITS
from dlrm_jax.model.metrics import auc

DEFAULT_EXAMPLES = 400_000
_BLOCK_ROWS = 65_536
_MAX_IN_MEMORY = 2_000_000
_MAX_IN_PERIODS = 5_000_000
"""Of a log whose teacher walks, which is always kept in memory: 1.4 GB while it is made."""
_MAX_JUDGED = 200_000
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

    def walked(self, rng: np.random.Generator, drift: float) -> "_Teacher":
        """A period later: as far from here as `drift` says, and as spread out."""
        keep, fresh = (1 - drift**2) ** 0.5, vars(_Teacher.draw(rng))

        def mixed(old: Any, new: Any) -> Any:
            return (
                {name: mixed(old[name], new[name]) for name in old}
                if isinstance(old, dict)
                else keep * old + drift * new
            )

        return _Teacher(**mixed(vars(self), fresh))

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


def _ranks(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """For each table which id has which frequency rank."""
    return {name: rng.permutation(rows) for name, rows in _TABLE_SIZES.items()}


def _draw_ids(rng: np.random.Generator, id_of_rank: dict[str, np.ndarray], num_rows: int) -> np.ndarray:
    columns = []
    for feature in _FEATURES:
        rows = _TABLE_SIZES[feature.table]
        cumulative = np.cumsum(np.arange(1, rows + 1) ** -_POWER)
        draws = rng.random((num_rows, feature.hotness)) * cumulative[-1]
        ids = id_of_rank[feature.table][np.searchsorted(cumulative, draws, side="right").clip(max=rows - 1)]
        if feature.hotness > 1:
            lengths = rng.integers(0, feature.hotness + 1, (num_rows, 1))
            ids = np.where(np.arange(feature.hotness) < lengths, ids, EMPTY_SLOT)
        columns.append(ids)
    return np.concatenate(columns, axis=1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class _Log:
    """The log as a function of the block's number, so that any part of it can be made at any time."""

    seed: int
    teacher: _Teacher
    id_of_rank: dict[str, np.ndarray]

    @classmethod
    def of(cls, seed: int) -> "_Log":
        rng = np.random.default_rng((seed, 0))
        return cls(seed, _Teacher.draw(rng), _ranks(rng))

    def block(self, index: int) -> tuple[Split, np.ndarray]:
        """(rows, the teacher's probability of each)."""
        rng = np.random.default_rng((self.seed, 1, index))
        return self.draw(rng, self.teacher, index * _BLOCK_ROWS, _BLOCK_ROWS)

    def draw(self, rng: np.random.Generator, teacher: _Teacher, first: int, count: int) -> tuple[Split, np.ndarray]:
        """`count` rows that a teacher labels, numbered from `first` on, and its probability of each."""
        ids_RxK = _draw_ids(rng, self.id_of_rank, count)
        dense_RxN = rng.random((count, _NUM_DENSE), np.float32)
        prob_R = teacher.probability(dense_RxN, ids_RxK)
        label_R = (rng.random(count) < prob_R).astype(np.float32)
        return Split(dense_RxN, ids_RxK, label_R, np.arange(first, first + count)), prob_R

    def make_block(self, index: int) -> Split:
        """The rows of a block."""
        return self.block(index)[0]

    def rows(self, start: int, stop: int) -> tuple[Split, np.ndarray]:
        """Rows `start` to `stop` in memory, and their probabilities."""
        first = start // _BLOCK_ROWS
        blocks = [self.block(index) for index in range(first, -(-stop // _BLOCK_ROWS))]
        low, high = start - first * _BLOCK_ROWS, stop - first * _BLOCK_ROWS
        whole = concatenate([split for split, _ in blocks])
        return slice_rows(whole, low, high), np.concatenate([prob_R for _, prob_R in blocks])[low:high]


def generate(seed: int, num_examples: int = DEFAULT_EXAMPLES) -> Dataset:
    """`num_examples` rows, 80 % train, 10 % val, 10 % test; everything follows from `seed`.

    Beyond two million rows they are made as they are read, so that any number fits; then the optimum is that of the
    first 200,000 rows of a split.
    """
    if num_examples < 10:
        raise ConfigError(
            f"num_examples is {num_examples}; the planted log needs at least 10 rows for its three splits"
        )
    log = _Log.of(seed)
    bounds = [0, int(num_examples * 0.8), int(num_examples * 0.9), num_examples]
    in_memory = num_examples <= _MAX_IN_MEMORY
    splits: dict[str, Rows] = {}
    optimum = {}
    for name, start, stop in zip(SPLITS, bounds, bounds[1:], strict=False):
        judged, prob_R = log.rows(start, stop if in_memory else start + _MAX_JUDGED)
        optimum[name] = _optimum(prob_R, judged.label_R)
        splits[name] = judged if in_memory else GeneratedSplit(start, stop - start, _BLOCK_ROWS, log.make_block)
    return _dataset(splits, optimum, checksum="" if in_memory else f"planted-{seed}-{num_examples}")


def generate_periods(seed: int, num_examples: int, num_periods: int, drift: float) -> Dataset:
    """`num_examples` rows in equal periods, between which the teacher walks; the last one is test, the one before val.

    `optimum` has every period's by its name too, the teacher of that period against its labels.
    """
    rows = num_examples // max(num_periods, 1)
    require(num_periods >= 3, f"num_periods is {num_periods}; train, val and test need 3")
    require(rows >= 1, f"num_periods is {num_periods}, more than num_examples, {num_examples}")
    require(
        num_examples <= _MAX_IN_PERIODS,
        f"num_examples is {num_examples}; a planted log of periods is kept in memory: at most {_MAX_IN_PERIODS:,}",
    )
    log, teacher = _Log.of(seed), _Log.of(seed).teacher
    parts: dict[str, list[tuple[Split, np.ndarray]]] = {name: [] for name in SPLITS}
    periods, optimum = [], {}
    for number in range(num_periods):
        if number:
            teacher = teacher.walked(np.random.default_rng((seed, 3, number)), drift)
        split = SPLITS[max(0, number - num_periods + 3)]
        drawn, prob_R = log.draw(np.random.default_rng((seed, 2, number)), teacher, number * rows, rows)
        first = sum(len(one) for one, _ in parts[split])
        parts[split].append((drawn, prob_R))
        name = f"period_{number:02d}"
        periods.append(Period(name, number, split, first, rows, int(drawn.label_R.sum())))
        optimum[name] = _optimum(prob_R, drawn.label_R)
    splits: dict[str, Rows] = {}
    for name, own in parts.items():
        splits[name] = whole = concatenate([one for one, _ in own])
        optimum[name] = _optimum(np.concatenate([prob_R for _, prob_R in own]), whole.label_R)
    return _dataset(splits, optimum, periods=tuple(periods))


def _dataset(splits: dict[str, Rows], optimum: dict[str, dict[str, float]], **more: Any) -> Dataset:
    return Dataset(
        name="planted",
        dense_names=tuple(f"dense_{i}" for i in range(_NUM_DENSE)),
        features=_FEATURES,
        table_sizes=_TABLE_SIZES,
        splits=splits,
        optimum=optimum,
        **more,
    )


def _optimum(prob_R: np.ndarray, label_R: np.ndarray) -> dict[str, float]:
    return {"auc": auc(prob_R, label_R), "log_loss": _log_loss(prob_R, label_R)}


def _log_loss(prob_R: np.ndarray, label_R: np.ndarray) -> float:
    return float(-np.where(label_R > 0, np.log(prob_R), np.log1p(-prob_R)).mean())
