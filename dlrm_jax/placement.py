"""Where a run's tables lie: the flags, the model, the data and the devices at hand, as a Placed."""

import itertools
import logging
import pathlib
from collections.abc import Iterator

import jax

from dlrm_jax.batch import Batch
from dlrm_jax.config import ConfigError, ModelConfig
from dlrm_jax.data.dataset import Dataset
from dlrm_jax.data.pipeline import train_batches
from dlrm_jax.data.prepared import is_prepared, read_json
from dlrm_jax.run_config import RunConfig
from dlrm_jax.sharding.cost import Cost, Load, estimate
from dlrm_jax.sharding.hardware import at_hand
from dlrm_jax.sharding.mesh import MeshShape, parse_mesh
from dlrm_jax.sharding.options import AUTO, check_on_one_device, place, without_effect
from dlrm_jax.sharding.placed import Placed, on_one_device
from dlrm_jax.sharding.planner import Setting, auto_plan
from dlrm_jax.sharding.skew import skews

_LOG = logging.getLogger("dlrm_jax")
_SAMPLED_BATCHES = 4


def place_run(config: RunConfig, model: ModelConfig, dataset: Dataset) -> Placed:
    """The model of a run on all devices of all processes."""
    shape = parse_mesh(config.sharding.mesh, jax.device_count())
    if shape.size < jax.device_count():
        if jax.process_count() > 1:
            raise ConfigError(f"--mesh={config.sharding.mesh} leaves devices out; of several processes all are used")
        _LOG.info("--mesh=%s takes %d of %d devices", config.sharding.mesh, shape.size, jax.device_count())
    if shape.size == 1:
        _say_unused(check_on_one_device(model, config.sharding), "on one device")
        return on_one_device(model, config.optimizer, config.cpu_kernels)
    auto = auto_plan(setting_of(config, model, shape)) if config.sharding.sharding == AUTO else None
    sample = sample_batches(config, dataset)
    placed = place(model, config.optimizer, config.sharding, auto, sample, kernels=config.cpu_kernels)
    _say_unused(without_effect(config.sharding, placed.plan, placed.stacks), "under this plan")
    return placed


def _say_unused(given: list[str], where: str) -> None:
    """Not refused: one file of flags may serve machines of one device and of many."""
    if given:
        _LOG.warning("without effect %s: %s", where, ", ".join(given))


def setting_of(config: RunConfig, model: ModelConfig, shape: MeshShape) -> Setting:
    """What the planner plans for here: the devices at hand, and ids as the dataset's statistics have them."""
    device = jax.devices()[0]
    directory = pathlib.Path(config.data.data_dir)
    of_tables = skews(read_json(directory / "statistics.json")) if is_prepared(directory) else {}
    return Setting(
        model=model,
        optimizer=config.optimizer,
        mesh=shape,
        load=Load(config.batch_size, config.data.id_skew, of_tables),
        hardware=at_hand(device.device_kind, device.platform, jax.local_device_count()),
        group_size=config.sharding.group_size,
    )


def prediction(config: RunConfig, placed: Placed) -> Cost:
    """What a step of `placed` should cost."""
    setting = setting_of(config, placed.model, placed.plan.mesh)
    return estimate(setting.model, setting.optimizer, placed.plan, setting.load, setting.hardware, placed.options)


def sample_batches(config: RunConfig, dataset: Dataset) -> Iterator[Batch]:
    """The first global batches, the same in every process, with their bags."""
    source = train_batches(dataset.splits["train"], config.batch_size, config.seed, 0, shuffle=config.shuffle)
    for batch in itertools.islice(source, _SAMPLED_BATCHES):
        yield dataset.expander.on_host(batch) if dataset.expander else batch
