"""How a run begins: with fresh weights, or with those of another run or an exported model (`--init_from`).

Tables may have grown meanwhile and lie elsewhere; everything else must be of one shape, or tables are taken alone. What
was taken, what grew and what is fresh is told in a table.
"""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dlrm_jax.config import (
    ConfigError,
    DenseConfig,
    FeatureConfig,
    ModelConfig,
    OptimizerConfig,
    TableConfig,
    differences,
    require,
    tell,
    to_dict,
)
from dlrm_jax.data.read.dataset import Dataset
from dlrm_jax.host import huge_pages
from dlrm_jax.host.texts import aligned
from dlrm_jax.tables.grown import Grown
from dlrm_jax.tables.named_rules import make_rule
from dlrm_jax.training.known_ids import require_known_ids
from dlrm_jax.training.origin import OpenModel, Origin, open_origin
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.run_config import KEEP, TABLES_ONLY, RunConfig
from dlrm_jax.training.saved import complete, read_tables, split
from dlrm_jax.training.state import TrainState, compiled_init_dense, new_state

_LOG = logging.getLogger("dlrm_jax")
_BY_ITSELF = ("dense_init", "table_init", "compute_dtype")
"""Of DenseConfig, what changes no weight that is there already."""


@dataclasses.dataclass
class Begun:
    """Where a run began, kept with its checkpoints: at `step`, and from what, as the settings of these names say.

    `seed` is the one by which rows of its tables are drawn; None where that is the run's own.
    """

    step: int = 0
    seed: int | None = None
    init_from: str = ""
    init_steps: str = KEEP
    init_only: str = ""

    @property
    def settings(self) -> dict[str, str]:
        """As RunConfig has them."""
        return {"init_from": self.init_from, "init_steps": self.init_steps, "init_only": self.init_only}

    def noted_in(self, config: RunConfig) -> RunConfig:
        """`config` with these settings, which a run that goes on need not name again."""
        return dataclasses.replace(
            config, init_from=self.init_from, init_steps=self.init_steps, init_only=self.init_only
        )

    def require_same(self, config: RunConfig, workdir: pathlib.Path) -> None:
        """ConfigError where `config` says that the run in `workdir` began otherwise; it need not say so again."""
        now = {name: getattr(config, name) for name in self.settings}
        same = now | {"init_from": _path(config.init_from)} == self.settings | {"init_from": _path(self.init_from)}
        require(
            not config.init_from or same,
            f"{workdir} holds a run that began {self._in_words()}; leave --init_from out to go on, or choose another "
            f"--workdir to begin from {config.init_from}",
        )

    def _in_words(self) -> str:
        given = [f"--{name}={value}" for name, value in self.settings.items() if value]
        return f"with {' '.join(given)}" if self.init_from else "with fresh weights"


def _path(text: str) -> str:
    return os.path.realpath(text) if text else ""


def begin(
    config: RunConfig, workdir: pathlib.Path, placed: Placed, dataset: Dataset, open_model: OpenModel | None
) -> tuple[TrainState, Begun]:
    """The state with which a run in a fresh workdir begins; ConfigError where it cannot begin as it is told to."""
    if not config.init_from:
        return placed.init_state(config.seed), Begun()
    origin = open_origin(pathlib.Path(config.init_from), workdir, placed, open_model)
    only_tables = config.init_only == TABLES_ONLY
    require_fitting(origin, placed.model, dataset, only_tables)
    require_known_ids(origin, dataset)
    seed = config.seed if origin.seed is None else origin.seed
    step = origin.step if config.init_steps == KEEP else 0
    old = {table.name: table for table in origin.model.tables}
    unlike = {table.name: _unlike(table, old, origin, placed.optimizer, step) for table in placed.model.tables}
    rows = Grown(origin.rows, old, placed.model, seed, [name for name, reason in unlike.items() if not reason])
    placed_parts = read_tables(rows, placed, split(placed.abstract_state)[0], origin.by_slot)
    dense, told = _dense(config, placed, {} if only_tables else origin.dense)
    dense["step"] = np.int32(step)
    everywhere = jax.jit(lambda values: values, out_shardings=placed.everywhere)
    state = complete(TrainState(**everywhere(dense), **placed_parts), placed)
    huge_pages.collapse(state)
    told += [_row(table, old.get(table.name), unlike[table.name]) for table in placed.model.tables]
    left = sorted(set(old) - {table.name for table in placed.model.tables})
    told += [[name, "left there", "", ""] for name in left]
    header = ["", "taken", "new", "optimizer state"]
    steps = f"steps go on from {step}" if step else "steps are counted from 0"
    _LOG.info("beginning from %s; %s, new rows are drawn by seed %d", origin.name, steps, seed)
    _LOG.info("%s", aligned([header, *told], left=(0, 3)))
    return state, Begun(step, seed, config.init_from, config.init_steps, config.init_only)


def require_fitting(origin: Origin, model: ModelConfig, dataset: Dataset, only_tables: bool) -> None:
    """ConfigError for a model that cannot take an origin's weights, naming both values and what would fit."""
    old = {table.name: table for table in origin.model.tables}
    common = [table for table in model.tables if table.name in old]
    start = f"--init_from: {origin.name}"
    for table in common:
        then, now = old[table.name], table
        require(
            then.embedding_dim == now.embedding_dim,
            f"{start}: table {table.name!r} has rows of {then.embedding_dim} there and of {now.embedding_dim} here; "
            f"give it that dim: --embedding_dim={then.embedding_dim}, or its own by --tables",
        )
        require(
            then.num_embeddings <= now.num_embeddings,
            f"{start}: table {table.name!r} has {then.num_embeddings:,} rows there and {now.num_embeddings:,} here; a "
            "table can grow, not shrink: prepare the new rows with --extend of the data there",
        )
    require(
        bool(common),
        f"{start}: none of its tables ({', '.join(old)}) is among {', '.join(t.name for t in model.tables)}",
    )
    if only_tables:
        return
    different = differences(_shape(model), _shape(origin.model))
    names = [[dense["name"] for dense in (schema or {}).get("dense", [])] for schema in (dataset.schema, origin.schema)]
    if not different and dataset.schema and origin.schema:
        different = differences({"dense columns": names[0]}, {"dense columns": names[1]})
    if different:
        raise ConfigError(
            f"{start}: another model (here != there): {tell(different)}; make them equal, or take its tables alone: "
            "--init_only=tables"
        )


def _shape(model: ModelConfig) -> dict[str, Any]:
    """What must be equal for weights that are no table's to mean the same."""
    dense = {field.name: getattr(model, field.name) for field in dataclasses.fields(DenseConfig)}
    shape = {name: value for name, value in dense.items() if name not in _BY_ITSELF}
    shape |= {"num_dense": model.num_dense, "embedded": model.embedded}
    for name in ("bottom_hidden", "top_hidden"):  # What is left out in a step is no weight.
        shape[name] = dataclasses.replace(getattr(model, name), dropout=0.0)
    shape["interaction"] = {"name": model.interaction.name, **model.interaction.options}
    shape["features"] = [_meaning(feature) for feature in model.features]
    return {name: to_dict(value) if dataclasses.is_dataclass(value) else value for name, value in shape.items()}


def _meaning(feature: FeatureConfig) -> dict[str, Any]:
    """A feature but for the number of its ids, which may grow."""
    return {name: value for name, value in to_dict(feature).items() if name != "num_ids"}


def _unlike(
    table: TableConfig, old: Mapping[str, TableConfig], origin: Origin, optimizer: OptimizerConfig, step: int
) -> str:
    """Why what an optimizer keeps of a table cannot be taken; empty where it can."""
    if table.name not in old or origin.optimizer is None:
        return "fresh"
    then = make_rule(origin.optimizer, old[table.name].optimizer)
    now = make_rule(optimizer, table.optimizer)
    if then.kind is not now.kind or then.slots != now.slots:
        return f"fresh: {now.describe()} here, {then.describe()} there"
    return f"fresh: {now.describe()} counts updates, from 0" if now.counts_updates and step != origin.step else ""


def _dense(config: RunConfig, placed: Placed, found: Mapping[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    """(the fields of a state but for its tables, lines that say where they come from)."""
    fresh = new_state(placed.model, placed.optimizer, compiled_init_dense(placed.model, config.seed), {}, ())
    dense = split(fresh)[1]
    told = [["MLPs, interaction", "all" if found else "", "" if found else "all", ""]]
    if not found:
        told[0][3] = f"fresh ({placed.optimizer.dense})"
        return jax.tree.map(np.asarray, dense), told
    dense["dense_params"] = found["dense_params"]
    if "batch_stats" in dense:
        dense["batch_stats"] = found["batch_stats"]
    same = "dense_opt_state" in found and _alike(dense["dense_opt_state"], found["dense_opt_state"])
    if same:
        dense["dense_opt_state"] = found["dense_opt_state"]
    if "rate_factor" in dense and "rate_factor" in found and config.init_steps == KEEP:
        dense["rate_factor"] = found["rate_factor"]
    told[0][3] = "taken" if same else f"fresh: {placed.optimizer.dense} here"
    return jax.tree.map(np.asarray, dense), told


def _alike(one: Any, other: Any) -> bool:
    """Whether two optimizers keep the same of the same parameters."""
    described = [
        jax.tree.flatten(jax.tree.map(lambda leaf: f"{leaf.shape} {leaf.dtype}", tree)) for tree in (one, other)
    ]
    return described[0] == described[1]


def _row(table: TableConfig, then: TableConfig | None, unlike: str) -> list[str]:
    taken = 0 if then is None else then.num_embeddings
    born = table.num_embeddings - taken
    return [
        f"table {table.name}",
        f"{taken:,} rows" if taken else "",
        f"{born:,} rows" if born else "",
        unlike or ("taken" if taken else "fresh"),
    ]
