"""Which data a run asks for, and how it is opened: prepared, a raw log that is prepared on the way, or generated."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable
from typing import Any

from dlrm_jax.config import ConfigError, Needs, check_settings, require, require_choice, setting
from dlrm_jax.data.generate import multi_hot, planted, synthetic
from dlrm_jax.data.generate.multi_hot import DISTRIBUTIONS, MULTI_HOT
from dlrm_jax.data.infer.choose import choose_schema
from dlrm_jax.data.prepare.bar import Bar
from dlrm_jax.data.prepare.preparation import prepare
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.data.read.prepared import WINDOW_ROWS, in_memory, is_prepared, open_prepared
from dlrm_jax.data.schema.schema import Schema
from dlrm_jax.host import files, processes
from dlrm_jax.host.memory import gigabytes, host_available, require_room

_GENERATED = ("planted", "synthetic")
_CRITEO_FILES = ("train.txt", "train.csv")
DATASETS = (*_GENERATED, "movielens_100k", "criteo_kaggle")
_ENDINGS = {"random": "", "time": "_time", "week": "_week"}
"""Of the preset's name, by --split of movielens_100k."""
CACHE = "data"
"""Where in a run's workdir its raw log is prepared."""
_LOG = logging.getLogger("dlrm_jax")


def _generated(*names: str) -> Callable[[Any], bool]:
    return lambda run: run.data.dataset in names and not run.data.data_dir


_SYNTHETIC = Needs(_generated("synthetic"), "it is for --dataset=synthetic")
_BAGS = Needs(lambda run: run.data.multi_hot != "none", "it needs --multi_hot")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data: the settings beyond `dataset` and `data_dir` each concern one data set.

    `dataset` of a prepared `data_dir` may be the name that its schema gives it.
    """

    dataset: str = setting("planted", "Which data to train on; planted and synthetic are generated.")
    data_dir: str = setting(
        "",
        "A directory that dlrm_jax.prepare made, which says all by itself; or the raw log of --dataset, prepared first "
        "in the workdir.",
    )
    split: str = setting(
        "random",
        "How movielens_100k is split into train, val and test.",
        choices=("random", "time", "week"),
        needs=Needs(
            lambda run: run.data.dataset == "movielens_100k",
            "it is for the raw log of --dataset=movielens_100k; for one's own log say it when preparing",
        ),
    )
    num_examples: int = setting(
        0,
        "Examples to generate for planted and synthetic; 0 for their default.",
        at_least=0,
        needs=Needs(_generated("planted", "synthetic"), "only --dataset=planted and --dataset=synthetic are generated"),
    )
    num_periods: int = setting(
        0,
        "planted: equal periods of the log, for dlrm_jax.online; the last one is test, the one before val. 0: none.",
        at_least=0,
        needs=Needs(_generated("planted"), "it is for --dataset=planted"),
    )
    drift: float = setting(
        0.0,
        "planted: how far the hidden teacher's weights walk from a period to the next; after the step d a weight w is "
        "sqrt(1 - d^2) w + d times a fresh one.",
        at_least=0,
        below=1,
        needs=Needs(lambda run: run.data.num_periods > 0, "it needs --num_periods"),
    )
    seed: int = setting(0, "Decides initial weights, order of rows, and planted data.", at_least=0)
    max_rows_per_table: int = setting(
        0,
        "criteo_kaggle: categorical values are taken modulo this before ids are given; synthetic: larger tables are "
        "cut to it, so that a model fits the machine at hand; 0: no.",
        at_least=0,
        needs=Needs(
            lambda run: run.data.dataset == "criteo_kaggle" or _SYNTHETIC.when(run),
            "it is for --dataset=synthetic and the raw log of --dataset=criteo_kaggle; else say it when preparing",
        ),
    )
    num_dense: int = setting(13, "synthetic: dense columns.", needs=_SYNTHETIC)
    table_sizes: tuple[int, ...] = setting((1000,) * 8, "synthetic: rows of each table.", needs=_SYNTHETIC)
    hotness: tuple[int, ...] = setting(
        (1,), "synthetic: ids in each feature's bag; one number is for all features.", needs=_SYNTHETIC
    )
    id_skew: float = setting(
        1.05, "synthetic: the k-th most frequent id occurs in proportion to k^-skew.", needs=_SYNTHETIC
    )
    id_trace: str = setting(
        "",
        "synthetic: file of stack distances, as the reference's dist files, that ids follow instead of --id_skew; "
        "{} in it stands for the feature's number.",
        needs=_SYNTHETIC,
    )
    multi_hot: str = setting(
        "none",
        "Make bags of one-hot ids, as MLPerf does: compatible draws MLPerf's own bags and holds them in memory; "
        "virtual computes them from a hash, needs no memory.",
        choices=MULTI_HOT,
    )
    multi_hot_sizes: tuple[int, ...] = setting((), "Ids in each feature's bag under --multi_hot.", needs=_BAGS)
    multi_hot_distribution: str = setting(
        "uniform", "How --multi_hot draws the further ids.", choices=DISTRIBUTIONS, needs=_BAGS
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.data_dir:
            require_choice("dataset", self.dataset, DATASETS)
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


def load_dataset(config: DataConfig, oversubscribe: bool = False, workdir: pathlib.Path | None = None) -> Dataset:
    """Open, prepare, or generate the data set that `config` names; a raw log is prepared in `workdir`, once.

    ConfigError, unless `oversubscribe`, where what must be in memory does not fit there.
    """
    _require_room(config, oversubscribe)
    dataset = _load(config, workdir)
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
    """ConfigError for rows that are made as a whole and are more than memory holds."""
    if config.dataset == "synthetic" and config.id_trace and not config.data_dir:
        spec, rows = synthetic_spec(config), config.num_examples or synthetic.DEFAULT_EXAMPLES
        size = 4 * rows * (spec.num_dense + sum(spec.bag_sizes) + 3)
        needs = ("a log of --id_trace", size, host_available(), "this machine's memory", f"its {rows:,} rows")
        require_room(
            *needs, "a smaller --num_examples, or --id_skew, whose rows are made as they are read", oversubscribe
        )


def _load(config: DataConfig, workdir: pathlib.Path | None) -> Dataset:
    directory = pathlib.Path(config.data_dir)
    if config.data_dir:
        prepared = is_prepared(directory)
        processes.agree("data_dir", {"prepared": prepared})  # Else one would wait for another that prepares nothing.
        if prepared:
            return _open_prepared(config, directory)
    if config.data_dir and (config.dataset in _GENERATED or config.dataset not in DATASETS):
        unfinished = (directory / "staging").exists()
        what = (
            "an unfinished preparation: run the same dlrm_jax.prepare again"
            if unfinished
            else (
                "no prepared data set (python -m dlrm_jax.prepare makes one); for a raw log say which --dataset it is: "
                f"{', '.join(name for name in DATASETS if name not in _GENERATED)}"
            )
        )
        raise ConfigError(f"--data_dir={config.data_dir} holds {what}")
    if config.dataset == "planted":
        num_examples = config.num_examples or planted.DEFAULT_EXAMPLES
        if config.num_periods:
            return planted.generate_periods(config.seed, num_examples, config.num_periods, config.drift)
        return planted.generate(config.seed, num_examples)
    if config.dataset == "synthetic":
        num_examples = config.num_examples or synthetic.DEFAULT_EXAMPLES
        return synthetic.generate(synthetic_spec(config), config.seed, num_examples)
    return _open_raw(config, workdir)


def _open_raw(config: DataConfig, workdir: pathlib.Path | None) -> Dataset:
    """A raw log as it was prepared in `workdir`; prepared there now, by the first process, where it was not."""
    if workdir is None:
        raise ConfigError(
            f"--data_dir={config.data_dir} is a raw log, which is prepared first: say in which --workdir, where "
            "training finds it again, or give the directory of a prepared one"
        )
    cache = workdir / CACHE
    try:
        processes.first_does(f"preparing {cache}", lambda: _prepare_raw(config, cache))
        dataset = open_prepared(cache)
        # What fits into a window is in memory at once, and need not be shuffled block by block.
        small = max(map(len, dataset.splits.values())) <= WINDOW_ROWS
        return in_memory(dataset) if small else dataset
    except ConfigError as error:
        if not is_prepared(cache):
            raise
        raise type(error)(f"{error} (here: delete {cache}, or choose another --workdir)") from error


def _prepare_raw(config: DataConfig, cache: pathlib.Path) -> None:
    paths, schema = _raw_log(config)
    if not is_prepared(cache):
        files.require_output_directory("workdir", cache.parent)
        _LOG.info("preparing %s in %s", config.data_dir, cache)
    with Bar() as bar:
        prepare(paths, cache, schema, progress=bar.show)


def _raw_log(config: DataConfig) -> tuple[tuple[str, ...], Schema]:
    """(what to prepare, the preset that says how), with what flags say otherwise."""
    if config.dataset == "movielens_100k":
        of_directory = (config.data_dir,)
        return of_directory, choose_schema(config.dataset + _ENDINGS[config.split], of_directory)
    directory = pathlib.Path(config.data_dir)
    places = [directory, *(directory / name for name in _CRITEO_FILES)]
    paths = tuple(str(path) for path in places if path.is_file())[:1]
    require(bool(paths), f"--data_dir={directory} holds none of {', '.join(_CRITEO_FILES)}")
    schema = choose_schema(config.dataset, paths)
    capped = tuple(dataclasses.replace(sparse, modulo=config.max_rows_per_table) for sparse in schema.sparse)
    return paths, dataclasses.replace(schema, sparse=capped)


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
