"""Plans: where each table lies, as a value that is printed, saved as JSON, compared and passed back in."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from dlrm_jax.config import ConfigError, ModelConfig, TableConfig, require_choice
from dlrm_jax.config.documents import from_json
from dlrm_jax.host.mesh import MeshShape
from dlrm_jax.tables.dtypes import table_dtype
from dlrm_jax.tables.forms import FORMS, form_of
from dlrm_jax.tables.forms.base import ALL, ONE

DATA_PARALLEL = "data_parallel"
"""The sharding type of one device."""

_MOST_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Placement:
    """One table's sharding type, and which shards of the `model` axis hold it: `count` of them from number `first`."""

    sharding: str
    first: int = 0
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """A mesh and the placement of every table on it."""

    mesh: MeshShape
    tables: Mapping[str, Placement]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return dataclasses.asdict(self)


def plan_from_dict(values: Any, source: str = "plan") -> Plan:
    """The inverse of `Plan.to_dict`; ConfigError naming `source` and what is wrong."""
    try:
        mesh = MeshShape(**values["mesh"])
        tables = {name: Placement(**placement) for name, placement in values["tables"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{source} is not a sharding plan ({error}); dlrm_jax.plan --json writes one") from error
    return Plan(mesh, tables)


def read_overrides(path: pathlib.Path) -> dict[str, str | Placement]:
    """What `--sharding_plan` says of single tables: {"tables": {NAME: sharding type, or a placement as Plan's}}."""
    try:
        tables = from_json(path.read_text(encoding="utf-8"))["tables"]
        return {name: value if isinstance(value, str) else _placement(value) for name, value in tables.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{path} is not a sharding plan ({error}); write {{"tables": {{"NAME": "row_wise"}}}} or take what '
            "dlrm_jax.plan --json wrote"
        ) from error


def _placement(value: Any) -> Placement:
    return Placement(str(value["sharding"]), int(value["first"]), int(value["count"]))


def make_plan(
    model: ModelConfig,
    mesh: MeshShape,
    sharding: str | Mapping[str, str],
    overrides: Mapping[str, str | Placement] | None = None,
    group_size: int = 0,
) -> Plan:
    """Place every table of `model`: `sharding` for all (or by table name), `overrides` for some.

    Tables that lie on one shard or a group of `group_size` are dealt out, largest first, to those that carry least,
    counting memory and lookups alike. `group_size` 0: half of the shards, or all where they are odd.
    """
    overrides = dict(overrides or {})
    unknown = sorted(set(overrides) - {table.name for table in model.tables})
    if unknown:
        shown = ", ".join(unknown[:_MOST_NAMED]) + (", ..." if len(unknown) > _MOST_NAMED else "")
        known = ", ".join([table.name for table in model.tables[:_MOST_NAMED]])
        raise ConfigError(f"the sharding plan speaks of {shown}, which the model does not have; it has {known}, ...")
    group_size = check_group_size(group_size, mesh.model)
    kinds = {
        table.name: overrides.get(table.name, sharding if isinstance(sharding, str) else sharding[table.name])
        for table in model.tables
    }
    placed: dict[str, Placement] = {}
    loads = _Loads(model, mesh.model)
    for name, kind in kinds.items():
        if isinstance(kind, Placement):
            placed[name] = _checked(name, kind, mesh.model)
        else:
            require_choice(f"sharding of table {name!r}", kind, tuple(FORMS.all()))
            if form_of(kind).span == ALL:
                placed[name] = Placement(kind, 0, mesh.model)
    for name, placement in placed.items():
        loads.add(name, placement)
    waiting = [table for table in model.tables if table.name not in placed]
    for table in sorted(waiting, key=lambda table: (-loads.share(table.name), table.name)):
        kind = str(kinds[table.name])
        choices = form_of(kind).choices(table, mesh.model, group_size)
        placed[table.name] = min((Placement(kind, *choice) for choice in choices), key=loads.of)
        loads.add(table.name, placed[table.name])
    return Plan(mesh, {table.name: placed[table.name] for table in model.tables})


def check_group_size(group_size: int, num_shards: int) -> int:
    """The size of table_row_wise's groups; ConfigError unless it divides the shards."""
    if group_size == 0:
        return num_shards // 2 if num_shards % 2 == 0 else num_shards
    if group_size < 1 or num_shards % group_size:
        raise ConfigError(f"--group_size={group_size} does not divide the {num_shards} devices of the model axis")
    return group_size


def _checked(name: str, placement: Placement, num_shards: int) -> Placement:
    require_choice(f"sharding of table {name!r}", placement.sharding, tuple(FORMS.all()))
    fits = placement.first >= 0 and placement.first + placement.count <= num_shards and placement.count >= 1
    needed = {ALL: num_shards, ONE: 1}.get(form_of(placement.sharding).span, placement.count)
    if not fits or placement.count != needed:
        raise ConfigError(
            f"table {name!r} is planned {placement.sharding} on shards {placement.first} to "
            f"{placement.first + placement.count - 1}, but the model axis has {num_shards}; make the plan anew"
        )
    return placement


class _Loads:
    """What each shard carries: its share of all bytes plus its share of all id slots."""

    def __init__(self, model: ModelConfig, num_shards: int) -> None:
        rows = {table.name: table.num_embeddings for table in model.tables}
        slots = dict.fromkeys(rows, 0)
        for lookup in model.lookups:
            slots[lookup.part.table] += lookup.hotness
        total_rows, total_slots = sum(rows.values()), sum(slots.values())
        self._share = {name: rows[name] / total_rows + slots[name] / total_slots for name in rows}
        self._load_S = [0.0] * num_shards

    def share(self, name: str) -> float:
        return self._share[name]

    def of(self, placement: Placement) -> float:
        return max(self._load_S[placement.first : placement.first + placement.count])

    def add(self, name: str, placement: Placement) -> None:
        if form_of(placement.sharding).replicated:
            return
        for shard in range(placement.first, placement.first + placement.count):
            self._load_S[shard] += self._share[name] / placement.count


def table_bytes(table: TableConfig) -> int:
    """Bytes of a table as it is stored."""
    return table.num_embeddings * table.embedding_dim * weight_bytes(table)


def weight_bytes(table: TableConfig) -> int:
    """Bytes of a stored weight."""
    return table_dtype(table.dtype).bytes
