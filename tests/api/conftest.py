"""A small log and a run on it, trained once for all tests of the Python interface."""

import numpy as np
import pandas as pd
import pytest

import dlrm_jax

SMALL = {"embedding_dim": 4, "bottom_mlp": [4], "top_mlp": (4, 1), "batch_size": 64, "num_steps": 8, "mesh": "model:1"}
ROWS = 800


def log() -> pd.DataFrame:
    """Users click or not by a bias of their own; a number is missing, a bag has none to two ids."""
    rng = np.random.default_rng(0)
    user = rng.integers(0, 20, ROWS)
    bias = rng.normal(size=20)[user] * 2
    tags = [[f"t{i}" for i in rng.integers(0, 5, rng.integers(0, 3))] for _ in range(ROWS)]
    price = np.where(rng.random(ROWS) < 0.1, np.nan, rng.normal(size=ROWS).round(3))
    return pd.DataFrame(
        {
            "click": (rng.random(ROWS) < 1 / (1 + np.exp(-bias))).astype(int),
            "price": price,
            "user": pd.Categorical([f"u{i}" for i in user]),
            "item": rng.integers(0, 9, ROWS),
            "tags": tags,
        }
    )


@pytest.fixture(scope="session")
def frame():
    return log()


@pytest.fixture(scope="session")
def run(frame, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("api") / "run"
    schema = {
        "name": "shop",
        "label": "click",
        "dense": [{"name": "price", "transform": "standardise"}],
        "sparse": ["user", {"name": "item", "type": "int"}, {"name": "tags", "hotness": 2}],
        "split": {"by": "order", "val": 0.2, "test": 0.2},
    }
    return dlrm_jax.train(frame, workdir, schema=schema, progress=False, log_every=4, **SMALL)


@pytest.fixture(scope="session")
def held_out(frame, run):
    prepared = dlrm_jax.load(run.workdir / "data")
    return frame.iloc[prepared.to_numpy("test")["row"]]
