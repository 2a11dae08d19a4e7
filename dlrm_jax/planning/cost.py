"""What a plan costs a step: bytes sent, memory held, work done, on one device. Predicted from shapes alone.

Bytes sent are exact: the exchange's buffers are static, and the compiled step's collectives (hlo.py) must add up to the
same numbers. Memory is exact for tables, optimizer state and dense parameters; what a step needs besides is estimated
(step_memory.py), so that all together is within 5 % of what XLA's compiled steps hold on one CPU device, and within
15 % on one of several, where XLA leaves gaps, for the shapes of tests/planning/cost_test.py.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from dlrm_jax.config import ModelConfig, OptimizerConfig, TableConfig
from dlrm_jax.config.learning import ALL_ROWS
from dlrm_jax.data.packed_rows import row_bytes
from dlrm_jax.planning.dense_work import dense_work
from dlrm_jax.planning.hardware import Hardware
from dlrm_jax.planning.hlo import CONTROL_BYTES
from dlrm_jax.planning.skew import expected_distinct
from dlrm_jax.planning.step_memory import pooled_floats, step_floats
from dlrm_jax.tables.collective import ExchangeOptions
from dlrm_jax.tables.exchange import stack_rule
from dlrm_jax.tables.forms.base import Stack, Work
from dlrm_jax.tables.layout import place_stacks
from dlrm_jax.tables.plan import Plan
from dlrm_jax.tables.rows import LANES
from dlrm_jax.tables.rules import WEIGHT, row_means

FLOAT = 4
RESIDENT = "rows of the data"
MARKS = "marks of changed rows"
_OPT_COPIES = {"sgd": 0, "momentum": 1, "adagrad": 1, "adam": 2, "adamw": 2}
_KERNELS = 80
"""Kernels of a training step besides the collectives (counted in a compiled step of the Kaggle configuration)."""
_COPIES = 2
"""Arrays of each id slot's line, and of its row, that live at once where rows share lines: one read, one written."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What is common to all plans: how a step takes its examples, and how ids fall off in each table, as rank^-skew.

    `exchange_capacity` 0: as many rows as these ids should need (routed_capacity).
    """

    batch_size: int
    skew: float = 1.05
    skew_of: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weighted_ids: bool = False
    num_micro_batches: int = 1
    exchange_dtype: str = ""
    exchange_capacity: int = 0
    resident_rows: int = 0
    """Rows of the data that stay on every device."""
    marks_rows: bool = False
    """Whether the host marks the rows that change, for versions that are published."""

    def distinct(self, table: TableConfig, draws: float) -> float:
        """Expected distinct ids of `draws` from a table."""
        return expected_distinct(table.num_embeddings, draws, self.skew_of.get(table.name, self.skew))


def routed_capacity(stack: Stack, load: Load) -> int:
    """Rows that a device will ask of one peer: the expected distinct ones of its share, and three deviations more."""
    most = _most_distinct(stack, load, -(-load.batch_size // stack.num_devices))
    return -(-int(most + 3 * math.sqrt(most) + 1) // 8) * 8


def _most_distinct(stack: Stack, load: Load, examples: int) -> float:
    """Distinct rows that so many examples need of one shard, of that of which they need most."""
    per_shard = np.zeros(stack.num_shards)
    for t, table in enumerate(stack.tables):
        distinct = load.distinct(table, examples * int((stack.table_K == t).sum()))
        per_shard[stack.first_T[t] : stack.first_T[t] + stack.count_T[t]] += distinct / stack.count_T[t]
    return float(per_shard.max())


def capacities(stacks: tuple[Stack, ...], load: Load) -> dict[str, int]:
    """Rows that a device may ask of one peer, for each stack that asks for rows."""
    return {
        stack.name: load.exchange_capacity or routed_capacity(stack, load) for stack in stacks if stack.form.in_rounds
    }


@dataclasses.dataclass(frozen=True)
class Sent:
    """Bytes of the collectives' results on one device, by kind, and how many there are."""

    bytes_by_kind: Mapping[str, int]
    count: int

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(self.bytes_by_kind.values())


def exchanged(
    model: ModelConfig, optimizer: OptimizerConfig, stack: Stack, load: Load, options: ExchangeOptions
) -> list[tuple[str, int]]:
    """(kind, bytes) of every collective that one stack needs in a step without overflow."""
    shards, copies = stack.num_shards, stack.num_copies
    b = -(-load.batch_size // stack.num_devices)
    scales = load.weighted_ids or any(feature.pooling == "mean" and feature.hotness > 1 for feature in model.features)
    found = stack.form.sent(stack, b, stack.dim + int(model.learned_pooling), scales, options)
    if stack.form.splits_columns:  # What a rule needs of a whole row is summed over its columns.
        one_a_slot = copies * shards * b * len(stack.slots) * FLOAT
        found += [("all-reduce", shards, one_a_slot)] * row_means(stack_rule(optimizer, stack))
    return [
        (kind, size) for kind, devices, size in found if devices > 1 and (kind != "all-reduce" or size > CONTROL_BYTES)
    ]


def marks_bytes(model: ModelConfig) -> int:
    """What a mark for each row of a model's tables takes of the host's memory (training/touched.py)."""
    return sum(table.num_embeddings + 1 for table in model.tables)


def dense_parameters(model: ModelConfig) -> int:
    """Floats of the MLPs and the interaction."""
    return dense_work(model).parameters


@dataclasses.dataclass(frozen=True)
class Cost:
    """A plan's costs a step on the device that has most to do; bytes, floating point operations, seconds."""

    plan: Plan
    stacks: tuple[Stack, ...]
    options: ExchangeOptions
    memory: Mapping[str, int]
    sent: Sent
    flops: float
    traffic: float
    seconds: Mapping[str, float]

    @property
    def bytes_held(self) -> int:
        """Memory, all parts together."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """Compute, memory and network one after the other, as they do not overlap by much, and launches."""
        return sum(self.seconds.values())

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda part: self.seconds[part])


def estimate(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    plan: Plan,
    load: Load,
    hardware: Hardware,
    options: ExchangeOptions | None = None,
    packed: bool = False,
) -> Cost:
    """The costs of a plan. Without `options` the exchange's are those of `load`."""
    multiple = plan.mesh.size * load.num_micro_batches  # Of which batches are padded to a multiple.
    load = dataclasses.replace(load, batch_size=-(-load.batch_size // multiple) * multiple)
    stacks = place_stacks(model, plan, packed)
    options = options or ExchangeOptions(load.exchange_dtype, capacities(stacks, load))
    pieces = [piece for stack in stacks for piece in exchanged(model, optimizer, stack, load, options)]
    if plan.mesh.size > 1:
        pieces.append(("all-reduce", _summed(model, load.num_micro_batches) * FLOAT))
    by_kind: dict[str, int] = {}
    for kind, num_bytes in pieces:
        by_kind[kind] = by_kind.get(kind, 0) + num_bytes
    sent = Sent(by_kind, len(pieces))
    flops = 3 * dense_work(model).flops * -(-load.batch_size // plan.mesh.size)
    traffic, row_traffic = _traffic(model, optimizer, stacks, load)
    peers = 1 - 1 / max(plan.mesh.size, 2)
    seconds = {
        "compute": flops / hardware.flops,
        "memory": traffic / hardware.memory_rate + row_traffic / (hardware.memory_rate * hardware.row_efficiency),
        "network": sent.total * peers / hardware.link_rate + sent.count * hardware.latency,
        "launch": _KERNELS * hardware.launch,
    }
    memory = _memory(model, optimizer, stacks, load, sent, options, hardware)
    if load.resident_rows:
        memory[RESIDENT] = load.resident_rows * row_bytes(model.num_dense, model.num_slots, packed)
    return Cost(plan, stacks, options, memory, sent, flops, traffic + row_traffic, seconds)


def _summed(model: ModelConfig, num_micro_batches: int) -> int:
    """Floats summed over devices: loss, gradients; with batch norms for each part, and six for each of its columns."""
    dense, averages = dense_parameters(model) + 1, dense_work(model).averages
    return num_micro_batches * (dense + 3 * averages) + 1 if averages else dense


def forward_work(
    model: ModelConfig, stacks: tuple[Stack, ...], load: Load, hardware: Hardware
) -> tuple[float, float, dict[str, float]]:
    """(operations, bytes read and written, seconds of each) of scoring a batch, on one device."""
    b = -(-load.batch_size // stacks[0].num_devices)
    outputs = dense_work(model).outputs + dense_work(model).interaction_width
    rows = float(sum(stack.form.looked_up(stack, load.batch_size) * stack.width for stack in stacks)) * FLOAT
    # An activation is written and read once, a pooled vector too; weights are read once.
    streams = 2.0 * FLOAT * b * (outputs + pooled_floats(model)) + FLOAT * dense_parameters(model)
    flops = dense_work(model).flops * b
    memory = streams / hardware.memory_rate + rows / (hardware.memory_rate * hardware.row_efficiency)
    return flops, streams + rows, {"compute": flops / hardware.flops, "memory": memory}


def _traffic(
    model: ModelConfig, optimizer: OptimizerConfig, stacks: tuple[Stack, ...], load: Load
) -> tuple[float, float]:
    """(bytes of streams, bytes of single rows) that one device reads and writes."""
    devices = stacks[0].num_devices
    b = -(-load.batch_size // devices)
    outputs = dense_work(model).outputs + dense_work(model).interaction_width
    # An activation is written, read by the next layer and by its weight's gradient, and so is its gradient.
    streams = 7.0 * FLOAT * b * outputs + 5 * FLOAT * dense_parameters(model)
    rows = 0.0
    for stack in stacks:
        looked_up, width = stack.form.looked_up(stack, load.batch_size), stack.width * stack.dtype.bytes
        moves_all = optimizer.table_update == ALL_ROWS
        updated = float(stack.rows) if moves_all else _most_distinct(stack, load, load.batch_size)
        rule = stack_rule(optimizer, stack)
        slots = 2 * FLOAT * sum(slot.width(stack.width) for slot in rule.slots)  # Read and written.
        rows += looked_up * width + updated * (2 * width + slots)
        merged = looked_up * (stack.num_copies if stack.form.splits_columns else 1)
        streams += 4 * merged * width + (0 if rule.linear else 64 * merged)
        streams += 2 * FLOAT * stack.width * stack.rows * moves_all  # The whole gradient, written and read.
    return streams, rows


def _memory(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    stacks: tuple[Stack, ...],
    load: Load,
    sent: Sent,
    options: ExchangeOptions,
    hardware: Hardware,
) -> dict[str, int]:
    devices = stacks[0].num_devices
    b = -(-load.batch_size // devices)
    tables = states = 0
    for stack in stacks:
        rows = math.prod(stack.local_shape)
        per_row = math.prod(stack.row_shape()) // stack.row_shards
        learned = per_row if model.learned_pooling else 0
        tables += rows * stack.dtype.bytes + learned * FLOAT
        for slot in stack_rule(optimizer, stack).slots:
            states += ((rows if slot.per == WEIGHT else per_row) + learned) * FLOAT
    dense = dense_parameters(model) * FLOAT
    batch = b * row_bytes(model.num_dense, model.num_slots)
    if any(stack.pack > 1 for stack in stacks):
        activations, exchange = _packed_step(model, stacks, load, sent)
    else:
        works = [_work(model, optimizer, stack, load, options, hardware.is_cpu) for stack in stacks]
        floats = step_floats(model, works, b, load.num_micro_batches)
        activations, exchange = (count * FLOAT for count in (floats if devices > 1 else (sum(floats), 0)))
    if optimizer.table_update == ALL_ROWS:
        activations += max(_floats_of_all_rows(optimizer, stack) for stack in stacks) * FLOAT
    on_chip = min(hardware.on_chip_bytes, activations + exchange)
    activations, exchange = activations - min(on_chip, activations), exchange - max(0, on_chip - activations)
    return {
        "tables": tables,
        "optimizer state": states,
        "dense parameters": dense * (1 + _OPT_COPIES[optimizer.dense]) + dense_work(model).averages * FLOAT,
        "activations": batch + activations,
        "exchange buffers": exchange,
        **({MARKS: marks_bytes(model) // devices} if load.marks_rows and hardware.is_cpu else {}),
    }


def _floats_of_all_rows(optimizer: OptimizerConfig, stack: Stack) -> int:
    """What an update of all rows holds: their gradient, what is added to them, half of the new slots; their numbers."""
    kept = sum(slot.per == WEIGHT for slot in stack_rule(optimizer, stack).slots)
    return stack.rows * ((4 + kept) * stack.width // 2 + 3)


def _work(
    model: ModelConfig, optimizer: OptimizerConfig, stack: Stack, load: Load, options: ExchangeOptions, on_cpu: bool
) -> Work:
    received = stack.form.received(stack, -(-load.batch_size // stack.num_devices), options)
    in_pieces = on_cpu and any(hotness > 1 for hotness in stack.hotness) and not model.learned_pooling
    slots = stack.form.looked_up(stack, load.batch_size)
    return Work(stack, stack_rule(optimizer, stack), slots, received, model.learned_pooling, in_pieces)


def _packed_step(model: ModelConfig, stacks: tuple[Stack, ...], load: Load, sent: Sent) -> tuple[int, int]:
    """(bytes of activations, bytes of the exchange) where rows share lines: an id slot takes a whole one."""
    devices = stacks[0].num_devices
    b = -(-load.batch_size // devices)
    dense = dense_parameters(model) * FLOAT
    widths = [stack.width if stack.pack == 1 else _COPIES * (LANES + stack.width) for stack in stacks]
    looked_up = [stack.form.looked_up(stack, load.batch_size) for stack in stacks]
    slots = int(sum(count * (width + 4) for count, width in zip(looked_up, widths, strict=True))) * FLOAT
    outputs = dense_work(model).outputs + 3 * dense_work(model).interaction_width
    activations = 2 * b // load.num_micro_batches * outputs * FLOAT + slots + dense
    if devices == 1:
        return activations, sent.total
    # When the dense gradients are summed, in one array and out of another, the slots' are gone.
    return activations, max(sent.total - dense - FLOAT, 2 * dense - activations)
