"""TPU pods without TPUs: the real training step, compiled ahead of time for a topology, and what XLA says of it.

Needs libtpu (`pip install ".[tpu-plan]"`), no TPU. Nothing is allocated.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

from dlrm_jax.config import ConfigError, LossConfig, how_to_install
from dlrm_jax.data.packed_rows import PackedRows, row_bytes, row_words
from dlrm_jax.data.read.dataset import Maker, Split
from dlrm_jax.data.read.pipeline import Cut
from dlrm_jax.data.read.windows import GeneratedSplit
from dlrm_jax.host.mesh import make_mesh
from dlrm_jax.planning.cost import Cost
from dlrm_jax.planning.hardware import HARDWARE
from dlrm_jax.planning.hlo import collectives, serial_loops, totals
from dlrm_jax.planning.planner import Setting
from dlrm_jax.training.feed import Feed, Window
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.step import TrainStep, make_train_step
from dlrm_jax.training.window_step import RECORDED, make_window_step

GENERATIONS = ("v4", "v5e", "v5p", "v6e")
_AXES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A pod slice: generation and chips along each axis."""

    generation: str
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """Chips, which are the devices of a mesh."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """As libtpu has it."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """`v5p:4x4x4` as a Topology; ConfigError for another generation or number of axes."""
    generation, _, shape = text.partition(":")
    sizes = shape.split("x")
    if generation not in GENERATIONS or not all(size.isdecimal() and int(size) for size in sizes):
        raise ConfigError(f"--topology={text} is not one of {', '.join(GENERATIONS)} with its shape, as v5p:4x4x4")
    if len(sizes) != _AXES[generation]:
        raise ConfigError(f"--topology={text}: {generation} has {_AXES[generation]} axes, as in {_example(generation)}")
    return Topology(generation, tuple(map(int, sizes)))


def _example(generation: str) -> str:
    return f"{generation}:{'x'.join('4' * _AXES[generation])}"


def other_libtpu() -> str:
    """Why the libtpu that is installed is not the one that JAX asks for (in its extra `tpu`); empty where it is."""
    try:
        found, wanted = metadata.version("libtpu"), metadata.requires("jax") or ()
    except metadata.PackageNotFoundError:
        return ""
    releases = [match[1] for line in wanted if (match := re.match(r"libtpu ?==([\d.]+)\.\*", line))]
    if not releases or f"{found}.".startswith(f"{releases[0]}."):
        return ""
    return (
        f"libtpu {found} does not belong to jax {metadata.version('jax')}, which asks for {releases[0]}: "
        f"{how_to_install('tpu-plan', upgrade=True)}"
    )


@contextlib.contextmanager
def _by_own_libtpu() -> Iterator[None]:
    """What fails inside is one line where libtpu is another than JAX asks for: the internal errors then say nothing."""
    try:
        yield
    except Exception as error:
        if other := other_libtpu():
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            raise ConfigError(f"{other} (it ended in: {reason})") from error
        raise


def devices(topology: Topology) -> list[Any]:
    """The topology's devices, for a mesh to compile for; ConfigError without libtpu or for a shape it does not know."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"--topology needs libtpu, which is not installed: {how_to_install('tpu-plan')}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # Else it asks a cloud's metadata server, for minutes.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # No TPU is used, so several may compile at once.
    from jax.experimental import topologies

    try:
        with _by_own_libtpu():
            return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
    except ConfigError:
        raise
    except Exception as error:  # What libtpu raises differs from version to version.
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"libtpu does not know the topology {topology.name} ({reason})") from error


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of a compiled step on one chip: bytes, and seconds to compile."""

    topology: str
    arguments: int
    temporaries: int
    not_aliased: int
    sent: dict[str, int]
    serial_loops: int
    predicted: Cost
    usable: float
    seconds: float

    @property
    def held(self) -> int:
        """Memory in all."""
        return self.arguments + self.temporaries + self.not_aliased

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        predicted = fields.pop("predicted")
        return fields | {"held": self.held, "predicted_held": predicted.bytes_held, "fits": self.held <= self.usable}

    def text(self) -> str:
        """Beside what was predicted."""
        fits = "fits" if self.held <= self.usable else f"{(self.held - self.usable) / 1e9:.2f} GB too much"
        sent = ", ".join(f"{kind} {num / 1e6:,.2f} MB" for kind, num in self.sent.items())
        return (
            f"\ncompiled for {self.topology} in {self.seconds:.1f} s; XLA's numbers for a chip:\n"
            f"memory {self.held / 1e9:,.3f} GB (arguments {self.arguments / 1e9:,.3f}, temporaries "
            f"{self.temporaries / 1e9:,.3f}), predicted {self.predicted.bytes_held / 1e9:,.3f} GB: {fits}\n"
            f"collectives {sent}; predicted {self.predicted.sent.total / 1e6:,.2f} MB in all"
        )


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of `steps` batches, as a run's step has them: of rows that travel, or whose order does.

    With `rows` so many stay on every chip; with a `maker` (dataset.Maker) steps make them instead.
    """

    steps: int
    rows: int = 0
    maker: Maker | None = None


def compile_report(
    setting: Setting, loss: LossConfig, cost: Cost, topology: Topology, windows: Windows | None = None
) -> Compiled:
    """Compile the training step of a plan for a pod: of a batch, or as a run's, of a window.

    What rows that stay take is in `predicted` where the setting's load has them.
    """
    mesh = make_mesh(setting.mesh, devices(topology))
    placed = Placed(setting.model, setting.optimizer, cost.plan, mesh, cost.options, packed=True)
    parts = setting.load.num_micro_batches
    plain = make_train_step(setting.model, loss, setting.optimizer, parts, placed.ops)
    multiple = mesh.size * parts
    batch_size = -(-setting.load.batch_size // multiple) * multiple
    step, arguments = placed.jit_step(plain), (placed.abstract_batch(batch_size),)
    if windows is not None:
        step, arguments = _of_a_window(placed, plain, batch_size, windows)
    start = time.perf_counter()
    with _by_own_libtpu():
        compiled = step.lower(placed.abstract_state, *arguments).compile()
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        topology=topology.name,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        not_aliased=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        sent=totals(collectives(text)),
        serial_loops=serial_loops(text),
        predicted=cost,
        usable=HARDWARE[topology.generation].memory_bytes,
        seconds=seconds,
    )


def _of_a_window(placed: Placed, step: TrainStep, batch_size: int, windows: Windows) -> tuple[Any, tuple[Any, ...]]:
    """(the step that cuts its batch from a window, what it takes behind the state: a record and a window)."""
    steps, made = windows.steps, windows.maker is not None
    split = GeneratedSplit(0, windows.rows, 1, _unread, maker=windows.maker)
    feed = Feed(split, Cut(batch_size, steps), placed.mesh, resident=bool(windows.rows) and not made, made=made)
    assert feed.shardings is not None
    first = (windows.rows,) if windows.rows else (steps, batch_size)
    columns, order_TxB = (placed.model.num_dense, placed.model.num_slots), feed.shardings.order_TxB
    words = (*first, row_bytes(*columns) // 4 if windows.rows else row_words(*columns))
    window = Window(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=placed.everywhere),
        None if made else PackedRows(jax.ShapeDtypeStruct(words, jnp.int32, sharding=feed.shardings.rows), *columns),
        order_TxB and jax.ShapeDtypeStruct((steps, batch_size), jnp.uint32, sharding=order_TxB),
    )
    record = jax.ShapeDtypeStruct((steps, len(RECORDED)), jnp.float32, sharding=placed.everywhere)
    return placed.jit_window_step(make_window_step(step, feed), feed.shardings), (record, window)


def _unread(index: int) -> Split:
    raise NotImplementedError(f"block {index} of rows of which there are only shapes")
