"""A finished or running training run, found again in its workdir: configuration, data, weights."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

from dlrm_jax.config import ConfigError, differences, tell
from dlrm_jax.config.documents import from_json
from dlrm_jax.data.read.load import DataConfig
from dlrm_jax.data.read.prepared import is_prepared
from dlrm_jax.host.formulations import AUTO
from dlrm_jax.tables import reshard
from dlrm_jax.training import run_config
from dlrm_jax.training.checkpoint import Checkpoints
from dlrm_jax.training.opening import Opened, open_run
from dlrm_jax.training.options import ShardingOptions
from dlrm_jax.training.placed import Placed, on_one_device
from dlrm_jax.training.placement import failing_in_one_line
from dlrm_jax.training.run_config import RunConfig
from dlrm_jax.training.state import TrainState

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Trained(Opened):
    """A run with one checkpoint's `state` on the devices at hand."""

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
    """The RunConfig saved in a workdir; `data_dir` says where its data is now, if it moved."""
    path = workdir / "config.json"
    try:
        config = run_config.from_dict(from_json(path.read_text()))
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
    run = _open(workdir, data_dir, oversubscribe)
    placed = run.place()
    with failing_in_one_line(run.config, placed):
        state = _reading(workdir, which, run, lambda checkpoints, kind, step: checkpoints.restore(kind, placed, step))
    return Trained(**vars(run), placed=placed, state=state)


def open_stored(workdir: pathlib.Path, which: str, data_dir: str | None = None, oversubscribe: bool = False) -> Stored:
    """As `restore`, but tables and their optimizer's state are not read: they may be larger than any memory."""
    run = _open(workdir, data_dir, oversubscribe)
    placed = on_one_device(run.model, run.config.optimizer)
    dense, rows = _reading(
        workdir, which, run, lambda checkpoints, kind, step: checkpoints.read_model(kind, step, placed)
    )
    batch_stats = dense.get("batch_stats", {})
    return Stored(
        **vars(run),
        step=int(dense["step"]),
        dense_params=dense["dense_params"],
        batch_stats=batch_stats,
        rows=rows,
    )


def _open(workdir: pathlib.Path, data_dir: str | None, oversubscribe: bool) -> Opened:
    config = load_config(workdir, data_dir)
    placed_anew = dataclasses.replace(config, sharding=ShardingOptions(), kernels=AUTO)
    return open_run(dataclasses.replace(placed_anew, allow_oversubscription=oversubscribe), workdir)


def _reading(workdir: pathlib.Path, which: str, run: Opened, read: Callable[..., T]) -> T:
    """`read(checkpoints, kind, step)` of checkpoint `which`; of the next one if a training deletes that meanwhile."""
    identity = run_config.without_schedule(run.identity)
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
