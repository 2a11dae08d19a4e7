"""A finished or running training run, found again in its workdir: configuration, data, weights."""

import dataclasses
import json
import pathlib
from typing import Any

from dlrm_jax import run_config
from dlrm_jax.checkpoint import Checkpoints
from dlrm_jax.config import XLA, ConfigError, ModelConfig, differences
from dlrm_jax.data.dataset import Dataset
from dlrm_jax.data.load import load_dataset
from dlrm_jax.placement import failing_in_one_line, place_run
from dlrm_jax.run_config import RunConfig
from dlrm_jax.sharding import reshard
from dlrm_jax.sharding.options import ShardingOptions
from dlrm_jax.sharding.placed import Placed, on_one_device
from dlrm_jax.state import TrainState


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
    """With one checkpoint's `step` and dense parameters, and its tables' rows where they are stored."""

    step: int
    dense_params: Any
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
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=data_dir))
    return config


def restore(workdir: pathlib.Path, which: str, data_dir: str | None = None, oversubscribe: bool = False) -> Trained:
    """The run of a workdir at checkpoint `which` (best, latest, a step), on all devices.

    ConfigError if its data has changed since, or, unless `oversubscribe`, if it does not fit into the memory at hand.
    """
    run, raw = _open(workdir, data_dir, oversubscribe)
    placed = place_run(run.config, run.model, run.dataset)
    with Checkpoints(workdir) as checkpoints, failing_in_one_line(run.config, placed):
        kind, step = _find(checkpoints, which, run, raw)
        state = checkpoints.restore(kind, placed, step)
    return Trained(**vars(run), placed=placed, state=state)


def open_stored(workdir: pathlib.Path, which: str, data_dir: str | None = None, oversubscribe: bool = False) -> Stored:
    """As `restore`, but tables and their optimizer's state are not read: they may be larger than any memory."""
    run, raw = _open(workdir, data_dir, oversubscribe)
    with Checkpoints(workdir) as checkpoints:
        kind, step = _find(checkpoints, which, run, raw)
        state, rows = checkpoints.read_model(kind, step, on_one_device(run.model, run.config.optimizer))
    return Stored(**vars(run), step=int(state.step), dense_params=state.dense_params, rows=rows)


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


def _find(checkpoints: Checkpoints, which: str, run: Opened, raw: Dataset) -> tuple[str, int]:
    kind, step = checkpoints.find(which)
    identity = json.loads(json.dumps(run.config.identity(run.model, raw)))
    different = differences(identity, checkpoints.record(kind)["identity"])
    if different:
        raise ConfigError(f"the checkpoint belongs to other data (now != then): {'; '.join(different[:8])}")
    return kind, step
