"""Which data a run asks for, and how it is opened: a prepared dataset, a raw log read into memory, or generated."""

import dataclasses
import pathlib
from collections.abc import Callable

from dlrm_jax.config import ConfigError, require, require_choice, require_finite
from dlrm_jax.data.formats import criteo, movielens
from dlrm_jax.data.formats.text import find_file
from dlrm_jax.data.generate import multi_hot, planted, synthetic
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.data.read.prepared import is_prepared, open_prepared
from dlrm_jax.host.memory import gigabytes, host_available, require_room

DATASETS = ("planted", "synthetic", "movielens_100k", "criteo_kaggle")
_GENERATED = ("planted", "synthetic")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data: the fields beyond `dataset` and `data_dir` each concern one data set (see dlrm_jax/cli/flags.py).

    `dataset` of a prepared `data_dir` may be the name that its schema gives it.
    """

    dataset: str = "planted"
    data_dir: str = ""
    split: str = "random"
    num_examples: int = 0
    seed: int = 0
    max_rows_per_table: int = 0
    num_dense: int = 13
    table_sizes: tuple[int, ...] = (1000,) * 8
    hotness: tuple[int, ...] = (1,)
    id_skew: float = 1.05
    id_trace: str = ""
    multi_hot: str = "none"
    multi_hot_sizes: tuple[int, ...] = ()
    multi_hot_distribution: str = "uniform"

    def __post_init__(self) -> None:
        require_finite(self)
        if not self.data_dir:
            require_choice("dataset", self.dataset, DATASETS)
        require_choice("multi_hot", self.multi_hot, multi_hot.MULTI_HOT)
        require_choice("multi_hot_distribution", self.multi_hot_distribution, multi_hot.DISTRIBUTIONS)
        for field in ("num_examples", "max_rows_per_table"):
            require(getattr(self, field) >= 0, f"{field} is {getattr(self, field)}; it must not be negative")
        require(
            self.dataset in _GENERATED or bool(self.data_dir),
            f"--data_dir is missing; dataset {self.dataset} needs the directory of its raw files, or a prepared one",
        )
        require(
            (self.multi_hot == "none") == (not self.multi_hot_sizes),
            "multi_hot and multi_hot_sizes go together: give both or none",
        )


def synthetic_spec(config: DataConfig) -> synthetic.Spec:
    """What a synthetic log looks like, its tables cut to `max_rows_per_table`."""
    sizes = config.table_sizes
    if config.max_rows_per_table:
        sizes = tuple(min(rows, config.max_rows_per_table) for rows in sizes)
    return synthetic.Spec(config.num_dense, sizes, config.hotness, config.id_skew, config.id_trace)


def named(config: DataConfig, dataset: Dataset) -> DataConfig:
    """The same, with the name of prepared data instead of what --dataset says where it is left out."""
    if not config.data_dir or not is_prepared(pathlib.Path(config.data_dir)):
        return config
    return dataclasses.replace(config, dataset=dataset.name)


def load_dataset(config: DataConfig, oversubscribe: bool = False) -> Dataset:
    """Open, read, or generate the data set that `config` names.

    ConfigError, unless `oversubscribe`, where what must be in memory does not fit there.
    """
    _require_room(config, oversubscribe)
    dataset = _load(config)
    if config.multi_hot == "none":
        return dataset
    if config.multi_hot == "compatible" and len(config.multi_hot_sizes) == len(dataset.features):
        rows = [dataset.table_sizes[feature.table] for feature in dataset.features]
        further = [4 * n * (hotness - 1) for n, hotness in zip(rows, config.multi_hot_sizes, strict=True)]
        most = further.index(max(further))
        largest = f"those of {dataset.features[most].name!r} ({gigabytes(further[most])})"
        needs = ("the bags of --multi_hot=compatible", sum(further), host_available(), "this machine's memory", largest)
        require_room(*needs, "--multi_hot=virtual, which holds none", oversubscribe)
    return multi_hot.expand_dataset(
        dataset, config.multi_hot_sizes, config.multi_hot_distribution, config.multi_hot == "virtual"
    )


def _require_room(config: DataConfig, oversubscribe: bool) -> None:
    """ConfigError for rows that are read or made as a whole and are more than memory holds."""
    if config.data_dir and is_prepared(pathlib.Path(config.data_dir)):
        return
    if config.dataset == "criteo_kaggle":
        path = find_file(config.data_dir, criteo.FILE_NAMES)
        needs = (
            f"reading {path} as a whole",
            path.stat().st_size,
            host_available(),
            "this machine's memory",
            "its text",
        )
        require_room(*needs, "the log prepared by python -m dlrm_jax.prepare, which is streamed", oversubscribe)
    if config.dataset == "synthetic" and config.id_trace:
        spec, rows = synthetic_spec(config), config.num_examples or synthetic.DEFAULT_EXAMPLES
        size = 4 * rows * (spec.num_dense + sum(spec.bag_sizes) + 3)
        needs = ("a log of --id_trace", size, host_available(), "this machine's memory", f"its {rows:,} rows")
        require_room(
            *needs, "a smaller --num_examples, or --id_skew, whose rows are made as they are read", oversubscribe
        )


def _load(config: DataConfig) -> Dataset:
    directory = pathlib.Path(config.data_dir)
    if config.data_dir and is_prepared(directory):
        return _open_prepared(config, directory)
    if config.data_dir and (config.dataset in _GENERATED or config.dataset not in DATASETS):
        unfinished = (directory / "staging").exists()
        what = (
            "an unfinished preparation: run the same dlrm_jax.prepare again"
            if unfinished
            else (
                "no prepared data set (python -m dlrm_jax.prepare makes one); for a raw log say which --dataset it is"
            )
        )
        raise ConfigError(f"--data_dir={config.data_dir} holds {what}")
    readers: dict[str, Callable[[], Dataset]] = {
        "planted": lambda: planted.generate(config.seed, config.num_examples or planted.DEFAULT_EXAMPLES),
        "synthetic": lambda: synthetic.generate(
            synthetic_spec(config), config.seed, config.num_examples or synthetic.DEFAULT_EXAMPLES
        ),
        "movielens_100k": lambda: movielens.read(config.data_dir, config.split),
        "criteo_kaggle": lambda: criteo.read(config.data_dir, config.max_rows_per_table),
    }
    return readers[config.dataset]()


def _open_prepared(config: DataConfig, directory: pathlib.Path) -> Dataset:
    for field in ("split", "num_examples", "max_rows_per_table"):
        default = DataConfig.__dataclass_fields__[field].default
        require(
            getattr(config, field) == default,
            f"--{field}={getattr(config, field)} has no effect on the prepared {directory}: say it when preparing",
        )
    dataset = open_prepared(directory)
    require(
        config.dataset in ("planted", dataset.name),
        f"--dataset={config.dataset}, but {directory} holds {dataset.name}; leave --dataset out",
    )
    return dataset
