"""Checkpoints: `WORKDIR/checkpoints/latest` and `.../best`, written by Orbax in the background, read by nobody else.

A checkpoint holds the whole TrainState and a JSON record (which run it belongs to, how far its evaluations got).
The data position is the step itself (data/pipeline.py). A checkpoint counts only once Orbax has renamed it into place,
so that a killed run finds its last complete one.
"""

import pathlib
import shutil
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from dlrm_jax.config import ConfigError
from dlrm_jax.state import TrainState

LATEST, BEST = "latest", "best"


class Checkpoints:
    """The checkpoints of one workdir. Use as a context manager: leaving it waits for pending writes."""

    def __init__(self, workdir: pathlib.Path, keep: int = 2) -> None:
        self.directory = (workdir / "checkpoints").absolute()
        self._managers = {LATEST: self._manager(LATEST, keep), BEST: self._manager(BEST, 1)}

    def _manager(self, kind: str, keep: int) -> ocp.CheckpointManager:
        directory = self.directory / kind
        directory.mkdir(parents=True, exist_ok=True)
        for unfinished in directory.glob("*.orbax-checkpoint-tmp*"):
            # Left by a killed process. Orbax ignores it, but it would fill the disk, one a kill.
            shutil.rmtree(unfinished, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(preservation_policy=checkpoint_managers.LatestN(keep))
        return ocp.CheckpointManager(directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, traceback
        try:
            for manager in self._managers.values():
                manager.close()
        except (ValueError, OSError) as unwritten:
            if error is None:
                raise self._cannot_write(unwritten) from unwritten

    def step(self, kind: str) -> int | None:
        """Step of the last complete checkpoint of `kind`, None if there is none."""
        return self._managers[kind].latest_step()

    def save(self, kind: str, state: TrainState, record: dict[str, Any]) -> None:
        """Start writing `state`; returns when the arrays are copied, so that the caller may donate them."""
        step = int(state.step)
        if step in self._managers[kind].all_steps():
            return  # A resumed run reaches the same bits again.
        if kind == LATEST:
            # Its record names the best step so far, which must be on disk first, whenever the process is killed.
            self.wait()
        self._check_space(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
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

    def record(self, kind: str) -> dict[str, Any]:
        """The JSON record saved with the last checkpoint of `kind`."""
        return self._restore(kind, self.step(kind), record=ocp.args.JsonRestore()).record

    def restore(self, kind: str, abstract_state: TrainState, step: int | None = None) -> TrainState:
        """The state saved last (or at `step`), placed as `abstract_state` says (leaves with shape, dtype, sharding)."""
        step = self.step(kind) if step is None else step
        return self._restore(kind, step, state=ocp.args.StandardRestore(abstract_state)).state

    def _restore(self, kind: str, step: int | None, **items: Any) -> Any:
        if step is None:
            raise ConfigError(f"no {kind} checkpoint in {self.directory / kind}; delete {self.directory} to start anew")
        try:
            return self._managers[kind].restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).splitlines()[0][:300]
            where = self.directory / kind / str(step)
            raise ConfigError(
                f"cannot read checkpoint {where}: {reason}; delete it to fall back on an older one"
            ) from error

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


def abstract(make_state: Callable[[], TrainState]) -> TrainState:
    """Shapes, dtypes and placement of the state that `make_state` would make, without making it."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), jax.eval_shape(make_state)
    )
