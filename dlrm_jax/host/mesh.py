"""The mesh, `data` x `model` devices: batches are split over both, tables over `model`, with copies along `data`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlrm_jax.config import ConfigError

DATA, MODEL = "data", "model"
BATCH_SPEC = PartitionSpec((DATA, MODEL))
"""The first axis of a batch, of logits and of pooled vectors: split over all devices."""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis: `model` shards of the tables, `data` copies of them."""

    data: int = 1
    model: int = 1

    def __post_init__(self) -> None:
        if self.data < 1 or self.model < 1:
            raise ConfigError(f"mesh {self} is empty; every axis needs at least one device")

    def __str__(self) -> str:
        return f"data:{self.data},model:{self.model}"

    @property
    def size(self) -> int:
        """Devices."""
        return self.data * self.model


FAKE_DEVICES = "set JAX_NUM_CPU_DEVICES={0} (with JAX_PLATFORMS=cpu) for {0} fake devices on a CPU"
"""How to have more devices than a machine has; {0} stands for their number."""


def parse_mesh(text: str, num_devices: int, more: str = FAKE_DEVICES) -> MeshShape:
    """`data:2,model:4` as a MeshShape; an empty text puts all devices on `model`.

    Raises ConfigError for another axis, a number that is none, or a product of more than `num_devices`; `more` tells
    how to have as many.
    """
    if not text:
        return MeshShape(1, num_devices)
    sizes = {DATA: 1, MODEL: 1}
    for part in text.split(","):
        axis, _, size = part.partition(":")
        if axis not in sizes or not size.isdecimal():
            raise ConfigError(f"--mesh={text}: {part!r} is not data:N or model:N, as in --mesh=data:2,model:4")
        sizes[axis] = int(size)
    shape = MeshShape(**sizes)
    if shape.size > num_devices:
        raise ConfigError(
            f"--mesh={text} has {shape.size} devices, but there are {num_devices}; make it smaller"
            + (f", or {more.format(shape.size)}" if more else "")
        )
    return shape


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (all, unless given), in their order, so that a process's devices stay neighbours."""
    devices = jax.devices() if devices is None else devices
    grid = np.asarray(devices, dtype=object)[: shape.size].reshape(shape.data, shape.model)
    return Mesh(grid, (DATA, MODEL))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over all devices."""
    return NamedSharding(mesh, BATCH_SPEC)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())
