"""Which plan: strategies ranked by predicted step time, and `auto`, which places each table where it costs least."""

import dataclasses
import math
from collections.abc import Mapping

from dlrm_jax.config import ModelConfig, OptimizerConfig
from dlrm_jax.host.memory import gigabytes
from dlrm_jax.host.mesh import MeshShape
from dlrm_jax.planning.cost import RESIDENT, Cost, Load, estimate
from dlrm_jax.planning.hardware import Hardware
from dlrm_jax.tables.forms import FORMS
from dlrm_jax.tables.plan import Plan, make_plan, table_bytes

AUTO = "auto"
_USABLE = 0.92
"""Share of a device's memory that a plan may fill; the rest is the runtime's."""

_OF_BATCH = ("activations", "exchange buffers")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is planned for: everything but the plan."""

    model: ModelConfig
    optimizer: OptimizerConfig
    mesh: MeshShape
    load: Load
    hardware: Hardware
    group_size: int = 0
    packed: bool = False

    def cost(self, kinds: str | Mapping[str, str]) -> Cost:
        """The costs of a sharding type for all tables, or of one for each."""
        plan = make_plan(self.model, self.mesh, kinds, group_size=self.group_size)
        return self.cost_of(plan)

    def cost_of(self, plan: Plan) -> Cost:
        """The costs of a plan."""
        return estimate(self.model, self.optimizer, plan, self.load, self.hardware, packed=self.packed)

    def over(self, cost: Cost) -> float:
        """Bytes beyond what a device holds; negative where the plan fits."""
        return cost.bytes_held - _USABLE * self.hardware.memory_bytes

    def rank_key(self, cost: Cost) -> tuple[float, float]:
        """Plans that fit first, by time; then those that do not, by how much is over."""
        return max(0.0, self.over(cost)), cost.step_seconds


def ranking(setting: Setting) -> list[tuple[str, Cost]]:
    """(strategy, costs) of each sharding type for all tables and of `auto`, best first."""
    costs = {kind: setting.cost(kind) for kind in FORMS.all()}
    costs[AUTO] = _improved(setting, costs)
    # Of equals the simpler one first.
    return sorted(costs.items(), key=lambda item: (*setting.rank_key(item[1]), item[0] == AUTO))


def auto_plan(setting: Setting) -> Plan:
    """The best plan found, which may not fit."""
    return _improved(setting, {kind: setting.cost(kind) for kind in FORMS.all()}).plan


def does_not_fit(setting: Setting, cost: Cost) -> str:
    """By how much a plan is too large, and what would help."""
    held, room = cost.bytes_held, _USABLE * setting.hardware.memory_bytes
    return (
        f"the plan needs {gigabytes(held)} a device, {gigabytes(held - room)} more than the "
        f"{gigabytes(room)} usable of {setting.hardware.name}; most of it is {largest_holder(setting, cost)}; "
        f"what would fit: {remedy(setting, cost, room)}"
    )


def largest_holder(setting: Setting, cost: Cost) -> str:
    """What takes most memory on a device, with its size; of the tables the largest is named."""
    part = max(cost.memory, key=lambda name: cost.memory[name])
    size = gigabytes(cost.memory[part])
    if part != "tables":
        batch = f" of batch_size {setting.load.batch_size:,}" if part in _OF_BATCH else ""
        return f"{part}{batch} ({size})"
    table = max(setting.model.tables, key=lambda table: table.num_embeddings)
    return (
        f"tables ({size}), the largest {table.name!r} ({table.num_embeddings:,} rows of {table.embedding_dim}: "
        f"{gigabytes(table_bytes(table))})"
    )


def remedy(setting: Setting, cost: Cost, room: float, copies: float = 0, sharing: int = 0) -> str:
    """What would fit `room` bytes of a device's memory, if tables and their state lie there `1 + copies` times.

    `sharing` devices that have one memory together get no more of it by being more.
    """
    state = cost.memory["tables"] + cost.memory["optimizer state"]
    others, all_copies = cost.bytes_held - state, (1 + copies) * state
    if cost.bytes_held - cost.memory.get(RESIDENT, 0) < room <= cost.bytes_held:
        return "--data_on_device=auto, by which rows stay only where they fit"
    if others >= room:
        return "a smaller --batch_size, if not smaller MLPs: the tables are not all that is too large"
    share = (room - others) / max(all_copies, 1)
    rows = sum(table.num_embeddings for table in setting.model.tables)
    ways = [f"tables of at most {math.floor(rows * share):,} rows in all"]
    if (dim := math.floor(setting.model.embedding_dim * share)) >= 1:
        ways.append(f"--embedding_dim of at most {dim}")
    if sharing:
        ways.append(f"{gigabytes(sharing * (others + all_copies - room))} more memory")
    else:
        ways.append(f"about {math.ceil(setting.mesh.model / share)} devices on the model axis")
    return ", or ".join(ways)


def _improved(setting: Setting, uniform: Mapping[str, Cost]) -> Cost:
    """From the best uniform plan, table by table, largest first, to the type that makes the whole cheapest.

    Tables of equal shape and use are moved together: they would move alike, and 26 are soon tried.
    """
    best_kind = min(uniform, key=lambda kind: setting.rank_key(uniform[kind]))
    kinds, best = {table.name: best_kind for table in setting.model.tables}, uniform[best_kind]
    slots = dict.fromkeys(kinds, 0)
    for lookup in setting.model.lookups:
        slots[lookup.part.table] += lookup.hotness
    groups: dict[tuple[int, int], list[str]] = {}
    for table in setting.model.tables:
        groups.setdefault((_magnitude(table.num_embeddings), slots[table.name]), []).append(table.name)
    for _, names in sorted(groups.items(), reverse=True):
        for kind in FORMS.all():
            candidate = kinds | dict.fromkeys(names, kind)
            if candidate == kinds:
                continue
            cost = setting.cost(candidate)
            if setting.rank_key(cost) < setting.rank_key(best):
                best, kinds = cost, candidate
    return best


def _magnitude(rows: int) -> int:
    return rows.bit_length() // 2
