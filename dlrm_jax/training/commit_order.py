"""A checkpoint that counts only once another one does, though both are written at the same time.

Orbax renames a checkpoint into place when all futures of its items are done. The record of one that names another has
a future more: that the other is in place.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.handlers import CheckpointHandlerRegistry, DefaultCheckpointHandlerRegistry

Wait = Callable[[], None]
"""Returns once another checkpoint is in place; raises where it could not be written."""


class RecordHandler(ocp.JsonCheckpointHandler):
    """Writes JSON, and is done when that is written and `wait` has returned."""

    async def async_save(self, directory: epath.Path, item: Any = None, args: Any = None) -> list[Any]:
        """The futures of one item (Orbax's AsyncCheckpointHandler)."""
        del item
        written = await super().async_save(directory, args=ocp.args.JsonSave(args.item)) or ()
        return [*written, _Waited(args.wait)] if isinstance(args, RecordSave) else [*written]


@dataclasses.dataclass
class RecordSave(ocp.args.CheckpointArgs):
    """A record, as JSON has it, of a checkpoint that waits for another one."""

    item: Mapping[str, Any]
    wait: Wait


class _Waited:
    """A future of Orbax's, asked in the thread that writes."""

    def __init__(self, wait: Wait) -> None:
        self._wait = wait

    def result(self, timeout: float | None = None) -> None:
        """Done; `timeout` is Orbax's for items that may hang, and a write of another checkpoint ends or fails."""
        del timeout
        self._wait()

    def cancel(self) -> None:
        """There is nothing to undo."""


def with_records(name: str) -> CheckpointHandlerRegistry:
    """Orbax's handlers, of which the item `name` has RecordHandler to be saved and to be read."""
    registry, handler = DefaultCheckpointHandlerRegistry(), RecordHandler()
    for args in (RecordSave, ocp.args.JsonSave, ocp.args.JsonRestore):
        registry.add(name, args, handler)
    return registry
