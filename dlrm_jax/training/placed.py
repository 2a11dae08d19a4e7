"""A model on a mesh under a plan: its state's birth and shape, its table functions, its batches."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dlrm_jax.config import ModelConfig, OptimizerConfig
from dlrm_jax.data.batch import Batch, without_unweighted
from dlrm_jax.host import huge_pages
from dlrm_jax.host.formulations import XLA
from dlrm_jax.host.mesh import MeshShape, batch_sharding, make_mesh, replicated
from dlrm_jax.tables.collective import ExchangeOptions
from dlrm_jax.tables.exchange import TableOps, array_specs, slot_specs
from dlrm_jax.tables.forms.base import Stack
from dlrm_jax.tables.init import init_stack
from dlrm_jax.tables.kernels.choice import Kernels, chosen, table_ops
from dlrm_jax.tables.layout import place_stacks
from dlrm_jax.tables.plan import DATA_PARALLEL, Plan, make_plan
from dlrm_jax.training.state import TrainState, compiled_init_dense, init_dense, new_state


@dataclasses.dataclass(frozen=True)
class Placed:
    """`model` under `plan` on `mesh`. `packed` stores several rows a line of 128 lanes (rows.py), as TPUs need.

    `kernels`, a name of host.formulations.KERNELS, says who looks up and updates the tables. Their numbers are those of
    every other plan but for the order of float32 sums (exchange.py says what optimizers make of that).
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    plan: Plan
    mesh: Mesh
    options: ExchangeOptions = dataclasses.field(default_factory=ExchangeOptions)
    packed: bool = False
    kernels: str = XLA

    @functools.cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """How the tables are stored."""
        return place_stacks(self.model, self.plan, self.packed)

    @functools.cached_property
    def ops(self) -> TableOps:
        """Route, lookup and update."""
        return table_ops(self.chosen, self.model, self.optimizer, self.stacks, self.mesh, self.options)

    @functools.cached_property
    def chosen(self) -> Kernels:
        """What `kernels` means here; ConfigError for what there is not."""
        return chosen(self.kernels, self.model, self.optimizer, self.mesh)

    @property
    def num_devices(self) -> int:
        """Devices of the mesh, which all take an equal part of each batch."""
        return self.mesh.size

    @property
    def one_by_one(self) -> bool:
        """Whether a program must have ended before the next one begins.

        Several devices of a CPU that meet in two programs at once may wait for each other for ever.
        """
        return self.num_devices > 1 and jax.default_backend() == "cpu"

    @property
    def batch_sharding(self) -> NamedSharding:
        """How batches are split."""
        return batch_sharding(self.mesh)

    def init_state(self, seed: int) -> TrainState:
        """A fresh state, tables born where they stay, on huge pages in a CPU's memory; equal bits under every plan."""
        # Apart from the tables, as on one device: it takes seconds to compile, and is the same under every plan.
        dense_params = jax.tree.map(np.asarray, compiled_init_dense(self.model, seed))
        birth = jax.jit(self._birth, static_argnums=0, in_shardings=self.everywhere, out_shardings=self.shardings)
        state = birth(seed, dense_params)
        huge_pages.collapse(state)
        return state

    def _birth(self, seed: int, dense_params: Any) -> TrainState:
        tables: dict[str, Any] = {}
        for stack in self.stacks:
            tables |= init_stack(self.model, stack, self.mesh, seed)
        return new_state(self.model, self.optimizer, dense_params, tables, self.stacks)

    @functools.cached_property
    def _shapes(self) -> TrainState:
        dense_params = jax.eval_shape(functools.partial(init_dense, self.model, 0))
        return jax.eval_shape(functools.partial(self._birth, 0), dense_params)

    @functools.cached_property
    def shardings(self) -> TrainState:
        """Where each part of the state lies: tables as the plan says, the rest on every device."""
        shapes = self._shapes
        everywhere = jax.tree.map(lambda _: replicated(self.mesh), shapes)
        place = functools.partial(NamedSharding, self.mesh)
        return everywhere.replace(
            tables=jax.tree.map(place, array_specs(self.model, self.stacks)),
            table_opt_state=jax.tree.map(place, slot_specs(self.optimizer, self.model, self.stacks)),
        )

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and placement of the state, without making it."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self._shapes,
            self.shardings,
        )

    def abstract_batch(self, batch_size: int, weighted_ids: bool = False) -> Batch:
        """Shapes and placement of a batch of `batch_size`, which all devices must divide."""
        shape = functools.partial(jax.ShapeDtypeStruct, sharding=self.batch_sharding)
        slots = (batch_size, self.model.num_slots)
        return Batch(
            dense_BxN=shape((batch_size, self.model.num_dense), "float32"),
            ids_BxK=shape(slots, "int32"),
            label_B=shape((batch_size,), "float32"),
            weight_B=shape((batch_size,), "float32"),
            id_weights_BxK=shape(slots, "float32") if weighted_ids else None,
        )

    def put(self, local: Batch) -> Batch:
        """This process's rows of a batch as part of the global one."""
        put = functools.partial(jax.make_array_from_process_local_data, self.batch_sharding)
        return jax.tree.map(put, local)

    @property
    def everywhere(self) -> NamedSharding:
        """The sharding of what every device and process has whole."""
        return replicated(self.mesh)

    def jit_step(self, step: Callable[..., Any]) -> Any:
        """`step(state, batch)` compiled with explicit shardings, the state's arrays given to the new one."""
        return jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(self.shardings, self.batch_sharding),
            out_shardings=(self.shardings, self.everywhere),
        )

    def jit_window_step(self, step: Callable[..., Any], windows: Any) -> Any:
        """`step(state, record, window)` (step.make_window_step) compiled likewise; `windows` are their shardings."""
        return jax.jit(
            step,
            donate_argnums=(0, 1),
            in_shardings=(self.shardings, self.everywhere, windows),
            out_shardings=(self.shardings, self.everywhere),
        )

    def jit_observed(self, observed: Callable[..., Any], windows: Any) -> Any:
        """`observed(state, window)` compiled likewise; the state stays, and every device has what comes of it."""
        return jax.jit(observed, in_shardings=(self.shardings, windows), out_shardings=self.everywhere)

    def jit_route(self, cut: Callable[..., Batch], windows: Any) -> Any:
        """`(window, step) -> routes` of the batch that `cut` takes from the window, compiled."""

        def route(window: Any, step: jax.Array) -> Any:
            batch = without_unweighted(cut(window, step))
            return self.ops.route(batch.ids_BxK, batch.id_weights_BxK)

        return jax.jit(route, in_shardings=(windows, None), out_shardings=self.batch_sharding)

    def jit_pipelined_step(self, step: Callable[..., Any], windows: Any) -> Any:
        """`step(state, record, window, routes, next window)`, compiled as `jit_window_step` does."""
        split = self.batch_sharding
        return jax.jit(
            step,
            donate_argnums=(0, 1, 3),
            in_shardings=(self.shardings, self.everywhere, windows, split, windows),
            out_shardings=(self.shardings, self.everywhere, split),
        )


def on_one_device(model: ModelConfig, optimizer: OptimizerConfig, kernels: str = XLA) -> Placed:
    """Everything on the first device."""
    shape = MeshShape(1, 1)
    return Placed(model, optimizer, make_plan(model, shape, DATA_PARALLEL), make_mesh(shape), kernels=kernels)
