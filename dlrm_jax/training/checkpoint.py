"""Checkpoints: `WORKDIR/checkpoints/latest` and `.../best`, written by Orbax in the background, read by nobody else.

A checkpoint holds the whole TrainState and a JSON record (which run it belongs to, how far its evaluations got, where
its tables lay). The data position is the step itself (data/read/pipeline.py). A checkpoint counts only once Orbax has
renamed it into place, so that a killed run finds its last complete one. Under another plan, or on other devices, tables
are read row by row from where they were stored (tables/reshard.py).

Orbax's files check their own directory of pieces, but not the numbers in them. So a checkpoint also holds `checksums`
of every array and of the record, and nothing that was read is handed out before it was compared (checksums.py).
"""

import logging
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from dlrm_jax.config import ConfigError
from dlrm_jax.host import heap, memory
from dlrm_jax.tables.exchange import stack_rule
from dlrm_jax.tables.layout import POOLING_WEIGHTS, Stack, place_stacks
from dlrm_jax.tables.plan import plan_from_dict
from dlrm_jax.tables.reshard import Kind, Source, read_array
from dlrm_jax.tables.rules import ROW
from dlrm_jax.training import checksums
from dlrm_jax.training.checksums import array_name
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.state import TrainState

_LOG = logging.getLogger("dlrm_jax")

LATEST, BEST = "latest", "best"
COPIES = 1.2
"""What saving holds of a state in the host's memory, measured on a CPU: a copy, and what is being written of it."""

TABLES = ("tables", "table_opt_state")
"""The parts of a state that a plan places."""

_CHUNK_BYTES = 2**24
"""What is read at least of a stored array: small beside a table, so that another plan can read it in pieces."""

_LONGEST_NAME = 3500
"""Bytes of a directory's name: systems take 4,095, and what is written below it has names of up to 300."""


class _Directory(type(epath.Path())):  # type: ignore[misc]
    """etils takes all of a path for a pattern, not only what is looked for in it: nothing is found below `runs[1]`."""

    def glob(self, pattern: str) -> Iterator[Any]:
        """What is there by a name like `pattern`."""
        return map(type(self), pathlib.Path(self).glob(pattern))


def require_name(directory: pathlib.Path) -> None:
    """ConfigError for a directory that TensorStore, which writes the arrays, takes for another, or for none."""
    name = os.fsencode(directory.resolve())
    kinds = {
        "a backslash": b"\\" in name,
        "bytes that are no UTF-8": name.decode("utf8", "replace").encode() != name,
        f"{len(name):,} bytes, of which {_LONGEST_NAME:,} are possible": len(name) > _LONGEST_NAME,
        "a part that ends in .__lock": b".__lock/" in name + b"/",
    }
    for kind, there in kinds.items():
        if there:
            raise ConfigError(f"no checkpoint can be kept in {directory}: its name has {kind}; choose another")


class Checkpoints:
    """The checkpoints of one workdir. Use as a context manager: leaving it waits for pending writes.

    Only the one who trains may open them to write; everybody else's are `read_only`, and nothing there is touched.
    """

    def __init__(self, workdir: pathlib.Path, keep: int = 2, read_only: bool = False) -> None:
        self.directory = (workdir / "checkpoints").resolve()  # TensorStore knows no "..".
        require_name(workdir)
        self._read_only = read_only
        if jax.process_index() == 0 and not read_only:
            for kind in (LATEST, BEST):
                _tidy(self.directory / kind)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints are tidy")
        self._managers = {LATEST: self._manager(LATEST, keep), BEST: self._manager(BEST, 1)}

    def _manager(self, kind: str, keep: int) -> ocp.CheckpointManager:
        if self._read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
        else:
            options = ocp.CheckpointManagerOptions(preservation_policy=checkpoint_managers.LatestN(keep))
        return ocp.CheckpointManager(_Directory(self.directory / kind), options=options)

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
        step, manager = int(state.step), self._managers[kind]
        if kind == LATEST:
            # Its record names the best step so far, which must be on disk first, whenever the process is killed.
            self.wait()
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // jax.process_count()
        self._check_space(num_bytes)
        self._check_memory(math.ceil(COPIES * num_bytes))
        tables, rest = _split(state)
        pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tables)
        record = record | {"placement": placement(placed)}
        sums = {
            "record": checksums.of_json(record),
            "dense": checksums.of_small(rest),
            "tables": checksums.of_tables(tables),
        }
        items = ocp.args.Composite(
            dense=ocp.args.StandardSave(rest),
            tables=ocp.args.StandardSave(tables, save_args=pieces),
            record=ocp.args.JsonSave(record),
            checksums=ocp.args.JsonSave(sums),
        )
        try:
            if kind == BEST:
                # Where a run went back to an earlier step, those beyond it are no longer its own, and Orbax saves
                # nothing below them.
                for beyond in [other for other in self._steps(BEST) if other >= step]:
                    manager.delete(beyond)
            saved = manager.save(step, args=items)
        except (ValueError, OSError) as error:
            raise self._cannot_write(error) from error
        if not saved:
            raise self._cannot_write(f"that of step {step} was left out beside those there ({self._listing()})")

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

    def _cannot_write(self, error: Exception | str) -> ConfigError:
        reason = str(error).splitlines()[0][:300]
        return ConfigError(f"cannot write a checkpoint in {self.directory}: {reason}; the last complete one is kept")

    def record(self, kind: str, step: int | None = None) -> dict[str, Any]:
        """The JSON record saved with the last checkpoint of `kind` (or that at `step`)."""
        step = self.step(kind) if step is None else step
        record = self._restore(kind, step, record=ocp.args.JsonRestore()).record
        noted = self._noted(kind, step)
        if noted is not None and noted.get("record") != checksums.of_json(record):
            raise self._cannot_read(kind, step, "the checksum of its record differs")
        return record

    def _noted(self, kind: str, step: int | None) -> dict[str, Any] | None:
        """The checksums that were saved with a checkpoint; None for one that was made before there were any."""
        where = self.directory / kind / str(step)
        if (where / "checksums").exists() or "checksums" in (where / "_CHECKPOINT_METADATA").read_text("latin-1"):
            return self._restore(kind, step, checksums=ocp.args.JsonRestore()).checksums
        return None

    def restore(self, kind: str, placed: Placed, step: int | None = None) -> TrainState:
        """The state saved last (or at `step`), placed as `placed` says, whatever it was placed as."""
        step = self.step(kind) if step is None else step
        tables, rest = _split(placed.abstract_state)
        how = self.record(kind, step)["placement"]
        saved, by_slot = saved_stacks(placed, how), how.get("slots", False)
        noted = self._noted(kind, step)
        if noted is None:
            where = self.directory / kind / str(step)
            _LOG.warning("checkpoint %s has no checksums, as those of older versions: it is not checked", where)
        if [stack.layout for stack in saved] == [stack.layout for stack in placed.stacks]:
            stored = tables if by_slot else _without_slots(tables)
            found = self._restore(
                kind, step, dense=ocp.args.StandardRestore(rest), tables=ocp.args.StandardRestore(stored)
            )
            self._require_whole(kind, step, found.dense, noted, "dense")
            self._require_whole(kind, step, found.tables, noted, "tables")
            found_tables = found.tables if by_slot else _with_slots(found.tables, tables)
            return _complete(TrainState(**found.dense, **found_tables), placed)
        dense = self._restore(kind, step, dense=ocp.args.StandardRestore(rest)).dense
        self._require_whole(kind, step, dense, noted, "dense")
        try:
            read = self._read_tables(kind, step, placed, tables, saved, noted, by_slot)
            return _complete(TrainState(**dense, **read), placed)
        except ConfigError:
            raise
        except Exception as error:  # What a damaged file raises depends on where it is damaged.
            raise self._cannot_read(kind, step, error) from error

    def _require_whole(self, kind: str, step: int | None, tree: Any, noted: dict[str, Any] | None, item: str) -> None:
        """ConfigError naming the arrays whose checksums are not those noted."""
        if noted is None:
            return
        try:
            different = checksums.differing(tree, noted[item])
        except Exception as error:  # The checksums themselves are damaged.
            raise self._cannot_read(kind, step, f"its checksums are damaged: {error!r}") from error
        if different:
            names = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
            raise self._cannot_read(kind, step, f"checksums differ in {names}")

    def _read_tables(
        self,
        kind: str,
        step: int | None,
        placed: Placed,
        tables: dict[str, Any],
        saved: tuple[Stack, ...],
        noted: dict[str, Any] | None,
        by_slot: bool,
    ) -> dict[str, Any]:
        """The placed parts of a state, from a checkpoint made under the plan of `saved`."""
        source = self._rows(kind, step, saved, noted)
        arrays = {
            stack.name + ending: (stack, bool(ending)) for stack in placed.stacks for ending in ("", POOLING_WEIGHTS)
        }

        def read(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            group, key, *inner = path
            stack, weights = arrays[key.key]
            stored = Kind(group.key, weights, weights, first=1.0 if weights else 0.0, dtype=str(leaf.dtype))
            if inner:
                slot = {slot.name: slot for slot in stack_rule(placed.optimizer, stack).slots}[inner[0].key]
                name = slot.name if by_slot else ""
                stored = Kind(group.key, weights, weights or slot.per == ROW, name, slot.first, slot.dtype)
            return read_array(source, stored, stack, leaf.shape, leaf.sharding)

        return jax.tree_util.tree_map_with_path(read, tables)

    def read_model(self, kind: str, step: int, placed: Placed) -> tuple[dict[str, Any], Source]:
        """(a state but for its tables, by field, rows of its tables where they are stored): it fits any memory."""
        _, rest = _split(placed.abstract_state)
        noted = self._noted(kind, step)
        dense = self._restore(kind, step, dense=ocp.args.StandardRestore(rest)).dense
        self._require_whole(kind, step, dense, noted, "dense")
        saved = saved_stacks(placed, self.record(kind, step)["placement"])
        return dense, self._rows(kind, step, saved, noted)

    def _rows(self, kind: str, step: int | None, saved: tuple[Stack, ...], noted: dict[str, Any] | None) -> Source:
        """Rows of the tables of a checkpoint that was made under the plan of `saved`, checked as they are read."""
        base = {
            "driver": "file",
            "path": f"{self.directory / kind / str(step) / 'tables'}/",
        }
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 16 * _CHUNK_BYTES}})

        def open_array(group: str, name: str) -> Any:
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{group}.{name}/"}
            store = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, context=context, read=True, open=True)
            path = f"{group}.{name}"
            return _Sliced(store.result(), None if noted is None else noted["tables"][path], path)

        return Source(saved, open_array)

    def _restore(self, kind: str, step: int | None, **items: Any) -> Any:
        if step is None:
            raise ConfigError(f"no {kind} checkpoint in {self.directory} ({self._listing()})")
        try:
            found = self._managers[kind].restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # What a damaged file raises depends on where it is damaged.
            raise self._cannot_read(kind, step, error) from error
        for name in items:
            if found.get(name) is None:
                raise self._cannot_read(kind, step, f"it has no {name}")
        return found

    def _cannot_read(self, kind: str, step: int | None, error: Exception | str) -> ConfigError:
        reason = " ".join(str(error).partition(" See full TensorStore details")[0].split())[:300] or repr(error)
        where = self.directory / kind / str(step)
        return ConfigError(f"cannot read checkpoint {where}: {reason}; {self._instead(kind, step)}")

    def _instead(self, kind: str, step: int | None) -> str:
        """What to do without a checkpoint that cannot be read; nothing that is whole is to be deleted."""
        if kind == BEST:
            return "move it away: a run that goes on makes another, and --checkpoint=latest is still there"
        older = [other for other in self._steps(LATEST) if step is None or other < step]
        if older:
            return f"move it away to fall back on that of step {older[-1]}"
        best = self._steps(BEST)
        if best:
            best_dir, latest_dir = self.directory / BEST / str(best[-1]), self.directory / LATEST
            return f"move it away and copy {best_dir} into {latest_dir} to go on from step {best[-1]}"
        return "move it away to start anew"

    def _steps(self, kind: str) -> list[int]:
        return sorted(self._managers[kind].all_steps())

    def _listing(self) -> str:
        return "; ".join(f"{kind}: {', '.join(map(str, self._steps(kind))) or 'none'}" for kind in (LATEST, BEST))

    def find(self, which: str) -> tuple[str, int]:
        """(kind, step) of `latest`, `best` or a step number; ConfigError naming what there is if it is missing."""
        available = {kind: self._steps(kind) for kind in (LATEST, BEST)}
        if available.get(which):
            return which, available[which][-1]
        for kind, steps in available.items():
            if which.isdecimal() and int(which) in steps:
                return kind, int(which)
        raise ConfigError(f"no checkpoint {which!r} in {self.directory} ({self._listing()})")


class _Sliced:
    """A tensorstore array that is read by slicing it; what was `noted` of its pieces is compared first."""

    def __init__(self, store: Any, noted: dict[str, Any] | None, path: str) -> None:
        self._store, self.shape, self._path = store, store.shape, path
        self._pieces = None if noted is None else checksums.StoredPieces(self._read, noted)

    def __getitem__(self, rows: slice) -> Any:
        if self._pieces is not None and not self._pieces.whole(rows.start, rows.stop):
            raise ValueError(f"checksums differ in {self._path}")
        return self._read(rows)

    def _read(self, rows: slice) -> Any:
        return self._store[rows].read().result()


def _tidy(directory: pathlib.Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for unfinished in directory.glob("*.orbax-checkpoint-tmp*"):
        # Left by a killed process. Orbax ignores it, but it would fill the disk, one a kill.
        shutil.rmtree(unfinished, ignore_errors=True)


def _complete(state: TrainState, placed: Placed) -> TrainState:
    """`state`, once it is seen to hold what `placed` asks for, array by array."""
    wanted, _ = jax.tree_util.tree_flatten_with_path(placed.abstract_state)
    for (path, want), leaf in zip(wanted, jax.tree.leaves(state), strict=True):
        if not isinstance(leaf, jax.Array) or (leaf.shape, leaf.dtype) != (want.shape, want.dtype):
            found = f"{getattr(leaf, 'dtype', '?')}{list(getattr(leaf, 'shape', '?'))}"
            raise ConfigError(
                f"{array_name(path)} of a checkpoint was read as {type(leaf).__name__} {found}; the run needs an array "
                f"{want.dtype}{list(want.shape)}"
            )
    for stack in placed.stacks:
        for slot in stack_rule(placed.optimizer, stack).slots:
            for name in {stack.name, stack.name + POOLING_WEIGHTS} & set(state.table_opt_state):
                if not _in_range(state.table_opt_state[name][slot.name], slot.least):
                    raise ConfigError(
                        f"{TABLES[1]}.{name}.{slot.name} of a checkpoint holds NaN, infinity or a number below "
                        f"{slot.least}, which this optimizer never keeps"
                    )
    return state


@jax.jit
def _in_range(array: jax.Array, least: float) -> jax.Array:
    return (jnp.isfinite(array) & (array >= least)).all()


def _without_slots(tables: dict[str, Any]) -> dict[str, Any]:
    """Of what a plan places, the tree that the first checkpoints have: a table's only slot without its name."""
    states = {name: next(iter(slots.values()), ()) for name, slots in tables[TABLES[1]].items()}
    return tables | {TABLES[1]: states}


def _with_slots(found: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    """The inverse."""
    states = {name: dict.fromkeys(slots, found[TABLES[1]][name]) for name, slots in tables[TABLES[1]].items()}
    return found | {TABLES[1]: states}


def _split(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what a plan places, the rest), by field."""
    fields = dict(vars(state))
    if not fields["batch_stats"]:  # As in checkpoints of before there were any.
        del fields["batch_stats"]
    return {name: fields.pop(name) for name in TABLES}, fields


def placement(placed: Placed) -> dict[str, Any]:
    """What must be known to read a checkpoint's tables, as JSON values."""
    return {"plan": placed.plan.to_dict(), "packed": placed.packed, "divisible": True, "slots": True}


def saved_stacks(placed: Placed, saved: dict[str, Any]) -> tuple[Stack, ...]:
    """How a checkpoint's tables are stored."""
    plan = plan_from_dict(saved["plan"], "the checkpoint's placement")
    return place_stacks(placed.model, plan, saved["packed"], divisible=saved.get("divisible", False))
