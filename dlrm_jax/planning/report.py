"""Plans for people: a table, a JSON value, a picture."""

import itertools
import pathlib
from typing import Any

import numpy as np

from dlrm_jax.config import TableConfig
from dlrm_jax.host.texts import aligned
from dlrm_jax.planning.cost import MARKS, Cost, marks_bytes
from dlrm_jax.planning.planner import Setting
from dlrm_jax.tables.forms import form_of
from dlrm_jax.tables.forms.base import ALL
from dlrm_jax.tables.plan import Placement, table_bytes, weight_bytes


def text(setting: Setting, cost: Cost, ranked: list[tuple[str, Cost]]) -> str:
    """Tables, balance, memory, traffic, time and the ranking of strategies."""
    model, hardware = setting.model, setting.hardware
    lines = [
        f"{len(model.tables)} tables, {sum(t.num_embeddings for t in model.tables):,} rows of {model.embedding_dim}, "
        f"batch {setting.load.batch_size}, mesh {setting.mesh} of {hardware.name} ({hardware.source})",
        "",
        aligned(_table_rows(setting, cost), left=(0, 4, 5)),
        "",
        f"tables on a device: least {balance(cost)[0] / 1e6:,.1f} MB, most {balance(cost)[1] / 1e6:,.1f} MB",
        f"memory of a device: {_parts(cost.memory, 1e6, 'MB')}; {cost.bytes_held / 1e9:,.3f} GB in all, "
        + ("fits" if setting.over(cost) <= 0 else f"{setting.over(cost) / 1e9:,.3f} GB too much"),
        f"a step and device: {cost.flops / 1e9:,.2f} GFLOP, {cost.traffic / 1e6:,.1f} MB of memory traffic, "
        f"{cost.sent.total / 1e6:,.2f} MB by {cost.sent.count} collectives "
        f"({_parts(cost.sent.bytes_by_kind, 1e6, 'MB')})",
        f"predicted step: {cost.step_seconds * 1e3:,.3f} ms, bound by {cost.bound} "
        f"({_parts(cost.seconds, 1e-3, 'ms', 3)})",
        "",
        aligned(_ranking_rows(setting, ranked)),
    ]
    if setting.load.marks_rows and not hardware.is_cpu:  # Else it is among what a device holds.
        lines.insert(6, f"memory of the host: {MARKS} {marks_bytes(model) / 1e6:,.1f} MB")
    return "\n".join(lines)


def _parts(values: Any, unit: float, name: str, digits: int = 1) -> str:
    return ", ".join(f"{part} {value / unit:,.{digits}f} {name}" for part, value in values.items())


def _table_rows(setting: Setting, cost: Cost) -> list[list[str]]:
    head = ["table", "rows", "dim", "MB", "placement", "why", "MB a device", "ids sent", "vectors sent"]
    rows = [head]
    for table in setting.model.tables:
        placement = cost.plan.tables[table.name]
        ids, vectors = _sent_by(setting, cost, table)
        rows.append(
            [
                table.name,
                f"{table.num_embeddings:,}",
                str(table.embedding_dim),
                f"{table_bytes(table) / 1e6:,.1f}",
                _where(placement),
                why(setting, table, placement),
                f"{bytes_a_device(setting, table, placement) / 1e6:,.1f}",
                f"{ids:,.0f}",
                f"{vectors:,.0f}",
            ]
        )
    return rows


def _ranking_rows(setting: Setting, ranked: list[tuple[str, Cost]]) -> list[list[str]]:
    rows = [["strategy", "step ms", "bound by", "GB a device", "MB sent", "fits"]]
    for name, cost in ranked:
        over = setting.over(cost)
        rows.append(
            [
                name,
                f"{cost.step_seconds * 1e3:,.3f}",
                cost.bound,
                f"{cost.bytes_held / 1e9:,.3f}",
                f"{cost.sent.total / 1e6:,.2f}",
                "yes" if over <= 0 else f"{over / 1e9:,.2f} GB too much",
            ]
        )
    return rows


def _where(placement: Placement) -> str:
    if form_of(placement.sharding).span == ALL:
        return placement.sharding
    last = f"-{placement.first + placement.count - 1}" if placement.count > 1 else ""
    return f"{placement.sharding} on {placement.first}{last}"


def why(setting: Setting, table: TableConfig, placement: Placement) -> str:
    """The reason in a few words: what this placement spares."""
    slots = sum(one.hotness for one in setting.model.lookups if one.part.table == table.name)
    form, lookups = form_of(placement.sharding), slots * setting.load.batch_size
    return "fewer rows than the batch looks up" if form.replicated and table.num_embeddings <= lookups else form.why


def bytes_a_device(setting: Setting, table: TableConfig, placement: Placement) -> float:
    """Bytes of a table on a device that holds part of it."""
    form = form_of(placement.sharding)
    rows = -(-table.num_embeddings // (placement.count if form.splits_rows else 1))
    return rows * -(-table.embedding_dim // (setting.mesh.model if form.splits_columns else 1)) * weight_bytes(table)


def _sent_by(setting: Setting, cost: Cost, table: TableConfig) -> tuple[float, float]:
    """(ids, vectors) that a device sends for a table in a step, as its share of its stack's by id slots."""
    if setting.mesh.size == 1:
        return 0.0, 0.0
    stack = next(stack for stack in cost.stacks if table in stack.tables)
    b = setting.load.batch_size / setting.mesh.size
    ids = b * float((stack.table_K == stack.tables.index(table)).sum())
    bags = b * sum(one.part.table == table.name for one in setting.model.lookups)
    if stack.form.replicated:
        return min(table.num_embeddings, ids), min(table.num_embeddings, ids)
    rows = setting.load.distinct(table, ids)
    return (rows, 2 * rows) if stack.form.in_rounds else (ids, 2 * bags)


def balance(cost: Cost) -> tuple[int, int]:
    """(least, most) bytes of tables on a device, without padding."""
    loads = [0] * cost.plan.mesh.model
    for stack, shard in itertools.product(cost.stacks, range(len(loads))):
        rows = sum(-(-stack.tables[t].num_embeddings // stack.count_T[t]) for t in stack.tables_on(shard))
        loads[shard] += rows * stack.width * stack.dtype.bytes
    return min(loads), max(loads)


def as_dict(setting: Setting, cost: Cost, ranked: list[tuple[str, Cost]]) -> dict[str, Any]:
    """Everything as JSON values; `mesh` and `tables` are the plan, as --sharding_plan reads it."""
    return cost.plan.to_dict() | {
        "hardware": vars(setting.hardware),
        "batch_size": setting.load.batch_size,
        "fits": setting.over(cost) <= 0,
        "cost": _cost_dict(cost),
        "ranking": {name: _cost_dict(other) for name, other in ranked},
    }


def _cost_dict(cost: Cost) -> dict[str, Any]:
    return {
        "memory": dict(cost.memory),
        "sent": dict(cost.sent.bytes_by_kind),
        "collectives": cost.sent.count,
        "flops": cost.flops,
        "traffic": cost.traffic,
        "seconds": dict(cost.seconds),
        "step_seconds": cost.step_seconds,
        "bound": cost.bound,
        "exchange_capacity": dict(cost.options.capacity),
    }


def draw(setting: Setting, ranked: list[tuple[str, Cost]], path: pathlib.Path) -> None:
    """Bars of predicted time, memory and bytes sent for every strategy."""
    from matplotlib.figure import Figure  # A second to import; no pyplot, so that no display is asked for.

    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    names = [name for name, _ in ranked]
    columns = (
        ("predicted step, ms", [{k: v * 1e3 for k, v in cost.seconds.items()} for _, cost in ranked]),
        ("memory of a device, GB", [{k: v / 1e9 for k, v in cost.memory.items()} for _, cost in ranked]),
        (
            "sent by a device a step, MB",
            [{k: v / 1e6 for k, v in cost.sent.bytes_by_kind.items()} for _, cost in ranked],
        ),
    )
    for axis, (title, stacked) in zip(axes, columns, strict=True):
        base = np.zeros(len(names))
        for part in dict.fromkeys(key for values in stacked for key in values):
            heights = np.array([values.get(part, 0.0) for values in stacked])
            axis.bar(names, heights, bottom=base, label=part)
            base += heights
        axis.set_title(title)
        axis.tick_params(axis="x", rotation=40)
        axis.set_ylim(0, 1.35 * axis.get_ylim()[1])  # Room for the legend above the bars.
        axis.legend(fontsize=8, ncols=2, loc="upper center")
    usable = setting.hardware.memory_bytes / 1e9
    if usable < 3 * axes[1].get_ylim()[1]:
        axes[1].axhline(usable, color="gray", linestyle="--")
    what = f"{len(setting.model.tables)} tables, batch {setting.load.batch_size}"
    figure.suptitle(f"{what}, {setting.mesh} of {setting.hardware.name}")
    figure.savefig(path, dpi=120)
