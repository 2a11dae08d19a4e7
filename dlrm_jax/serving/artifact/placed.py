"""An exported model on several devices, under the plans of training: for tables that are larger than one device.

Tables are float32 there, whatever their type in the export, and each device's part is read from the files for itself:
no device, and no process, holds a whole table that is split.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from dlrm_jax.config import ModelConfig, OptimizerConfig, ScheduleConfig
from dlrm_jax.host import memory
from dlrm_jax.host.mesh import parse_mesh
from dlrm_jax.planning.cost import Load
from dlrm_jax.planning.hardware import of_device
from dlrm_jax.planning.planner import Setting, auto_plan
from dlrm_jax.serving.artifact.export import nested
from dlrm_jax.serving.artifact.loaded import Engine
from dlrm_jax.serving.artifact.quantise import BITS, dequantise_rows
from dlrm_jax.serving.artifact.store import Version
from dlrm_jax.serving.artifact.weights import TableFiles, read_dense, read_model
from dlrm_jax.tables import reshard
from dlrm_jax.tables.exchange import array_specs
from dlrm_jax.training.options import AUTO, ShardingOptions, place
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.step import make_score

_UNUSED = OptimizerConfig(ScheduleConfig(1.0))
"""Placement asks for an optimizer; nothing is trained here."""

Forward = Callable[..., tuple[jax.Array, jax.Array]]


class SeveralDevices:
    """Tables placed as `options` say, batches split over all devices of the mesh (loaded.Engine)."""

    fixed_sizes = True
    _forward: Forward

    def __init__(
        self,
        version: Version,
        options: ShardingOptions,
        largest_batch: int,
        like: Engine | None = None,
        oversubscribe: bool = False,
    ) -> None:
        """Read a version's weights; what was compiled for `like` is kept where model and plan are the same.

        ConfigError, unless `oversubscribe`, where they do not fit.
        """
        self._model, self._threshold = read_model(version)
        self.placed = _place(self._model, options, largest_batch)
        largest, remedy = _require_room(version, self.placed, oversubscribe)
        self.batch_multiple = self.placed.num_devices
        with memory.named(largest, remedy):
            self._tables = _read_tables(version, self.placed)
        dense = {name: jax.device_put(value, self.placed.everywhere) for name, value in read_dense(version).items()}
        self._dense = nested(dense)
        same = isinstance(like, SeveralDevices) and like._made_for() == self._made_for()
        self._forward = like._forward if isinstance(like, SeveralDevices) and same else self._jit_forward()

    def run(self, dense_BxN: np.ndarray, ids_BxK: np.ndarray) -> Sequence[Any]:
        """(probability_B, logit_B)."""
        return self._forward(self._tables, self._dense, dense_BxN, ids_BxK)

    def _made_for(self) -> tuple[Any, ...]:
        return self._model, self._threshold, self.placed.plan, self.placed.options

    def _jit_forward(self) -> Forward:
        placed, split = self.placed, self.placed.batch_sharding
        score = make_score(self._model, self._threshold, placed.ops)
        return jax.jit(score, in_shardings=(_shardings(placed), placed.everywhere, split, split))


def _place(model: ModelConfig, options: ShardingOptions, largest_batch: int) -> Placed:
    auto = None
    if options.sharding == AUTO:
        shape = parse_mesh(options.mesh, jax.device_count())
        hardware = of_device(jax.devices()[0], jax.local_device_count())
        auto = auto_plan(Setting(model, _UNUSED, shape, Load(largest_batch), hardware, options.group_size))
    return place(model, _UNUSED, options, auto)


def _require_room(version: Version, placed: Placed, oversubscribe: bool) -> tuple[str, str]:
    """ConfigError where the tables do not fit; (the largest holder, what would fit), for what fails all the same."""
    size, free = 4 * sum(math.prod(stack.local_shape) for stack in placed.stacks), memory.host_available()
    device = jax.local_devices()[0]
    table = max(placed.model.tables, key=lambda table: table.num_embeddings)
    largest = f"table {table.name!r} ({table.num_embeddings:,} rows of {table.embedding_dim}, float32 here)"
    where, remedy = "this machine's memory", "one device (without --mesh), where tables stay as they are stored"
    if device.platform == "cpu":
        size *= placed.num_devices // jax.process_count()
    else:
        free, where = memory.device_available(device), f"the memory of a {device.device_kind}"
        remedy = "more devices on the model axis"
    what = f"serving {version.directory} under {placed.plan.mesh}"
    memory.require_room(what, size, free, where, largest, remedy, oversubscribe)
    return largest, remedy


def _shardings(placed: Placed) -> dict[str, NamedSharding]:
    specs = array_specs(placed.model, placed.stacks)
    return {name: NamedSharding(placed.mesh, spec) for name, spec in specs.items()}


def _read_tables(version: Version, placed: Placed) -> dict[str, jax.Array]:
    rows, shardings, arrays = _Rows(version), _shardings(placed), {}
    for stack in placed.stacks:
        for weights, shape in ((False, stack.shape), (True, stack.row_shape())):
            kind = reshard.Kind("tables", weights, per_row=weights, first=1.0 if weights else 0.0)
            name = kind.key(stack)
            if name in shardings:
                arrays[name] = reshard.read_array(rows, kind, stack, shape, shardings[name])
    return arrays


class _Rows:
    """Rows of an export's tables in float32, read where they lie (reshard.Rows)."""

    def __init__(self, version: Version) -> None:
        self._files, self._model = TableFiles(version), read_model(version)[0]

    def rows(self, kind: reshard.Kind, table: str, first: int, step: int, count: int) -> np.ndarray:
        """(count, columns) float32: rows first, first + step, ... of a table."""
        files = self._files
        array = files.pooling_weights(table) if kind.weights else files.stored(table)
        rows = array.rows(first, first + step * (count - 1) + 1, step)
        if files.kind in BITS and not kind.weights:
            return np.asarray(
                dequantise_rows(jnp.asarray(rows), BITS[files.kind], self._model.table(table).embedding_dim)
            )
        return rows.astype(np.float32, copy=False)


def engine_maker(
    options: ShardingOptions, largest_batch: int, oversubscribe: bool = False
) -> Callable[[Version, Engine | None], Engine]:
    """What makes a version's engine under `options` (loaded.MakeEngine)."""
    return lambda version, like: SeveralDevices(version, options, largest_batch, like, oversubscribe)
