"""Where a run's tables lie: the flags, the model, the data and the devices at hand, as a Placed."""

import contextlib
import dataclasses
import itertools
import logging
import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from dlrm_jax.config import ConfigError, ModelConfig
from dlrm_jax.config.learning import ALL_ROWS
from dlrm_jax.data.batch import Batch
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.data.read.pipeline import Cut, batch_windows, train_epochs
from dlrm_jax.data.read.prepared import is_prepared, read_json
from dlrm_jax.host import memory
from dlrm_jax.host.mesh import MeshShape, parse_mesh
from dlrm_jax.planning import planner
from dlrm_jax.planning.cost import Cost, Load, estimate, marks_bytes
from dlrm_jax.planning.hardware import of_device
from dlrm_jax.planning.planner import Setting, auto_plan
from dlrm_jax.planning.skew import skews
from dlrm_jax.tables.kernels.choice import ALL_XLA
from dlrm_jax.tables.plan import DATA_PARALLEL, Plan, make_plan
from dlrm_jax.training.options import AUTO, check_on_one_device, choose_plan, place, without_effect
from dlrm_jax.training.placed import Placed, on_one_device
from dlrm_jax.training.run_config import RunConfig

_LOG = logging.getLogger("dlrm_jax")
_SAMPLED_BATCHES = 4


def place_run(config: RunConfig, model: ModelConfig, dataset: Dataset, copies: float = 0) -> Placed:
    """The model of a run on all devices of all processes; ConfigError where it does not fit into the memory at hand.

    `copies` of the state are held by the host too, as when it is saved.
    """
    shape = parse_mesh(config.sharding.mesh, jax.device_count())
    if shape.size < jax.device_count():
        if jax.process_count() > 1:
            raise ConfigError(f"--mesh={config.sharding.mesh} leaves devices out; of several processes all are used")
        _LOG.info("--mesh=%s takes %d of %d devices", config.sharding.mesh, shape.size, jax.device_count())
    setting = setting_of(config, model, shape)
    if setting.hardware.assumed:
        _LOG.warning("%s: %s", setting.hardware.name, setting.hardware.source)
    if shape.size == 1:
        _say_unused(check_on_one_device(model, config.sharding), "on one device")
        require_room(config, setting, make_plan(model, shape, DATA_PARALLEL), copies)
        return _with_kernels(on_one_device(model, config.optimizer, config.kernels))
    auto = auto_plan(setting) if config.sharding.sharding == AUTO else None
    require_room(config, setting, choose_plan(model, config.sharding, shape, auto), copies)
    sample = sample_batches(config, dataset)
    placed = place(model, config.optimizer, config.sharding, auto, sample, kernels=config.kernels)
    _say_unused(without_effect(config.sharding, placed.plan), "under this plan")
    return _with_kernels(placed)


def _with_kernels(placed: Placed) -> Placed:
    """The same, once it is known who looks up and updates its tables, and told where that is not XLA."""
    if placed.chosen != ALL_XLA:
        _LOG.info("kernels of the tables: %s", placed.chosen)
    return placed


def _say_unused(given: list[str], where: str) -> None:
    """Not refused: one file of flags may serve machines of one device and of many."""
    if given:
        _LOG.warning("without effect %s: %s", where, ", ".join(given))


def require_room(config: RunConfig, setting: Setting, plan: Plan, copies: float) -> None:
    """ConfigError, in one line, where a plan, or `copies` of the state, do not fit into what devices and host have."""
    devices, processes = jax.local_devices(), jax.process_count()
    cost, local = setting.cost_of(plan), max(1, setting.mesh.size // processes)
    once = dataclasses.replace(setting, mesh=MeshShape(1, 1), group_size=0).cost(DATA_PARALLEL).memory
    saved = copies * sum(once[part] for part in ("tables", "optimizer state", "dense parameters")) / processes
    largest, on_cpu = planner.largest_holder(setting, cost), devices[0].platform == "cpu"
    if not on_cpu:
        free = min((room for device in devices if (room := memory.device_available(device)) is not None), default=None)
        needs = ("this run", cost.bytes_held, free, f"the memory of a {setting.hardware.name}", largest)
        memory.require_room(*needs, planner.remedy(setting, cost, free or 0), config.allow_oversubscription)
    what = "this run, with the copy that a checkpoint is written from," if copies else "this run"
    needed, free = saved + on_cpu * local * cost.bytes_held, memory.host_available()
    needed += marks_bytes(setting.model) * (setting.load.marks_rows and not on_cpu)
    share = saved / local / max(cost.memory["tables"] + cost.memory["optimizer state"], 1)
    help_ = planner.remedy(setting, cost, (free or 0) / local, share, local)
    memory.require_room(what, needed, free, "this machine's memory", largest, help_, config.allow_oversubscription)


def failing_in_one_line(config: RunConfig, placed: Placed) -> contextlib.AbstractContextManager[None]:
    """Inside, an allocation that fails all the same is a ConfigError that names what holds most."""
    setting, cost = setting_of(config, placed.model, placed.plan.mesh), prediction(config, placed)
    sharing = jax.local_device_count() if jax.default_backend() == "cpu" else 0
    # More was needed than was predicted, or than there is: what fits is less than either.
    room = 0.9 * min(setting.hardware.memory_bytes, cost.bytes_held)
    return memory.named(planner.largest_holder(setting, cost), planner.remedy(setting, cost, room, sharing=sharing))


def setting_of(config: RunConfig, model: ModelConfig, shape: MeshShape) -> Setting:
    """What the planner plans for here: the devices at hand."""
    return Setting(
        model=model,
        optimizer=config.optimizer,
        mesh=shape,
        load=load_of(config),
        hardware=of_device(jax.devices()[0], jax.local_device_count()),
        group_size=config.sharding.group_size,
    )


def load_of(config: RunConfig) -> Load:
    """How a step takes its batch; ids fall off as a prepared dataset's statistics have them, else by --id_skew."""
    directory, sharding = pathlib.Path(config.data.data_dir), config.sharding
    return Load(
        config.batch_size,
        config.data.id_skew,
        skews(read_json(directory / "statistics.json")) if is_prepared(directory) else {},
        num_micro_batches=config.num_micro_batches,
        exchange_dtype=sharding.travelling_dtype,
        exchange_capacity=sharding.exchange_capacity,
        marks_rows=bool(config.publishing.model_dir) and config.optimizer.table_update != ALL_ROWS,
    )


def prediction(config: RunConfig, placed: Placed) -> Cost:
    """What a step of `placed` should cost."""
    setting = setting_of(config, placed.model, placed.plan.mesh)
    return estimate(setting.model, setting.optimizer, placed.plan, setting.load, setting.hardware, placed.options)


def sample_batches(config: RunConfig, dataset: Dataset) -> Iterator[Batch]:
    """The first global batches, the same in every process, with their bags."""
    epochs = train_epochs(dataset.splits["train"], config.batch_size, config.seed, 0, config.shuffle)
    with contextlib.closing(batch_windows(epochs, Cut(config.batch_size))) as windows:
        for window in itertools.islice(windows, _SAMPLED_BATCHES):
            batch = window[0].batch
            ids = np.asarray(batch.ids_BxK)
            bags = dataset.expander.on_host(ids) if dataset.expander else ids
            yield batch.replace(ids_BxK=bags)
