"""Checkpoints: `WORKDIR/checkpoints/latest` and `.../best`, written by Orbax in the background, read by nobody else.

A checkpoint holds the whole TrainState and a JSON record (which run it belongs to, how far its evaluations got, where
its tables lay). The data position is the step itself (data/read/pipeline.py). A checkpoint counts only once Orbax has
renamed it into place, so that a killed run finds its last complete one; saved.py reads it.

Orbax's files check their own directory of pieces, but not the numbers in them. So a checkpoint also holds `checksums`
of every array and of the record, and nothing that was read is handed out before it was compared (checksums.py).
"""

import contextlib
import functools
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from dlrm_jax.config import ConfigError
from dlrm_jax.host import heap, memory
from dlrm_jax.tables.reshard import Source
from dlrm_jax.training import checksums
from dlrm_jax.training.commit_order import RecordSave, with_records
from dlrm_jax.training.placed import Placed
from dlrm_jax.training.saved import CHUNK_BYTES, Saved, placement, split
from dlrm_jax.training.state import TrainState

LATEST, BEST = "latest", "best"
COPIES = 1.2
"""What saving holds of a state in the host's memory, measured on a CPU: a copy, and what is being written of it."""

_WRITE_SECONDS = 3600
"""A write that takes longer has failed: 100 GB at 30 MB/s."""
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
            with _orbax_silent():  # It warns that what is opened to be read is only read.
                return ocp.CheckpointManager(_Directory(self.directory / kind), options=options)
        seconds = _WRITE_SECONDS * (1 + (kind == LATEST))  # That of the best included.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(keep), async_options=ocp.AsyncOptions(timeout_secs=seconds)
        )
        registry = with_records("record")
        return ocp.CheckpointManager(_Directory(self.directory / kind), options=options, handler_registry=registry)

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
        """Start writing `state`; returns when the arrays are copied, so that the caller may donate them.

        It waits for earlier ones that are still being written, but the latest is begun beside the best, which its
        record names; then it counts once that does, whenever the process is killed. No best is begun beside a latest:
        it would take the place of the one that this names.
        """
        step, manager = int(state.step), self._managers[kind]
        if kind == BEST or jax.process_count() > 1:  # Two writes of one step have barriers of one name.
            self.wait()
        begun = self._managers[BEST].is_saving_in_progress()
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // jax.process_count()
        self._check_space(num_bytes * (1 + begun), num_bytes)
        self._check_memory(math.ceil((COPIES + (COPIES - 1) * begun) * num_bytes))
        tables, rest = split(state)
        pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tables)
        record = record | {"placement": placement(placed)}
        sums = {
            "record": checksums.of_json(record),
            "dense": checksums.of_small(rest),
            "tables": checksums.of_tables(tables),
        }
        items = ocp.args.Composite(
            dense=ocp.args.StandardSave(rest),
            tables=ocp.args.StandardSave(tables, save_args=pieces),
            record=RecordSave(record, self._managers[BEST].wait_until_finished)
            if kind == LATEST
            else ocp.args.JsonSave(record),
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

    def _check_space(self, with_begun: int, num_bytes: int) -> None:
        """Refuse to begin what cannot fit: a write that fails half-way is reported late and at length.

        `with_begun` are the bytes of what is being written too, at most.
        """
        if shutil.disk_usage(self.directory).free >= with_begun:
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
        return self._saved(kind, step).record

    def restore(self, kind: str, placed: Placed, step: int | None = None) -> TrainState:
        """The state saved last (or at `step`), placed as `placed` says, whatever it was placed as."""
        return self._saved(kind, step).restore(placed)

    def read_model(self, kind: str, step: int, placed: Placed) -> tuple[dict[str, Any], Source]:
        """(a state but for its tables, by field, rows of its tables where they are stored): it fits any memory."""
        return self._saved(kind, step).read_model(placed)

    def _saved(self, kind: str, step: int | None) -> Saved:
        step = self.step(kind) if step is None else step
        if step is None:
            raise ConfigError(f"no {kind} checkpoint in {self.directory} ({self._listing()})")
        directory, restore = self.directory / kind / str(step), functools.partial(self._managers[kind].restore, step)
        return Saved(directory, restore, functools.partial(self._instead, kind, step))

    def _instead(self, kind: str, step: int) -> str:
        """What to do without a checkpoint that cannot be read; nothing that is whole is to be deleted."""
        if kind == BEST:
            return "move it away: a run that goes on makes another, and --checkpoint=latest is still there"
        older = [other for other in self._steps(LATEST) if other < step]
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


@contextlib.contextmanager
def _orbax_silent() -> Iterator[None]:
    """Orbax logs through absl's logger, which a command silences and a user of Python need not know."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _tidy(directory: pathlib.Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for unfinished in directory.glob("*.orbax-checkpoint-tmp*"):
        # Left by a killed process. Orbax ignores it, but it would fill the disk, one a kill.
        shutil.rmtree(unfinished, ignore_errors=True)
