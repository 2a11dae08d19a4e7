"""A finished or running training run, found again in its workdir: configuration, data, weights."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

from dlrm_jax.config import XLA, ConfigError, ModelConfig, differences, tell
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.data.read.load import DataConfig, load_dataset
from dlrm_jax.data.read.prepared import is_prepared
from dlrm_jax.tables import reshard
from dlrm_jax.training import run_config
from dlrm_jax.training.checkpoint import Checkpoints
from dlrm_jax.training.options import ShardingOptions
from dlrm_jax.training.placed import Placed, on_one_device
from dlrm_jax.training.placement import failing_in_one_line, place_run
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.training.state import TrainState

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run's settings, and its `dataset` with checked ids."""

    config: RunConfig
    model: ModelConfig
    dataset: Dataset


@dataclasses.dataclass(frozen=True)
class Trained(Opened):
    """With one checkpoint's `state` on the devices at hand."""

    placed: Placed
    state: TrainState


@dataclasses.dataclass(frozen=True)
class Stored(Opened):
    """With one checkpoint's `step`, dense parameters and batch norms' averages, and its tables' rows as stored."""

    step: int
    dense_params: Any
    batch_stats: Any
    rows: reshard.Rows


def load_config(workdir: pathlib.Path, data_dir: str | None = None) -> RunConfig:
    """The RunConfig saved in a workdir; `data_dir` says where the raw log is now, if it moved."""
    path = workdir / "config.json"
    try:
        config = run_config.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; --workdir must name the directory of a training run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a run's configuration: {error}") from error
    if data_dir is not None:
        data = dataclasses.replace(config.data, data_dir=data_dir)
        if is_prepared(pathlib.Path(data_dir)):  # It says all by itself, and whether it is the run's is seen later.
            unsaid = {
                name: getattr(DataConfig, name) for name in ("dataset", "split", "num_examples", "max_rows_per_table")
            }
            data = dataclasses.replace(data, **unsaid)
        config = dataclasses.replace(config, data=data)
    return config


def restore(workdir: pathlib.Path, which: str, data_dir: str | None = None, oversubscribe: bool = False) -> Trained:
    """The run of a workdir at checkpoint `which` (best, latest, a step), on all devices.

    ConfigError if its data has changed since, or, unless `oversubscribe`, if it does not fit into the memory at hand.
    """
    run, raw = _open(workdir, data_dir, oversubscribe)
    placed = place_run(run.config, run.model, run.dataset)
    with failing_in_one_line(run.config, placed):
        state = _reading(
            workdir, which, run, raw, lambda checkpoints, kind, step: checkpoints.restore(kind, placed, step)
        )
    return Trained(**vars(run), placed=placed, state=state)


def open_stored(workdir: pathlib.Path, which: str, data_dir: str | None = None, oversubscribe: bool = False) -> Stored:
    """As `restore`, but tables and their optimizer's state are not read: they may be larger than any memory."""
    run, raw = _open(workdir, data_dir, oversubscribe)
    placed = on_one_device(run.model, run.config.optimizer)
    dense, rows = _reading(
        workdir, which, run, raw, lambda checkpoints, kind, step: checkpoints.read_model(kind, step, placed)
    )
    batch_stats = dense.get("batch_stats", {})
    return Stored(
        **vars(run),
        step=int(dense["step"]),
        dense_params=dense["dense_params"],
        batch_stats=batch_stats,
        rows=rows,
    )


def _open(workdir: pathlib.Path, data_dir: str | None, oversubscribe: bool) -> tuple[Opened, Dataset]:
    """(the run, its dataset as it was read)."""
    config = load_config(workdir, data_dir)
    config = dataclasses.replace(
        config, sharding=ShardingOptions(), cpu_kernels=XLA, allow_oversubscription=oversubscribe
    )
    raw = load_dataset(config.data, oversubscribe)
    model = config.model.build(raw)
    dataset, _ = run_config.check_dataset(raw, model, config.ids_out_of_range)
    return Opened(config, model, dataset), raw


def _reading(workdir: pathlib.Path, which: str, run: Opened, raw: Dataset, read: Callable[..., T]) -> T:
    """`read(checkpoints, kind, step)` of checkpoint `which`; of the next one if a training deletes that meanwhile."""
    identity = run_config.without_schedule(json.loads(json.dumps(run.config.identity(run.model, raw))))
    failure: ConfigError | None = None
    tried: tuple[str, int] | None = None
    while True:
        with Checkpoints(workdir, read_only=True) as checkpoints:
            found = checkpoints.find(which)
            if found == tried:
                assert failure is not None
                raise failure
            kind, step = tried = found
            try:
                then = run_config.without_schedule(run_config.identity_of(checkpoints.record(kind, step)))
                different = differences(identity, then)
                if not different:
                    return read(checkpoints, kind, step)
            except ConfigError as error:
                failure = error
                continue
        raise ConfigError(f"the checkpoint belongs to other data (now != then): {tell(different)}")
