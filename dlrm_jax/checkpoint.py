"""Checkpoints: `WORKDIR/checkpoints/latest` and `.../best`, written by Orbax in the background, read by nobody else.

A checkpoint holds the whole TrainState and a JSON record (which run it belongs to, how far its evaluations got, where
its tables lay). The data position is the step itself (data/pipeline.py). A checkpoint counts only once Orbax has
renamed it into place, so that a killed run finds its last complete one. Under another plan, or on other devices, tables
are read row by row from where they were stored (sharding/reshard.py).
"""

import math
import pathlib
import shutil
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from dlrm_jax import heap, memory
from dlrm_jax.config import ConfigError
from dlrm_jax.sharding.placed import Placed
from dlrm_jax.sharding.plan import plan_from_dict
from dlrm_jax.sharding.reshard import Kind, Source, read_array
from dlrm_jax.sharding.storage import PlacedStack, place_stacks
from dlrm_jax.state import TrainState

LATEST, BEST = "latest", "best"
COPIES = 1.2
"""What saving holds of a state in the host's memory, measured on a CPU: a copy, and what is being written of it."""

TABLES = ("tables", "table_opt_state")
"""The parts of a state that a plan places."""

_CHUNK_BYTES = 2**24
"""What is read at least of a stored array: small beside a table, so that another plan can read it in pieces."""


class Checkpoints:
    """The checkpoints of one workdir. Use as a context manager: leaving it waits for pending writes."""

    def __init__(self, workdir: pathlib.Path, keep: int = 2) -> None:
        self.directory = (workdir / "checkpoints").absolute()
        if jax.process_index() == 0:
            for kind in (LATEST, BEST):
                _tidy(self.directory / kind)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints are tidy")
        self._managers = {LATEST: self._manager(LATEST, keep), BEST: self._manager(BEST, 1)}

    def _manager(self, kind: str, keep: int) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(preservation_policy=checkpoint_managers.LatestN(keep))
        return ocp.CheckpointManager(self.directory / kind, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, traceback
        if error is not None and jax.process_count() > 1:
            return  # Closing waits for the other processes, which may be gone.
        try:
            for manager in self._managers.values():
                manager.close()
        except (ValueError, OSError) as unwritten:
            if error is None:
                raise self._cannot_write(unwritten) from unwritten

    def step(self, kind: str) -> int | None:
        """Step of the last complete checkpoint of `kind`, None if there is none."""
        return self._managers[kind].latest_step()

    def save(self, kind: str, state: TrainState, placed: Placed, record: dict[str, Any]) -> None:
        """Start writing `state`; returns when the arrays are copied, so that the caller may donate them."""
        step = int(state.step)
        if step in self._managers[kind].all_steps():
            return  # A resumed run reaches the same bits again.
        if kind == LATEST:
            # Its record names the best step so far, which must be on disk first, whenever the process is killed.
            self.wait()
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // jax.process_count()
        self._check_space(num_bytes)
        self._check_memory(math.ceil(COPIES * num_bytes))
        tables, rest = _split(state)
        pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tables)
        items = ocp.args.Composite(
            dense=ocp.args.StandardSave(rest),
            tables=ocp.args.StandardSave(tables, save_args=pieces),
            record=ocp.args.JsonSave(record | {"placement": placement(placed)}),
        )
        try:
            self._managers[kind].save(step, args=items)
        except (ValueError, OSError) as error:
            raise self._cannot_write(error) from error

    def _check_space(self, num_bytes: int) -> None:
        """Refuse to begin what cannot fit: a write that fails half-way is reported late and at length."""
        if shutil.disk_usage(self.directory).free >= num_bytes:
            return
        self.wait()  # Pending writes delete older checkpoints when they finish.
        free = shutil.disk_usage(self.directory).free
        if free < num_bytes:
            raise ConfigError(
                f"no space for a checkpoint of {num_bytes / 1e6:.1f} MB in {self.directory}, "
                f"{free / 1e6:.1f} MB free; free some and run the same command to go on from the last checkpoint"
            )

    def _check_memory(self, num_bytes: int) -> None:
        """Refuse what would end the process: an allocation that fails in a thread that writes is an abort."""
        if (memory.host_available() or num_bytes) >= num_bytes:
            return
        self.wait()  # What is being written holds a copy.
        heap.give_back()
        free = memory.host_available() or num_bytes
        if free < num_bytes:
            raise ConfigError(
                f"no memory for a checkpoint in {self.directory}: it is written from a copy, {num_bytes / 1e6:.1f} MB, "
                f"{free / 1e6:.1f} MB are free; free some and run the same command to go on from the last checkpoint"
            )

    def wait(self) -> None:
        """Block until everything is on disk; ConfigError for what a background write met, as a full disk."""
        try:
            for manager in self._managers.values():
                manager.wait_until_finished()
        except (ValueError, OSError) as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: Exception) -> ConfigError:
        reason = str(error).splitlines()[0][:300]
        return ConfigError(f"cannot write a checkpoint in {self.directory}: {reason}; the last complete one is kept")

    def record(self, kind: str, step: int | None = None) -> dict[str, Any]:
        """The JSON record saved with the last checkpoint of `kind` (or that at `step`)."""
        step = self.step(kind) if step is None else step
        return self._restore(kind, step, record=ocp.args.JsonRestore()).record

    def restore(self, kind: str, placed: Placed, step: int | None = None) -> TrainState:
        """The state saved last (or at `step`), placed as `placed` says, whatever it was placed as."""
        step = self.step(kind) if step is None else step
        tables, rest = _split(placed.abstract_state)
        saved = saved_stacks(placed, self.record(kind, step)["placement"])
        if [stack.layout for stack in saved] == [stack.layout for stack in placed.stacks]:
            found = self._restore(
                kind, step, dense=ocp.args.StandardRestore(rest), tables=ocp.args.StandardRestore(tables)
            )
            return TrainState(**found.dense, **found.tables)
        dense = self._restore(kind, step, dense=ocp.args.StandardRestore(rest)).dense
        try:
            return TrainState(**dense, **self._read_tables(kind, step, placed, tables, saved))
        except (ValueError, OSError) as error:
            raise self._cannot_read(kind, step, error) from error

    def _read_tables(
        self, kind: str, step: int | None, placed: Placed, tables: dict[str, Any], saved: tuple[PlacedStack, ...]
    ) -> dict[str, Any]:
        """The placed parts of a state, from a checkpoint made under the plan of `saved`."""
        source = self._rows(kind, step, saved)
        found: dict[str, Any] = {group: dict(tables[group]) for group in TABLES}
        for stack in placed.stacks:
            for group in TABLES:
                for weights in (False, True):
                    key = Kind(group, weights, False).key(stack)
                    leaf = tables[group].get(key, ())
                    if isinstance(leaf, jax.ShapeDtypeStruct):
                        of_row = weights or (group == TABLES[1] and placed.optimizer.table == "rowwise_adagrad")
                        kind_of = Kind(group, weights, of_row)
                        found[group][key] = read_array(source, kind_of, stack, leaf.shape, leaf.sharding)
        return found

    def read_model(self, kind: str, step: int, placed: Placed) -> tuple[TrainState, Source]:
        """(a state whose tables are shapes only, their rows where they are stored): as much as fits any memory."""
        _, rest = _split(placed.abstract_state)
        dense = self._restore(kind, step, dense=ocp.args.StandardRestore(rest)).dense
        saved = saved_stacks(placed, self.record(kind, step)["placement"])
        state = placed.abstract_state.replace(**dense)
        return state, self._rows(kind, step, saved)

    def _rows(self, kind: str, step: int | None, saved: tuple[PlacedStack, ...]) -> Source:
        """Rows of the tables of a checkpoint that was made under the plan of `saved`."""
        base = f"file://{self.directory / kind / str(step) / 'tables'}/"
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 16 * _CHUNK_BYTES}})

        def open_array(group: str, name: str) -> Any:
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{group}.{name}/"}
            store = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, context=context, read=True, open=True)
            return _Sliced(store.result())

        return Source(saved, open_array)

    def _restore(self, kind: str, step: int | None, **items: Any) -> Any:
        if step is None:
            raise ConfigError(f"no {kind} checkpoint in {self.directory / kind}; delete {self.directory} to start anew")
        try:
            return self._managers[kind].restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as error:
            raise self._cannot_read(kind, step, error) from error

    def _cannot_read(self, kind: str, step: int | None, error: Exception) -> ConfigError:
        reason = str(error).splitlines()[0][:300]
        where = self.directory / kind / str(step)
        return ConfigError(f"cannot read checkpoint {where}: {reason}; delete it to fall back on an older one")

    def find(self, which: str) -> tuple[str, int]:
        """(kind, step) of `latest`, `best` or a step number; ConfigError naming what there is if it is missing."""
        available = {kind: sorted(self._managers[kind].all_steps()) for kind in (LATEST, BEST)}
        if available.get(which):
            return which, available[which][-1]
        for kind, steps in available.items():
            if which.isdecimal() and int(which) in steps:
                return kind, int(which)
        listing = "; ".join(f"{kind}: {', '.join(map(str, steps)) or 'none'}" for kind, steps in available.items())
        raise ConfigError(f"no checkpoint {which!r} in {self.directory} ({listing})")


class _Sliced:
    """A tensorstore array that is read by slicing it."""

    def __init__(self, store: Any) -> None:
        self._store, self.shape = store, store.shape

    def __getitem__(self, rows: slice) -> Any:
        return self._store[rows].read().result()


def _tidy(directory: pathlib.Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for unfinished in directory.glob("*.orbax-checkpoint-tmp*"):
        # Left by a killed process. Orbax ignores it, but it would fill the disk, one a kill.
        shutil.rmtree(unfinished, ignore_errors=True)


def _split(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what a plan places, the rest), by field."""
    fields = dict(vars(state))
    return {name: fields.pop(name) for name in TABLES}, fields


def placement(placed: Placed) -> dict[str, Any]:
    """What must be known to read a checkpoint's tables, as JSON values."""
    return {"plan": placed.plan.to_dict(), "packed": placed.packed, "divisible": True}


def saved_stacks(placed: Placed, saved: dict[str, Any]) -> tuple[PlacedStack, ...]:
    """How a checkpoint's tables are stored."""
    plan = plan_from_dict(saved["plan"], "the checkpoint's placement")
    return place_stacks(placed.model, plan, saved["packed"], divisible=saved.get("divisible", False))
