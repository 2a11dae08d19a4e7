"""An exported model on several devices, under the plans of training: for tables that are larger than one device.

Tables are float32 there, whatever their type in the export, and each device's part is read from the files for itself:
no device, and no process, holds a whole table that is split.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlrm_jax.config import ModelConfig, OptimizerConfig, ScheduleConfig
from dlrm_jax.host import memory
from dlrm_jax.host.mesh import MODEL, parse_mesh
from dlrm_jax.planning.cost import Load
from dlrm_jax.planning.hardware import of_device
from dlrm_jax.planning.planner import Setting, auto_plan
from dlrm_jax.serving.artifact.deltas import Change, Delta, Layout
from dlrm_jax.serving.artifact.export import nested
from dlrm_jax.serving.artifact.loaded import NOTED, Engine
from dlrm_jax.serving.artifact.quantise import BITS, dequantise_rows
from dlrm_jax.serving.artifact.scatter import Scatter
from dlrm_jax.serving.artifact.store import Version
from dlrm_jax.serving.artifact.weights import TableFiles, read_dense, read_model
from dlrm_jax.tables import reshard
from dlrm_jax.tables.exchange import array_specs
from dlrm_jax.tables.forms.base import Stack
from dlrm_jax.tables.pooling import POOLING_WEIGHTS
from dlrm_jax.training.options import AUTO, ShardingOptions, place
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.step import make_score

_UNUSED = OptimizerConfig(ScheduleConfig(1.0))
"""Placement asks for an optimizer; nothing is trained here."""

Forward = Callable[..., tuple[jax.Array, jax.Array]]


class SeveralDevices:
    """Tables placed as `options` say, batches split over all devices of the mesh (loaded.Engine)."""

    fixed_sizes = True
    noted = NOTED
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
        self._kind = TableFiles(version).kind
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

    def change(self, delta: Delta, layout: Layout) -> Change:
        """Each device sets the rows that it has, in the arrays that are there."""
        del layout
        present, scatters = (self._tables, self._dense), {}
        for stack in self.placed.stacks:
            for ending in ("", POOLING_WEIGHTS):
                of_stack = [(t, delta.rows.get(table.name + ending)) for t, table in enumerate(stack.tables)]
                changed = [(t, *rows) for t, rows in of_stack if rows is not None]
                if changed:
                    line_M = np.concatenate([_lines(stack, t, row_M) for t, row_M, _ in changed])
                    rows_MxD = np.concatenate([self._floats(stack.dim, ending, rows) for *_, rows in changed])
                    name = stack.name + ending
                    scatters[name] = _scatter(self.placed, stack, ending, present[0][name], line_M, rows_MxD)
        dense = nested({name: jax.device_put(value, self.placed.everywhere) for name, value in delta.dense.items()})

        def set_to(dense: dict[str, Any], undone: bool) -> None:
            tables = {name: scatter(self._tables[name], undone) for name, scatter in scatters.items()}
            self._tables, self._dense = jax.block_until_ready(({**self._tables, **tables}, dense))

        return Change(lambda: set_to(dense, False), lambda: set_to(present[1], True))

    def _floats(self, dim: int, ending: str, rows: np.ndarray) -> np.ndarray:
        return rows if ending else _as_floats(self._kind, dim, rows)

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
        return rows if kind.weights else _as_floats(files.kind, self._model.table(table).embedding_dim, rows)


def _as_floats(kind: str, embedding_dim: int, rows: np.ndarray) -> np.ndarray:
    """float32 of rows that are stored as `kind`."""
    if kind in BITS:
        return np.asarray(dequantise_rows(jnp.asarray(rows), BITS[kind], embedding_dim))
    return rows.astype(np.float32, copy=False)


def _lines(stack: Stack, t: int, row_M: np.ndarray) -> np.ndarray:
    """Where rows of a stack's table number `t` lie in its array."""
    if not stack.form.splits_rows:
        return stack.offset_T[t] + row_M
    shard_M = stack.first_T[t] + row_M % stack.count_T[t]
    return shard_M * stack.rows + stack.offset_T[t] + row_M // stack.count_T[t]


def _scatter(
    placed: Placed, stack: Stack, ending: str, array: jax.Array, line_M: np.ndarray, rows_MxD: np.ndarray
) -> Scatter:
    split_columns = stack.form.splits_columns and not ending
    if split_columns:  # The last device's columns may be padding.
        rows_MxD = np.pad(rows_MxD, ((0, 0), (0, array.shape[1] - rows_MxD.shape[1])))
    take, put = _take_and_put(placed.mesh, stack.form.splits_rows, split_columns)
    return Scatter(array, line_M, rows_MxD, take, put, placed.everywhere)


@functools.cache
def _take_and_put(mesh: Mesh, splits_rows: bool, splits_columns: bool) -> tuple[Any, Any]:
    """scatter.Scatter's `take` and `put` for arrays that are split so over the mesh's axis `model`."""
    everywhere, columns = PartitionSpec(), PartitionSpec(None, MODEL)
    spec = columns if splits_columns else PartitionSpec(MODEL) if splits_rows else everywhere
    rows = columns if splits_columns else everywhere

    def local(array: jax.Array, line_M: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(lines of this device's own part, whether they are in it)."""
        if splits_rows:
            line_M = line_M - jax.lax.axis_index(MODEL) * array.shape[0]
        inside_M = (line_M >= 0) & (line_M < array.shape[0])
        return jnp.where(inside_M, line_M, array.shape[0]), inside_M

    def take(array: jax.Array, line_M: jax.Array) -> jax.Array:
        line_M, inside_M = local(array, line_M)
        found = jnp.where(inside_M[:, None], array.at[line_M].get(mode="clip"), 0)
        return jax.lax.psum(found, MODEL) if splits_rows else found

    def put(array: jax.Array, line_M: jax.Array, rows_MxD: jax.Array) -> jax.Array:
        return array.at[local(array, line_M)[0]].set(rows_MxD, mode="drop")

    over_mesh = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    return (
        jax.jit(over_mesh(take, in_specs=(spec, everywhere), out_specs=rows)),
        jax.jit(over_mesh(put, in_specs=(spec, everywhere, rows), out_specs=spec), donate_argnums=0),
    )


def engine_maker(
    options: ShardingOptions, largest_batch: int, oversubscribe: bool = False
) -> Callable[[Version, Engine | None], Engine]:
    """What makes a version's engine under `options` (loaded.MakeEngine)."""
    return lambda version, like: SeveralDevices(version, options, largest_batch, like, oversubscribe)
