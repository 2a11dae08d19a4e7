"""Opening a run: its data are found, its model is made for their columns, ids are checked, tables get their places."""

import dataclasses
import json
import pathlib
from typing import Any

from dlrm_jax.config import ModelConfig
from dlrm_jax.data.batch import check_ids
from dlrm_jax.data.read.dataset import Dataset, Split
from dlrm_jax.data.read.load import load_dataset
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.placement import place_run
from dlrm_jax.training.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run's settings, the model for its data, and its `dataset`; `identity` is RunConfig.identity as JSON has it."""

    config: RunConfig
    model: ModelConfig
    dataset: Dataset
    identity: dict[str, Any]

    def place(self, copies: float = 0) -> Placed:
        """The model on all devices of all processes (placement.place_run)."""
        return place_run(self.config, self.model, self.dataset, copies)


def read(config: RunConfig, workdir: pathlib.Path | None = None) -> tuple[Dataset, ModelConfig]:
    """(a run's dataset, its ids not checked yet; the model for its columns). A raw log is prepared in `workdir`."""
    dataset = load_dataset(config.data, config.allow_oversubscription, workdir)
    model = config.model.build(dataset)
    config.check_model(model)
    return dataset, model


def open_run(config: RunConfig, workdir: pathlib.Path | None = None) -> Opened:
    """A run with its data; ConfigError where they do not fit the settings, or the memory at hand."""
    dataset, model = read(config, workdir)
    check_dataset(dataset, model)
    return Opened(config, model, dataset, json.loads(json.dumps(config.identity(model, dataset))))


def check_dataset(dataset: Dataset, model: ModelConfig) -> None:
    """ConfigError for an id in memory outside its table; those that are not are checked as they are read."""
    if dataset.expander is not None:  # What is in memory are one-hot ids still.
        model = dataclasses.replace(model, features=tuple(dataclasses.replace(f, hotness=1) for f in model.features))
    for split in dataset.splits.values():
        if isinstance(split, Split):
            check_ids(model, split.ids_RxK, split.row_R)
