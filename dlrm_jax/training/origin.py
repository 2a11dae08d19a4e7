"""What a run may begin from: another run's latest checkpoint, or an exported model."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from dlrm_jax.config import ConfigError, ModelConfig, OptimizerConfig, model_from_dict, require
from dlrm_jax.config import from_dict as decoded
from dlrm_jax.data.read.load import CACHE
from dlrm_jax.data.read.prepared import is_prepared
from dlrm_jax.tables.plan import DATA_PARALLEL, make_plan
from dlrm_jax.tables.reshard import Rows
from dlrm_jax.training import checkpoint, reporting
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.run_config import identity_of


@dataclasses.dataclass(frozen=True)
class Origin:
    """`name` is for people, `dense` are fields of a TrainState by name, and `rows` those of its tables.

    Without an `optimizer` there are weights alone. New rows are drawn by `seed`, the new run's own where nobody knows
    by which one the others were. `schema` says what the columns were (Dataset.schema), `data` where they
    were prepared, if that is there; `by_slot` whether an optimizer's slots are stored by name.
    """

    name: str
    model: ModelConfig
    dense: Mapping[str, Any]
    rows: Rows
    step: int = 0
    seed: int | None = None
    optimizer: OptimizerConfig | None = None
    schema: Mapping[str, Any] | None = None
    data: pathlib.Path | None = None
    by_slot: bool = True


OpenModel = Callable[[pathlib.Path], Origin]
"""Opens the newest version of an exported model."""


def open_origin(path: pathlib.Path, workdir: pathlib.Path, placed: Placed, open_model: OpenModel | None) -> Origin:
    """What `path` holds, for a run in `workdir` that is placed as `placed` says; ConfigError where it is neither."""
    where = f"--init_from={path}"
    require(path.is_dir(), f"{where} is no directory; give the workdir of a run, or the directory of an exported model")
    require(path.resolve() != workdir.resolve(), f"{where} is the run's own workdir; leave it out to go on there")
    if (path / "checkpoints").is_dir():
        return _of_workdir(path, placed)
    if open_model is not None and any((one / "manifest.json").is_file() for one in path.iterdir()):
        return open_model(path)
    raise ConfigError(f"{where} holds neither checkpoints of a run nor versions of an exported model")


def _of_workdir(workdir: pathlib.Path, placed: Placed) -> Origin:
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.step(checkpoint.LATEST)
        if step is None:
            raise ConfigError(f"--init_from={workdir} holds a run without a checkpoint; let it come to its first one")
        record = checkpoints.record(checkpoint.LATEST, step)
        identity = identity_of(record)
        model = model_from_dict(identity["model"])
        optimizer = decoded(OptimizerConfig, identity["optimizer"], "the checkpoint's optimizer")
        plan = make_plan(model, placed.plan.mesh, DATA_PARALLEL)  # Only what is no table is read as it says.
        like = Placed(model, optimizer, plan, placed.mesh)
        dense, rows = checkpoints.read_model(checkpoint.LATEST, step, like)
    seed = record["progress"].get("begun", {}).get("seed")
    return Origin(
        name=f"{workdir}, its latest checkpoint, of step {step}",
        model=model,
        dense=dense,
        rows=rows,
        step=step,
        seed=identity["seed"] if seed is None else seed,
        optimizer=optimizer,
        schema=record.get("schema"),
        data=_data_of(workdir),
        by_slot=record["placement"].get("slots", False),
    )


def _data_of(workdir: pathlib.Path) -> pathlib.Path | None:
    """Where a run's data were prepared, if that is there still."""
    said = reporting.earlier(workdir, "config.json").get("data", {}).get("data_dir", "")
    places = [workdir / CACHE, *([pathlib.Path(said)] if said else [])]
    return next((place for place in places if is_prepared(place)), None)
