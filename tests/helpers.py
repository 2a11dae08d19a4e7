"""Small models, batches and paths that several tests share."""

import dataclasses
import json
import pathlib
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dlrm_jax.config import (
    FeatureConfig,
    InteractionConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TableConfig,
)
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.schema.schema import EMPTY_SLOT
from dlrm_jax.model import interactions

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def until(condition: Callable[[], Any], *processes: subprocess.Popen) -> Any:
    """What `condition` gives once it holds; waits as long as those live who bring it about, however busy the machine.

    What hangs is ended by pytest-timeout.
    """
    while not (value := condition()):
        assert all(process.poll() is None for process in processes), "ended before"
        time.sleep(0.01)
    return value


def has_logged(workdir: pathlib.Path, step: int) -> bool:
    """Whether a training has written whole lines up to `step`."""
    metrics = workdir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return len(lines) > 1 and json.loads(lines[-2])["step"] >= step


def tiny_model(**changes) -> ModelConfig:
    """Three tables, four features (two share a table), bags of 1 to 3 slots, D=4; `interaction` as in `meeting`."""
    fields = {
        "num_dense": 3,
        "tables": (TableConfig("user", 11, 4), TableConfig("item", 7, 4), TableConfig("flag", 1, 4)),
        "features": (
            FeatureConfig("user", "user"),
            FeatureConfig("item", "item"),
            FeatureConfig("history", "item", hotness=3),
            FeatureConfig("flag", "flag", hotness=2),
        ),
        "bottom_mlp": (5, 4),
        "top_mlp": (6, 1),
    }
    return ModelConfig(**meeting(fields | changes))


def meeting(fields: dict) -> dict:
    """Fields of a ModelConfig from such as have `interaction` as a name, and options of any interaction beside it."""
    own = {field.name for field in dataclasses.fields(ModelConfig)}
    name = fields.get("interaction", "dot")
    known = {option.name for option in interactions.options_of(name)}
    options = {option: value for option, value in fields.items() if option in known}
    kept = {field: value for field, value in fields.items() if field in own}
    return kept | {"interaction": InteractionConfig(name, options)}


def optimizer(table: str = "sgd", dense: str = "sgd", rate: float = 0.1) -> OptimizerConfig:
    return OptimizerConfig(ScheduleConfig(learning_rate=rate), dense=dense, table=table)


RULES = (
    "sgd",
    "momentum",
    "adagrad",
    "rowwise_adagrad",
    "rmsprop",
    "adam,b1=0.8",
    "adam,correct_by=row",
    "rowwise_adam",
    "ftrl,l1=0.5,initial=0.1",
)
"""Every table optimizer, some with options."""


def random_batch(model: ModelConfig, size: int, seed: int = 0, weighted_ids: bool = False) -> Batch:
    """Ids from all of each table, many of them repeated, about one slot in five empty."""
    rng = np.random.default_rng(seed)
    columns = []
    for feature in model.features:
        rows = model.num_ids(feature)
        columns.append(rng.integers(0, rows, (size, feature.hotness)))
    ids_BxK = np.concatenate(columns, axis=1)
    ids_BxK = np.where(rng.random(ids_BxK.shape) < 0.2, EMPTY_SLOT, ids_BxK).astype(np.int32)
    return Batch(
        dense_BxN=rng.normal(size=(size, model.num_dense)).astype(np.float32),
        ids_BxK=ids_BxK,
        label_B=rng.integers(0, 2, size).astype(np.float32),
        weight_B=np.ones(size, np.float32),
        id_weights_BxK=rng.random(ids_BxK.shape).astype(np.float32) if weighted_ids else None,
    )
