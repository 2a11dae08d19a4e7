"""Opening a run: its data are found, its model is made for their columns, ids are checked, tables get their places."""

import dataclasses
import json
from typing import Any

from dlrm_jax.config import ModelConfig
from dlrm_jax.data.batch import check_ids
from dlrm_jax.data.read.dataset import Dataset, Rows, Split
from dlrm_jax.data.read.load import load_dataset
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.placement import place_run
from dlrm_jax.training.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run's settings, the model for its data, and its `dataset` with every id inside its table.

    `identity` is RunConfig.identity as JSON has it, of the data before ids were checked; `ids_out_of_range` counts
    those that were not inside their table, by split and feature.
    """

    config: RunConfig
    model: ModelConfig
    dataset: Dataset
    identity: dict[str, Any]
    ids_out_of_range: dict[str, dict[str, int]]

    def place(self, copies: float = 0) -> Placed:
        """The model on all devices of all processes (placement.place_run)."""
        return place_run(self.config, self.model, self.dataset, copies)


def read(config: RunConfig) -> tuple[Dataset, ModelConfig]:
    """(a run's dataset, its ids not checked yet; the model for its columns)."""
    dataset = load_dataset(config.data, config.allow_oversubscription)
    model = config.model.build(dataset)
    config.check_model(model)
    return dataset, model


def open_run(config: RunConfig) -> Opened:
    """A run with its data; ConfigError where they do not fit the settings, or the memory at hand."""
    dataset, model = read(config)
    identity = json.loads(json.dumps(config.identity(model, dataset)))
    checked, counts = check_dataset(dataset, model, config.ids_out_of_range)
    return Opened(config, model, checked, identity, counts)


def check_dataset(dataset: Dataset, model: ModelConfig, policy: str) -> tuple[Dataset, dict[str, dict[str, int]]]:
    """The dataset with every id inside its table, and how many were not, by split and feature (batch.check_ids)."""
    if dataset.expander is not None:  # What is in memory are one-hot ids still.
        model = dataclasses.replace(model, features=tuple(dataclasses.replace(f, hotness=1) for f in model.features))
    splits: dict[str, Rows] = {}
    counts = {}
    for name, split in dataset.splits.items():
        if not isinstance(split, Split):
            splits[name] = split  # Not in memory: its ids are checked as they are read, or made in range.
            continue
        ids_RxK, count = check_ids(model, split.ids_RxK, policy, split.row_R)
        splits[name] = dataclasses.replace(split, ids_RxK=ids_RxK)
        if count:
            counts[name] = count
    return dataclasses.replace(dataset, splits=splits), counts
