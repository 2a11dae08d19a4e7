"""What a plan costs a step: bytes sent, memory held, work done, on one device. Predicted from shapes alone.

Bytes sent are exact: the exchange's buffers are static, and the compiled step's collectives (hlo.py) must add up to the
same numbers. Memory is exact for tables, optimizer state and dense parameters; what a step needs besides is estimated
(step_memory.py), so that all together is within a tenth of what XLA's compiled steps hold on a CPU.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from dlrm_jax.config import ModelConfig, OptimizerConfig, TableConfig
from dlrm_jax.planning.dense_work import dense_work
from dlrm_jax.planning.hardware import Hardware
from dlrm_jax.planning.hlo import CONTROL_BYTES
from dlrm_jax.planning.skew import expected_distinct
from dlrm_jax.planning.step_memory import Rows, pooled_floats, step_floats
from dlrm_jax.tables.collective import ExchangeOptions
from dlrm_jax.tables.exchange import stack_rule
from dlrm_jax.tables.forms import FORMS
from dlrm_jax.tables.forms.data_parallel import sent_rows
from dlrm_jax.tables.forms.table_wise import parcels
from dlrm_jax.tables.layout import COLUMNS, OWNED, REPLICATED, ROUTED, Stack, place_stacks
from dlrm_jax.tables.plan import Plan, weight_bytes
from dlrm_jax.tables.rows import LANES
from dlrm_jax.tables.rules import WEIGHT, row_means

FLOAT = INT = 4
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

    def distinct(self, table: TableConfig, draws: float) -> float:
        """Expected distinct ids of `draws` from a table."""
        return expected_distinct(table.num_embeddings, draws, self.skew_of.get(table.name, self.skew))


def routed_capacity(stack: Stack, load: Load) -> int:
    """Rows that a device will ask of one peer: the expected distinct ones of its share, and three deviations more."""
    devices = stack.num_shards * stack.num_copies
    per_shard = np.zeros(stack.num_shards)
    for t, table in enumerate(stack.tables):
        draws = -(-load.batch_size // devices) * int((stack.table_K == t).sum())
        shards = slice(stack.first_T[t], stack.first_T[t] + stack.count_T[t])
        per_shard[shards] += load.distinct(table, draws) / stack.count_T[t]
    most = float(per_shard.max())
    return -(-int(most + 3 * math.sqrt(most) + 1) // 8) * 8


def capacities(stacks: tuple[Stack, ...], load: Load) -> dict[str, int]:
    """Rows that a device may ask of one peer, for each row-wise stack."""
    routed = [stack for stack in stacks if stack.form == ROUTED]
    return {stack.name: load.exchange_capacity or routed_capacity(stack, load) for stack in routed}


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
    b = -(-load.batch_size // (shards * copies))
    scales = load.weighted_ids or any(feature.pooling == "mean" and feature.hotness > 1 for feature in model.features)
    found = FORMS[stack.form].sent(stack, b, stack.dim + int(model.learned_pooling), scales, options)
    if stack.form == COLUMNS:  # What a rule needs of a whole row is summed over its columns.
        one_a_slot = copies * shards * b * len(stack.slots) * FLOAT
        found += [("all-reduce", shards, one_a_slot)] * row_means(stack_rule(optimizer, stack))
    return [
        (kind, size) for kind, devices, size in found if devices > 1 and (kind != "all-reduce" or size > CONTROL_BYTES)
    ]


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
    flops = 3 * _forward_flops(model) * -(-load.batch_size // plan.mesh.size)
    traffic, row_traffic = _traffic(model, optimizer, stacks, load)
    peers = 1 - 1 / max(plan.mesh.size, 2)
    seconds = {
        "compute": flops / hardware.flops,
        "memory": traffic / hardware.memory_rate + row_traffic / (hardware.memory_rate * hardware.row_efficiency),
        "network": sent.total * peers / hardware.link_rate + sent.count * hardware.latency,
        "launch": _KERNELS * hardware.launch,
    }
    memory = _memory(model, optimizer, stacks, load, sent, options, hardware.on_chip_bytes)
    return Cost(plan, stacks, options, memory, sent, flops, traffic + row_traffic, seconds)


def _summed(model: ModelConfig, num_micro_batches: int) -> int:
    """Floats summed over devices: loss, gradients; with batch norms for each part, and six for each of its columns."""
    dense, averages = dense_parameters(model) + 1, dense_work(model).averages
    return num_micro_batches * (dense + 3 * averages) + 1 if averages else dense


def forward_work(
    model: ModelConfig, stacks: tuple[Stack, ...], load: Load, hardware: Hardware
) -> tuple[float, float, dict[str, float]]:
    """(operations, bytes read and written, seconds of each) of scoring a batch, on one device."""
    b = -(-load.batch_size // (stacks[0].num_shards * stacks[0].num_copies))
    outputs = dense_work(model).outputs + dense_work(model).interaction_width
    rows = float(sum(_slots_looked_up(stack, load) * stack.width for stack in stacks)) * FLOAT
    # An activation is written and read once, a pooled vector too; weights are read once.
    streams = 2.0 * FLOAT * b * (outputs + pooled_floats(model)) + FLOAT * dense_parameters(model)
    flops = _forward_flops(model) * b
    memory = streams / hardware.memory_rate + rows / (hardware.memory_rate * hardware.row_efficiency)
    return flops, streams + rows, {"compute": flops / hardware.flops, "memory": memory}


def _forward_flops(model: ModelConfig) -> float:
    return dense_work(model).flops


def _slots_looked_up(stack: Stack, load: Load) -> int:
    """Rows that the busiest device reads in a step, repeated ids each time."""
    per_copy = -(-load.batch_size // stack.num_copies)
    if stack.form == REPLICATED:
        return -(-per_copy // stack.num_shards) * len(stack.slots)
    if stack.form == COLUMNS:
        return per_copy * len(stack.slots)
    if stack.form == OWNED:
        return per_copy * parcels(stack).slot_SxK.shape[1]
    return -(-per_copy // stack.num_shards) * len(stack.slots)


def _rows_updated(stack: Stack, load: Load) -> float:
    """Distinct rows that the busiest device updates in a step."""
    per_shard = np.zeros(stack.num_shards)
    for t, table in enumerate(stack.tables):
        distinct = load.distinct(table, load.batch_size * int((stack.table_K == t).sum()))
        shards = slice(stack.first_T[t], stack.first_T[t] + stack.count_T[t])
        per_shard[shards if stack.form in (OWNED, ROUTED) else slice(None)] += distinct / stack.count_T[t]
    return float(per_shard.max())


def _traffic(
    model: ModelConfig, optimizer: OptimizerConfig, stacks: tuple[Stack, ...], load: Load
) -> tuple[float, float]:
    """(bytes of streams, bytes of single rows) that one device reads and writes."""
    devices = stacks[0].num_shards * stacks[0].num_copies
    b = -(-load.batch_size // devices)
    outputs = dense_work(model).outputs + dense_work(model).interaction_width
    # An activation is written, read by the next layer and by its weight's gradient, and so is its gradient.
    streams = 7.0 * FLOAT * b * outputs + 5 * FLOAT * dense_parameters(model)
    rows = 0.0
    for stack in stacks:
        looked_up, width = _slots_looked_up(stack, load), stack.width * weight_bytes(stack.tables[0])
        rule = stack_rule(optimizer, stack)
        slots = 2 * FLOAT * sum(slot.width(stack.width) for slot in rule.slots)  # Read and written.
        rows += looked_up * width + _rows_updated(stack, load) * (2 * width + slots)
        merged = looked_up * (stack.num_copies if stack.form == COLUMNS else 1)
        streams += 4 * merged * width + (0 if rule.linear else 64 * merged)
    return streams, rows


def _memory(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    stacks: tuple[Stack, ...],
    load: Load,
    sent: Sent,
    options: ExchangeOptions,
    on_chip_bytes: int,
) -> dict[str, int]:
    devices = stacks[0].num_shards * stacks[0].num_copies
    b = -(-load.batch_size // devices)
    tables = states = 0
    for stack in stacks:
        shards = stack.num_shards if stack.form in (OWNED, ROUTED) else 1
        rows = math.prod(stack.local_shape)
        per_row = math.prod(stack.row_shape()) // shards
        learned = per_row if model.learned_pooling else 0
        tables += rows * weight_bytes(stack.tables[0]) + learned * FLOAT
        for slot in stack_rule(optimizer, stack).slots:
            states += ((rows if slot.per == WEIGHT else per_row) + learned) * FLOAT
    dense = dense_parameters(model) * FLOAT
    batch = b * (model.num_dense + model.num_slots + 2) * FLOAT
    if any(stack.pack > 1 for stack in stacks):
        activations, exchange = _packed_step(model, stacks, load, sent)
    else:
        needed = [Rows(stack, _slots_looked_up(stack, load), _rows_received(stack, b, options)) for stack in stacks]
        floats = step_floats(model, optimizer, needed, b, load.num_micro_batches)
        activations, exchange = (count * FLOAT for count in (floats if devices > 1 else (sum(floats), 0)))
    on_chip = min(on_chip_bytes, activations + exchange)
    activations, exchange = activations - min(on_chip, activations), exchange - max(0, on_chip - activations)
    return {
        "tables": tables,
        "optimizer state": states,
        "dense parameters": dense * (1 + _OPT_COPIES[optimizer.dense]) + dense_work(model).averages * FLOAT,
        "activations": batch + activations,
        "exchange buffers": exchange,
    }


def _rows_received(stack: Stack, examples: int, options: ExchangeOptions) -> int:
    """Rows that a device takes in of all others at once, each of `examples` of its own."""
    slots = examples * len(stack.slots)
    if stack.form == ROUTED:
        return stack.num_copies * stack.num_shards * min(options.capacity.get(stack.name, slots), slots)
    return min(sent_rows(stack, examples), slots) * stack.num_shards * stack.num_copies


def _packed_step(model: ModelConfig, stacks: tuple[Stack, ...], load: Load, sent: Sent) -> tuple[int, int]:
    """(bytes of activations, bytes of the exchange) where rows share lines: an id slot takes a whole one."""
    devices = stacks[0].num_shards * stacks[0].num_copies
    b = -(-load.batch_size // devices)
    dense = dense_parameters(model) * FLOAT
    widths = [stack.width if stack.pack == 1 else _COPIES * (LANES + stack.width) for stack in stacks]
    looked_up = [_slots_looked_up(stack, load) for stack in stacks]
    slots = int(sum(count * (width + 4) for count, width in zip(looked_up, widths, strict=True))) * FLOAT
    outputs = dense_work(model).outputs + 3 * dense_work(model).interaction_width
    activations = 2 * b // load.num_micro_batches * outputs * FLOAT + slots + dense
    if devices == 1:
        return activations, sent.total
    # When the dense gradients are summed, in one array and out of another, the slots' are gone.
    return activations, max(sent.total - dense - FLOAT, 2 * dense - activations)
