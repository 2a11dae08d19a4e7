"""Small scored logs for tests of judging: users, items of a bag, numbers, scores with ties, labels that follow them."""

import numpy as np

from dlrm_jax.config import FeatureConfig
from dlrm_jax.data.read.dataset import Dataset, Split
from dlrm_jax.model.metrics import Scored


def scored(seed: int, rows: int = 400, levels: int = 9, weighted: bool = False) -> Scored:
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-levels, levels, rows) * 3 / levels).astype(np.float32)
    prob = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
    label = (rng.random(rows) < prob).astype(np.float32)
    weight = rng.integers(0, 4, rows).astype(np.float32) if weighted else np.ones(rows, np.float32)
    return Scored(logits, prob, label, weight)


def log_of(rows: Scored, seed: int = 0) -> Dataset:
    """Columns `user` (skewed), `history` (a bag of three) and numbers `hour` (6 values), `price`; all rows are test."""
    rng, count = np.random.default_rng((7, seed)), len(rows)
    user = np.minimum(rng.geometric(0.08, count) - 1, 39)
    history = np.sort(rng.integers(-1, 5, (count, 3)), axis=1)[:, ::-1]  # Empty slots last.
    dense = np.stack([rng.integers(0, 6, count), rng.lognormal(size=count)], axis=1).astype(np.float32)
    ids = np.concatenate([user[:, None], history], axis=1).astype(np.int32)
    test = Split(dense, ids, rows.label_R, np.arange(count), rows.weight_R)
    return Dataset(
        name="small",
        dense_names=("hour", "price"),
        features=(FeatureConfig("user", "user"), FeatureConfig("history", "item", hotness=3)),
        table_sizes={"user": 40, "item": 5},
        splits={"train": test, "val": test, "test": test},
    )
