"""A finished or running training run, found again in its workdir: configuration, data, weights."""

import dataclasses
import json
import pathlib
from typing import Any

from dlrm_jax import run_config
from dlrm_jax.checkpoint import Checkpoints
from dlrm_jax.config import XLA, ConfigError, ModelConfig, differences, tell
from dlrm_jax.data.dataset import Dataset
from dlrm_jax.data.load import DataConfig, load_dataset
from dlrm_jax.data.prepared import is_prepared
from dlrm_jax.placement import place_run
from dlrm_jax.run_config import RunConfig
from dlrm_jax.sharding.options import ShardingOptions
from dlrm_jax.sharding.placed import Placed, on_one_device
from dlrm_jax.state import TrainState


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run's settings, its `dataset` with checked ids, and one checkpoint's `state` on the devices at hand."""

    config: RunConfig
    model: ModelConfig
    dataset: Dataset
    placed: Placed
    state: TrainState


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


def restore(workdir: pathlib.Path, which: str, data_dir: str | None = None, one_device: bool = False) -> Trained:
    """The run of a workdir at checkpoint `which` (best, latest, a step); ConfigError if its data has changed since.

    On all devices, or all on the first one.
    """
    config = load_config(workdir, data_dir)
    raw = load_dataset(config.data)
    model = config.model.build(raw)
    dataset, _ = run_config.check_dataset(raw, model, config.ids_out_of_range)
    if one_device:
        placed = on_one_device(model, config.optimizer)
    else:
        placed = place_run(dataclasses.replace(config, sharding=ShardingOptions(), cpu_kernels=XLA), model, dataset)
    identity = json.loads(json.dumps(config.identity(model, raw)))
    return Trained(config, model, dataset, placed, _newest_state(workdir, which, placed, identity))


def _newest_state(workdir: pathlib.Path, which: str, placed: Placed, identity: dict[str, Any]) -> TrainState:
    """The state of checkpoint `which`; the next one if a running training deletes it meanwhile."""
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
                then = checkpoints.record(kind, step)["identity"]
                different = differences(run_config.without_schedule(identity), run_config.without_schedule(then))
                state = None if different else checkpoints.restore(kind, placed, step)
            except ConfigError as error:
                failure = error
                continue
        if state is None:
            raise ConfigError(f"the checkpoint belongs to other data (now != then): {tell(different)}")
        return state
