"""Which plan: strategies ranked by predicted step time, and `auto`, which places each table where it costs least."""

import dataclasses
from collections.abc import Mapping

from dlrm_jax.config import ConfigError, ModelConfig, OptimizerConfig
from dlrm_jax.sharding.cost import Cost, Load, estimate
from dlrm_jax.sharding.hardware import Hardware
from dlrm_jax.sharding.mesh import MeshShape
from dlrm_jax.sharding.plan import SHARDINGS, Plan, make_plan

AUTO = "auto"
_USABLE = 0.92
"""Share of a device's memory that a plan may fill; the rest is the runtime's."""


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
    costs = {kind: setting.cost(kind) for kind in SHARDINGS}
    costs[AUTO] = _improved(setting, costs)
    # Of equals the simpler one first.
    return sorted(costs.items(), key=lambda item: (*setting.rank_key(item[1]), item[0] == AUTO))


def auto_plan(setting: Setting) -> Plan:
    """The best plan found; ConfigError, with what would make it fit, if none does."""
    cost = _improved(setting, {kind: setting.cost(kind) for kind in SHARDINGS})
    if setting.over(cost) > 0:
        raise ConfigError(does_not_fit(setting, cost))
    return cost.plan


def does_not_fit(setting: Setting, cost: Cost) -> str:
    """By how much a plan is too large, and what would help."""
    held, room = cost.bytes_held, _USABLE * setting.hardware.memory_bytes
    tables = cost.memory["tables"] + cost.memory["optimizer state"]
    others = held - tables
    needed = -(-tables * setting.mesh.model // max(room - others, 1)) if room > others else None
    help_ = (
        f"with the tables split evenly about {int(needed)} devices on the model axis would hold them"
        if needed
        else "the batch alone is too large; make --batch_size smaller"
    )
    return (
        f"the plan needs {held / 1e9:.2f} GB a device, {(held - room) / 1e9:.2f} GB more than the "
        f"{room / 1e9:.2f} GB usable of {setting.hardware.name}; {help_}"
    )


def _improved(setting: Setting, uniform: Mapping[str, Cost]) -> Cost:
    """From the best uniform plan, table by table, largest first, to the type that makes the whole cheapest.

    Tables of equal shape and use are moved together: they would move alike, and 26 are soon tried.
    """
    best_kind = min(uniform, key=lambda kind: setting.rank_key(uniform[kind]))
    kinds, best = {table.name: best_kind for table in setting.model.tables}, uniform[best_kind]
    slots = dict.fromkeys(kinds, 0)
    for feature in setting.model.features:
        slots[feature.table] += feature.hotness
    groups: dict[tuple[int, int], list[str]] = {}
    for table in setting.model.tables:
        groups.setdefault((_magnitude(table.num_embeddings), slots[table.name]), []).append(table.name)
    for _, names in sorted(groups.items(), reverse=True):
        for kind in SHARDINGS:
            candidate = kinds | dict.fromkeys(names, kind)
            if candidate == kinds:
                continue
            cost = setting.cost(candidate)
            if setting.rank_key(cost) < setting.rank_key(best):
                best, kinds = cost, candidate
    return best


def _magnitude(rows: int) -> int:
    return rows.bit_length() // 2
