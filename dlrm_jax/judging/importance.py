"""Permutation importance: what a model loses when one column's values are dealt out anew among the rows.

Breiman, "Random Forests" (2001), section 10, for a model that is only asked for its scores. A column that repeats what
others say comes out small: what is measured is the model's use of it, not the column's worth.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from dlrm_jax.config import require
from dlrm_jax.data.read.dataset import Dataset, Rows, Split
from dlrm_jax.data.read.windows import concatenate
from dlrm_jax.judging.columns import known_columns, slots_of
from dlrm_jax.model.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class Asked:
    """How often each column is permuted, on how many rows at most, and the seed of rows and permutations."""

    repeats: int = 5
    rows: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.repeats >= 1, f"--importance_repeats={self.repeats}; it must be at least 1")
        require(self.rows >= 2, f"--importance_rows={self.rows}; it must be at least 2")


@dataclasses.dataclass(frozen=True)
class Importance:
    """Of a column: mean and sample standard deviation, over the repeats, of what is lost.

    `auc_drop` is AUC before minus after, `log_loss_rise` log loss after minus before: larger is more important.
    """

    column: str
    kind: str
    auc_drop: float
    auc_drop_deviation: float
    log_loss_rise: float
    log_loss_rise_deviation: float


def importances(score: Callable[[Rows], Metrics], dataset: Dataset, split: Split, asked: Asked) -> list[Importance]:
    """That of every column of the model's, the largest AUC drop first; `split` is `sampled` rows.

    The permutations of a column are those of (seed, its place, repeat): other columns change none. Bags move whole.
    """
    before = score(split).compute()
    found = []
    for place, (name, table) in enumerate(known_columns(dataset).items()):
        after = [score(permuted).compute() for permuted in _permuted(dataset, split, name, place, asked)]
        drops = np.array([before["auc"] - one["auc"] for one in after])
        rises = np.array([one["log_loss"] - before["log_loss"] for one in after])
        kind = "number" if table is None else "ids"
        numbers = (float(v) for values in (drops, rises) for v in (values.mean(), _deviation(values)))
        found.append(Importance(name, kind, *numbers))
    return sorted(found, key=lambda one: -np.nan_to_num(one.auc_drop))


def _permuted(dataset: Dataset, split: Split, name: str, place: int, asked: Asked) -> Iterator[Split]:
    feature = slots_of(dataset).get(name)
    for repeat in range(asked.repeats):
        order = np.random.default_rng((asked.seed, place, repeat)).permutation(len(split))
        if feature is None:
            dense_RxN = split.dense_RxN.copy()
            column = dataset.dense_names.index(name)
            dense_RxN[:, column] = dense_RxN[order, column]
            yield dataclasses.replace(split, dense_RxN=dense_RxN)
        else:
            ids_RxK = split.ids_RxK.copy()
            ids_RxK[:, feature] = ids_RxK[order, feature]
            yield dataclasses.replace(split, ids_RxK=ids_RxK)


def sampled(split: Rows, at_most: int, seed: int) -> Split:
    """`at_most` rows of a split in memory, drawn without repeats, in their order; all of them where there are less."""
    chosen = np.arange(len(split))
    if len(split) > at_most:
        chosen = np.sort(np.random.default_rng((seed, len(split))).choice(len(split), at_most, replace=False))
    parts, first = [], 0
    for window, order in split.windows(0, 0, shuffle=False):
        here = chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, first + len(order))]
        parts.append(_rows(window, order[here - first]))
        first += len(order)
    return concatenate(parts)


def _rows(split: Split, which: np.ndarray) -> Split:
    weight_R = None if split.weight_R is None else split.weight_R[which]
    return Split(
        split.dense_RxN[which], split.ids_RxK[which], split.label_R[which], split.row_R[which], weight_R=weight_R
    )


def _deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")
