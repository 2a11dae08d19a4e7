"""Data: raw log -> Dataset (named columns in memory) -> batches."""

import dataclasses
from collections.abc import Callable

from dlrm_jax.config import ConfigError
from dlrm_jax.data import criteo, movielens, planted
from dlrm_jax.data.dataset import Dataset

DATASETS = ("planted", "movielens_100k", "criteo_kaggle")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data: the fields beyond `dataset` and `data_dir` each concern one data set (see dlrm_jax/flags.py)."""

    dataset: str = "planted"
    data_dir: str = ""
    split: str = "random"
    num_examples: int = 0
    seed: int = 0
    max_rows_per_table: int = 0

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ConfigError(f"dataset is {self.dataset!r}; choose one of {', '.join(DATASETS)}")
        for field in ("num_examples", "max_rows_per_table"):
            if getattr(self, field) < 0:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must not be negative")
        if self.dataset != "planted" and not self.data_dir:
            raise ConfigError(f"--data_dir is missing; dataset {self.dataset} needs the directory of its raw files")


def load_dataset(config: DataConfig) -> Dataset:
    """Read, or generate, the data set that `config` names."""
    readers: dict[str, Callable[[], Dataset]] = {
        "planted": lambda: planted.generate(config.seed, config.num_examples or planted.DEFAULT_EXAMPLES),
        "movielens_100k": lambda: movielens.read(config.data_dir, config.split),
        "criteo_kaggle": lambda: criteo.read(config.data_dir, config.max_rows_per_table),
    }
    return readers[config.dataset]()
